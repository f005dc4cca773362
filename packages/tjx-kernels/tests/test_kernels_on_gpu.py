"""The real instructions of a GPU: right, as exact as plain XLA, the same bits when run again.

    JAX_PLATFORMS=cuda,cpu PYTHONPATH=packages/tjx-kernels/src:packages/tjx-kernels/tests \
        python -m pytest -m gpu packages/tjx-kernels/tests/test_kernels_on_gpu.py

The other tests interpret the kernels, in small blocks; here lengths span several of the real ones.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_contract import ARRAYS, Case, draw
from attention_oracle import oracle

from tjx_kernels import flash_attention, implementations_for
from tjx_kernels.attention.call import describe_call
from tjx_kernels.attention.registry import backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"),
    pytest.mark.skipif(
        jax.default_backend() != "gpu", reason="JAX sees no GPU; set JAX_PLATFORMS=cuda,cpu"
    ),
]

ODD = (2, 1001, 1101, 4, 2)
CASES = {
    "full": Case(ODD),
    "causal": Case((1, 1536, 1536, 4, 1), {"causal": True}),
    "causal-odd": Case(ODD, {"causal": True, "q_offset": 100}),
    "dead-rows": Case(ODD, {"causal": True, "q_offset": -300}),
    "window": Case(ODD, {"causal": True, "window": 200}),
    "soft-cap": Case(ODD, {"causal": True, "soft_cap": 20.0}),
    "segments": Case(ODD, {"causal": True}, segments=5),
    "offsets": Case(ODD, {"causal": True}, offset=(-40, 100)),
    "bias-alibi": Case(ODD, {"causal": True}, bias=(1, 4), alibi=True),
    "dropout": Case(ODD, {"causal": True, "dropout_rate": 0.2}),
    "decoding": Case((4, 1, 4001, 8, 2), {"causal": True}, offset=(5, 1000, 3999, 4000)),
}
# Case, head_dim, dtype: every case in the dtype of training, a causal one in all the others.
GRID = [
    *((name, head_dim, "bfloat16") for name in CASES for head_dim in (64, 128)),
    *(("causal-odd", head_dim, "bfloat16") for head_dim in (80, 96, 256)),
    *(("causal", head_dim, "float16") for head_dim in (64, 128)),
    *((name, head_dim, "float32") for name in ("full", "causal-odd") for head_dim in (64, 128)),
]


@cache
def inputs_of(name: str, head_dim: int, dtype: str) -> dict[str, Any]:
    inputs = draw(1, CASES[name], head_dim, dtype)
    if "dropout_rate" in CASES[name].options:
        with jax.transfer_guard("allow"):
            inputs["dropout_key"] = jax.random.key(3)
    return inputs


@cache
def wanted_of(name: str, head_dim: int, dtype: str) -> dict[str, Any]:
    return oracle(inputs_of(name, head_dim, dtype), **CASES[name].options)


@cache
def plain_errors(name: str, head_dim: int, dtype: str) -> dict[str, float]:
    """Largest errors of attention as people write it in JAX, in the inputs' dtype."""
    case, inputs = CASES[name], inputs_of(name, head_dim, dtype)

    def attend(q: Any, k: Any, v: Any, bias: Any, seen: Any, alibi: Any) -> Any:
        group = q.shape[2] // k.shape[2]
        k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
        scores = scores * q.shape[3] ** -0.5
        if cap := case.options.get("soft_cap"):
            scores = cap * jnp.tanh(scores / cap)
        scores = scores + alibi if bias is None else scores + alibi + bias
        scores = jnp.where(seen[:, None], jnp.maximum(scores, -1e30), -1e30)
        dead = jnp.max(scores, axis=-1, keepdims=True) < -1e29
        weights = jnp.where(dead, 0, jax.nn.softmax(scores, axis=-1)).astype(q.dtype)
        lse = jnp.where(dead[..., 0], 0, jax.nn.logsumexp(scores, axis=-1))
        return jnp.einsum("bnts,bsnh->btnh", weights, v), lse

    @jax.jit
    def run(inputs: dict[str, Any], seen: Any, alibi: Any) -> Any:
        names = [x for x in ("q", "k", "v", "bias") if x in inputs]

        def call(*moving: Any) -> Any:
            given = dict(zip(names, moving, strict=True))
            return attend(given["q"], given["k"], given["v"], given.get("bias"), seen, alibi)

        (out, _), pull = jax.vjp(call, *(inputs[x] for x in names))
        gradients = pull((inputs["dout"], inputs["dlse"]))
        return {"out": out, **{f"d{x}": g for x, g in zip(names, gradients, strict=True)}}

    given = {k: x for k, x in inputs.items() if k in ("q", "k", "v", "bias", "dout", "dlse")}
    with jax.default_matmul_precision("highest"):  # float32 means float32
        found = jax.device_get(run(*jax.device_put((given, *seen_by(name, inputs)))))
    wanted = wanted_of(name, head_dim, dtype)
    return {x: largest_error(found[x], wanted[x]) for x in found}


def seen_by(name: str, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """Return the attention mask [batch, q_len, kv_len] and the ALiBi term of the scores."""
    case = CASES[name]
    batch, q_len = inputs["q"].shape[:2]
    offsets = np.broadcast_to(inputs.get("q_offset", case.options.get("q_offset", 0)), (batch,))
    position = offsets[:, None] + np.arange(q_len)
    distance = position[:, :, None] - np.arange(inputs["k"].shape[1])
    seen = distance >= 0 if case.options.get("causal") else np.full(distance.shape, True)
    seen &= distance < case.options.get("window", 10**9)
    if case.segments:
        seen &= inputs["q_segment_ids"][:, :, None] == inputs["kv_segment_ids"][:, None]
    slopes = inputs.get("alibi_slopes", np.zeros(1, np.float32))
    alibi = -slopes[:, None, None] * np.abs(distance)[:, None]
    return seen, alibi.astype(np.float32)


def largest_error(found: Any, wanted: Any) -> float:
    return float(np.max(np.abs(np.asarray(found, np.float64) - wanted)))


def compute_twice(name: str, implementation: str, inputs: dict[str, Any]) -> list[Any]:
    options: dict[str, Any] = {**CASES[name].options, "implementation": implementation}

    @jax.jit
    def run(inputs: dict[str, Any]) -> Any:
        fixed = {x: inputs[x] for x in ARRAYS if x in inputs and x != "bias"}
        moving = {x: inputs[x] for x in ("q", "k", "v", "bias") if x in inputs}

        def call(moving: dict[str, Any]) -> Any:
            return flash_attention(**moving, **fixed, **options, return_lse=True)

        (out, lse), pull = jax.vjp(call, moving)
        (gradients,) = pull((inputs["dout"], inputs["dlse"]))
        return {"out": out, "lse": lse, **{f"d{x}": g for x, g in gradients.items()}}

    inputs = jax.device_put(inputs)
    return [jax.device_get(run(inputs)) for _ in range(2)]


@pytest.mark.parametrize(("name", "head_dim", "dtype"), GRID)
@pytest.mark.parametrize("implementation", [x for x in backends() if x != "reference"])
def test_exact_and_the_same_bits_again(
    implementation: str, name: str, head_dim: int, dtype: str
) -> None:
    inputs, case = inputs_of(name, head_dim, dtype), CASES[name]
    arrays = jax.device_put({x: a for x, a in inputs.items() if x in ("q", "k", "v", *ARRAYS)})
    call = describe_call(**arrays, **case.options, return_lse=True)
    if reason := implementations_for(call)[implementation]:
        pytest.skip(reason)

    found, again = compute_twice(name, implementation, inputs)
    for x, a in found.items():
        np.testing.assert_array_equal(a, again[x], err_msg=f"{x} is not the same when run again")

    wanted = wanted_of(name, head_dim, dtype)
    live = np.isfinite(wanted["lse"])
    np.testing.assert_array_equal(np.isfinite(found["lse"]), live)
    tight = 1e-4 if dtype == "float32" else 2e-3
    np.testing.assert_allclose(found["lse"][live], wanted["lse"][live], rtol=0, atol=tight)
    # Plain XLA has no dropout with our weights: a bound of the size of what the others show.
    allowed = {} if "dropout" in name else plain_errors(name, head_dim, dtype)
    floor = 1e-5 if dtype == "float32" else 0.0
    for x in wanted.keys() - {"lse"}:
        size = 1 + np.max(np.abs(wanted[x]))
        bound = 2 * allowed[x] + floor * size if allowed else 2e-2 * size
        error = largest_error(found[x], wanted[x])
        assert error <= bound, f"{x}: error {error:.3g}, allowed {bound:.3g}"


def test_head_dims_and_kernels_of_this_gpu_are_supported() -> None:
    """A refusal skips above: here the kernel that this GPU is bought for must serve."""
    x = jax.ShapeDtypeStruct((1, 4096, 16, 128), jnp.bfloat16)  # type: ignore[no-untyped-call]  # as jax is
    reasons = implementations_for(describe_call(q=x, k=x, v=x, causal=True))
    capability = float(jax.devices()[0].compute_capability)
    assert reasons["triton"] is None
    assert (reasons["mosaic_gpu"] is None) == (capability == 9.0), reasons["mosaic_gpu"]
