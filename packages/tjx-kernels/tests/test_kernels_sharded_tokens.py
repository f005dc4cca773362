"""Context parallelism by ring and all-to-all: equivalence to one device."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tjx_kernels import flash_attention
from tjx_kernels.attention import registry
from tjx_kernels.attention.call import AttentionCall, Operands
from tjx_kernels.sharded.api import sharded_flash_attention
from tjx_kernels.sharded.ring_schedule import unzigzag, zigzag

SPREAD: Any = {"batch_axes": "data", "seq_axes": "context", "head_axes": "tensor"}
# "reference" compiles fastest; what an implementation does is tested elsewhere.
FAST: Any = {"implementation": "reference"}


def mesh_of(*sizes: int, names: tuple[str, ...] = ("data", "context", "tensor")) -> Mesh:
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))


def spec(*axes: Any) -> PartitionSpec:
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]


def draw(
    heads: int = 8, kv_heads: int = 2, q_len: int = 32, kv_len: int = 32, **arrays: Any
) -> tuple[dict[str, Any], Any]:
    """Operands of batch 2 and head_dim 8, and the cotangents of output and LSE."""
    rng = np.random.default_rng(0)

    def normal(*sizes: int) -> Any:
        return rng.standard_normal(sizes).astype(np.float32)

    operands: dict[str, Any] = {"q": normal(2, q_len, heads, 8)}
    operands |= {name: normal(2, kv_len, kv_heads, 8) for name in "kv"}
    if "segments" in arrays:
        ids = np.sort(rng.integers(0, 4, (2, q_len)), 1).astype(np.int32)
        operands |= {"q_segment_ids": ids, "kv_segment_ids": ids}
    if "bias" in arrays:
        operands["bias"] = normal(*arrays["bias"], q_len, kv_len)
    if "alibi" in arrays:
        operands["alibi_slopes"] = np.abs(normal(heads))
    if "sinks" in arrays:
        operands["sinks"] = normal(heads)
    if "dropout" in arrays:
        with jax.transfer_guard("allow"):
            operands["dropout_key"] = jax.random.key(1)
    return operands, (normal(2, q_len, heads, 8), normal(2, heads, q_len))


def results(function: Any, mesh: Mesh, operands: Any, cotangents: Any, **options: Any) -> Any:
    """Output, LSE, and the gradients of q, k, v, the bias and the sinks through both."""

    def run(operands: dict[str, Any], cotangents: Any) -> Any:
        names = ("q", "k", "v", "bias", "sinks")
        wanted = {name: operands[name] for name in names if name in operands}

        def of_floats(given: dict[str, Any]) -> Any:
            return function(**{**operands, **given}, return_lse=True, **FAST, **options)

        (out, lse), pull = jax.vjp(of_floats, wanted)
        return {"out": out, "lse": lse, **pull(cotangents)[0]}

    given = jax.device_put((operands, cotangents), NamedSharding(mesh, spec()))
    return jax.device_get(jax.jit(run)(*given))


def assert_equal(found: Any, wanted: Any) -> None:
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        size = 1 + np.max(np.abs(np.where(np.isinf(x), 0, x)))
        np.testing.assert_allclose(found[name], x, rtol=0, atol=5e-6 * size, err_msg=name)


@pytest.mark.parametrize(
    ("sizes", "context", "order", "kv_heads"),
    [
        ((2, 2, 2), "ring", "zigzag", 2),
        ((1, 4, 2), "ring", "contiguous", 1),  # the places of tensor share the key head
        ((2, 2, 2), "all_to_all", "contiguous", 2),  # those of context and tensor do
        ((1, 4, 2), "all_to_all", "contiguous", 1),
    ],
)
def test_packed_documents_over_all_axes(
    sizes: Any, context: Any, order: Any, kv_heads: int
) -> None:
    operands, cotangents = draw(kv_heads=kv_heads, segments=True)
    mesh, places = mesh_of(*sizes), sizes[1]
    run = partial(sharded_flash_attention, mesh=mesh, context=context, order=order, **SPREAD)
    wanted = results(flash_attention, mesh_of(1, 1, 1), operands, cotangents, causal=True)
    if order == "zigzag":
        dout, dlse = cotangents
        operands = {name: zigzag(x, places) for name, x in operands.items()}
        found = results(
            run, mesh, operands, (zigzag(dout, places), zigzag(dlse, places, 2)), causal=True
        )
        found = {name: unzigzag(x, places, 2 if name == "lse" else 1) for name, x in found.items()}
    else:
        found = results(run, mesh, operands, cotangents, causal=True)
    assert_equal(found, wanted)


def test_all_to_all_supports_options_that_the_ring_lacks() -> None:
    """Everything at once; three key heads of a place are repeated for the two that share it."""
    operands, cotangents = draw(12, 6, segments=True, alibi=True, bias=(1, 12), dropout=True)
    options: Any = {"causal": True, "window": 9, "soft_cap": 2.0, "dropout_rate": 0.2}
    options |= {"q_offset": 3}
    mesh = mesh_of(2, 2, 2)
    run = partial(sharded_flash_attention, mesh=mesh, context="all_to_all", **SPREAD)
    found = results(run, mesh, operands, cotangents, **options)
    wanted = results(flash_attention, mesh_of(1, 1, 1), operands, cotangents, **options)
    assert_equal(found, wanted)


@pytest.mark.parametrize("context", ["ring", "all_to_all"])
def test_cross_attention(context: Any) -> None:
    """Other keys than queries, and sinks; several axes at once for the tokens."""
    operands, cotangents = draw(8, 4, 16, 24, sinks=True)
    mesh = mesh_of(2, 2, 2)
    axes: Any = {"seq_axes": ("data", "context"), "head_axes": "tensor"}
    run = partial(sharded_flash_attention, mesh=mesh, context=context, **axes)
    found = results(run, mesh, operands, cotangents)
    assert_equal(found, results(flash_attention, mesh_of(1, 1, 1), operands, cotangents))


@pytest.mark.parametrize("context", ["ring", "all_to_all"])
def test_a_sequence_axis_of_size_1_changes_nothing(context: Any) -> None:
    """Options that the ring lacks, and the order, have no effect without a ring."""
    operands, cotangents = draw(dropout=True, bias=(2, 1))
    mesh = mesh_of(2, 1, 2)
    run = partial(sharded_flash_attention, mesh=mesh, context=context, order="zigzag", **SPREAD)
    found = results(run, mesh, operands, cotangents, dropout_rate=0.2)
    wanted = results(flash_attention, mesh_of(1, 1, 1), operands, cotangents, dropout_rate=0.2)
    assert_equal(found, wanted)


@pytest.mark.parametrize(
    ("sizes", "spread"),
    [((4, 1, 2), {}), ((1, 2, 4), {}), ((1, 4, 2), {"context": "all_to_all"})],
)
def test_dropout_drops_the_same_weights_on_any_mesh(sizes: Any, spread: Any) -> None:
    length, heads = 32, 16
    q = np.zeros((4, length, heads, length), np.float32)  # all weights alike
    v = np.broadcast_to(np.eye(length, dtype=np.float32)[None, :, None], q.shape)
    with jax.transfer_guard("allow"):
        key = jax.random.key(5)
    given = {"q": q, "k": q, "v": v, "dropout_key": key}
    axes = {**SPREAD, **spread}
    if sizes[1] > 1 and not spread:
        axes["batch_axes"], axes["seq_axes"] = ("data", "context"), ()

    def weights(function: Any, mesh: Mesh) -> Any:  # [B, T, N, S]
        run = jax.jit(partial(function, dropout_rate=0.25, **FAST))
        return jax.device_get(run(**jax.device_put(given, NamedSharding(mesh, spec()))))

    mesh = mesh_of(*sizes)
    found = weights(partial(sharded_flash_attention, mesh=mesh, **axes), mesh)
    np.testing.assert_array_equal(found, weights(flash_attention, mesh_of(1, 1, 1)))


def test_within_the_stages_of_a_pipeline() -> None:
    """Both ways, in a scan over checkpointed layers that is differentiated within the stage."""
    operands, (dout, _) = draw(dropout=True)
    mesh = mesh_of(2, 2, 2, names=("stage", "context", "tensor"))
    stages = np.array([1.0, -0.5], np.float32)

    def layers(attend: Any, key: Any, factor: Any, q: Any, k: Any, v: Any) -> Any:
        def layer(x: Any, _: Any) -> Any:
            x = x + factor * attend(x, k, v, causal=True, **FAST)
            more: Any = {"dropout_rate": 0.2, "dropout_key": key, "context": "all_to_all"}
            return x + attend(x, k, v, **more, **FAST), None

        return jax.lax.scan(jax.checkpoint(layer), q, None, length=2)[0]

    def stage(attend: Any, factor: Any, key: Any, dout: Any, *qkv: Any) -> Any:
        out, pull = jax.vjp(partial(layers, attend, key, factor[0]), *qkv)
        return jax.tree.map(lambda x: x[None], (out, *pull(dout)))

    axes: Any = {"seq_axes": "context", "head_axes": "tensor"}
    given = (stages, operands["dropout_key"], dout, *(operands[x] for x in "qkv"))
    run = jax.shard_map(
        partial(stage, partial(sharded_flash_attention, mesh=mesh, **axes)),
        mesh=mesh,
        axis_names={"stage"},
        in_specs=(spec("stage"), *(spec() for _ in given[1:])),
        out_specs=spec("stage"),
        check_vma=False,
    )
    everywhere = NamedSharding(mesh, spec())
    placed = (jax.device_put(stages, NamedSharding(mesh, spec("stage"))),)
    placed += jax.device_put(given[1:], everywhere)
    found = jax.device_get(jax.jit(run)(*placed))

    def alone(*args: Any, context: str = "", **options: Any) -> Any:
        return flash_attention(*args, **options)

    reference = jax.jit(partial(stage, alone))
    for i in range(2):
        wanted = jax.device_get(reference(*jax.device_put((stages[i : i + 1], *given[1:]))))
        names = ("out", "dq", "dk", "dv")
        assert_equal(
            {name: x[i] for name, x in zip(names, found, strict=True)},
            {name: x[0] for name, x in zip(names, wanted, strict=True)},
        )


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize(
    "options",
    [{"seq_axes": ()}, {"context": "ring"}, {"context": "all_to_all", "bias": (2, 8)}],
)
def test_a_backend_gets_arrays_of_the_shapes_in_its_call(
    monkeypatch: pytest.MonkeyPatch, kv_heads: int, options: Any
) -> None:
    inner, seen = registry.backends()["reference"], []

    def run(call: AttentionCall, x: Operands) -> Any:
        lengths = (call.q_len, call.heads), *2 * ((call.kv_len, call.kv_heads),)
        for array, (length, heads) in zip((x.q, x.k, x.v), lengths, strict=True):
            assert array.shape == (call.batch, length, heads, 8)
            assert array.dtype == call.dtype
        if call.bias is not None:
            assert x.bias is not None
            assert x.bias.shape == (*call.bias, call.q_len, call.kv_len)
        seen.append(call)
        return inner.run(call, x)

    entries = {**registry.backends(), "reference": inner._replace(run=run)}
    monkeypatch.setattr(registry.REGISTRY, "entries", entries)
    operands, _ = draw(8, kv_heads, **{"bias": options["bias"]} if "bias" in options else {})
    operands |= {name: operands[name].astype(jnp.bfloat16) for name in "qkv"}
    given = {**SPREAD, **{name: x for name, x in options.items() if name != "bias"}}
    jax.eval_shape(
        partial(sharded_flash_attention, mesh=mesh_of(2, 2, 2), **given, **FAST), **operands
    )
    assert seen


# --- what is communicated -------------------------------------------------------------------------


def gradient(context: Any, kv_heads: int) -> Any:
    """The lowered gradient in bfloat16, for operands that are where they belong."""
    mesh = mesh_of(2, 2, 2)

    def shape(heads: int) -> Any:
        axis = "tensor" if heads > 1 else None
        where = NamedSharding(mesh, spec("data", "context", axis))
        return jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]
            (2, 16, heads, 8), jnp.bfloat16, sharding=where
        )

    run = partial(sharded_flash_attention, mesh=mesh, context=context, **FAST, **SPREAD)

    def both(q: Any, k: Any, v: Any) -> Any:
        out, pull = jax.vjp(run, q, k, v)
        return pull(out)

    return jax.jit(both).lower(shape(8), shape(kv_heads), shape(kv_heads))


@pytest.mark.parametrize(
    ("context", "wanted"),
    [("ring", "collective-permute"), ("all_to_all", "all-to-all")],
)
def test_only_tokens_or_heads_are_communicated(context: Any, wanted: str) -> None:
    text = gradient(context, 2).compile().as_text()
    names = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute")
    assert [name for name in names if f" {name}(" in text] == [wanted]


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_key_heads_are_sent_in_bfloat16_and_their_gradients_summed_in_float32(
    kv_heads: int,
) -> None:
    lines = gradient("all_to_all", kv_heads).as_text().splitlines()
    sent = [line for line in lines if "stablehlo.all_to_all" in line]
    assert len(sent) == 8  # q, k, v and the output, there and back
    assert all(line.rstrip().endswith("bf16>") for line in sent)
    # Of two places the repeated head's gradients, [batch, tokens, heads, repeats, head_dim].
    sums = [line for line in lines if "stablehlo.reduce(" in line and "x1x2x8x" in line]
    assert len(sums) == 2
    assert all("xf32>" in line for line in sums)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "lengths", "options", "message"),
    [
        (
            8,
            (32, 32),
            {"dropout_rate": 0.1},
            r"dropout \(dropout_rate is 0.1\); .* give context=",
        ),
        (8, (32, 32), {"alibi": True}, 'no alibi_slopes; .* give context="all_to_all"'),
        (8, (32, 32), {"bias": (1, 1)}, 'no bias; .* give context="all_to_all"'),
        (8, (32, 32), {"q_offset": 4}, 'no q_offset; .* give context="all_to_all"'),
        (8, (32, 40), {"causal": True}, '32 queries and 40 keys; .* give context="all_to_all"'),
        (8, (20, 20), {"causal": True, "order": "zigzag"}, 'order="contiguous"'),
        (8, (30, 30), {}, "q_len: got 30; .* 4 devices .*; pad the sequence"),
        (8, (32, 30), {}, "kv_len: got 30; .* 4 devices .*; pad the sequence"),
        (
            4,
            (32, 32),
            {"context": "all_to_all"},
            r"8 .* tensor, context.*context=\"ring\"",
        ),
        (8, (32, 32), {"context": "all_to_all", "order": "zigzag"}, 'give order="contiguous"'),
        (8, (32, 32), {"context": "tree"}, "tree"),
        (8, (32, 32), {"implementation": "cudnn"}, "'cudnn' cannot serve"),
        (8, (32, 32), {"seq_axes": "tensor"}, "'tensor' 2 times"),
    ],
)
def test_invalid_arguments_raise(heads: int, lengths: Any, options: Any, message: str) -> None:
    asked = {name: options[name] for name in ("alibi", "bias") if name in options}
    operands, _ = draw(heads, 4, *lengths, dropout="dropout_rate" in options, **asked)
    if "dropout_rate" not in options:
        del operands["dropout_key"]
    given = {**SPREAD, **{name: x for name, x in options.items() if name not in asked}}
    run = partial(sharded_flash_attention, mesh=mesh_of(1, 4, 2), **given)
    # (Type checks at run time, where they are on, come first.)
    with pytest.raises((ValueError, TypeError), match=message):
        jax.eval_shape(run, **operands)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 2, 2), "seq_axes: got 'context'; expected an axis that the enclosing shard_map"),
        ((1, 4, 2), "that of the enclosing shard_map"),
    ],
)
def test_a_mesh_other_than_the_enclosing_one_raises(sizes: Any, message: str) -> None:
    operands, _ = draw()
    outer = mesh_of(2, 2, 2)
    run = jax.shard_map(
        partial(sharded_flash_attention, mesh=mesh_of(*sizes), **SPREAD),
        mesh=outer,
        axis_names={"context"},
        in_specs=spec(),
        out_specs=spec(),
        check_vma=False,
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, *operands.values())
