"""Ring attention: equivalence to attention on the global sequence, memory, communication."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # jax needs it: the dtype bfloat16 for NumPy
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tjx_kernels import flash_attention
from tjx_kernels.sharded.ring import ring_attention
from tjx_kernels.sharded.ring_schedule import Order, unzigzag, zigzag


def ring_mesh(size: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:size]), ("context",))


def in_place(mesh: Mesh, order: Order, **options: Any) -> Any:
    """Ring attention as a function of whole sequences that stand in `order` already."""
    axes = tuple(mesh.axis_names)
    rows = PartitionSpec(None, axes)  # type: ignore[no-untyped-call]
    of_lse = PartitionSpec(None, None, axes)  # type: ignore[no-untyped-call]

    def local(q: Any, k: Any, v: Any, q_ids: Any, kv_ids: Any) -> Any:
        return ring_attention(
            q,
            k,
            v,
            axis_name=axes[0] if len(axes) == 1 else axes,
            order=order,
            q_segment_ids=q_ids,
            kv_segment_ids=kv_ids,
            return_lse=True,
            **options,
        )

    def run(q: Any, k: Any, v: Any, q_ids: Any = None, kv_ids: Any = None) -> Any:
        given = (q, k, v, q_ids, kv_ids)
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=tuple(None if x is None else rows for x in given),
            out_specs=(rows, of_lse),
            check_vma=False,
        )(*given)

    return run


def whole(q: Any, k: Any, v: Any, q_ids: Any = None, kv_ids: Any = None, **options: Any) -> Any:
    ids = {"q_segment_ids": q_ids, "kv_segment_ids": kv_ids}
    return flash_attention(q, k, v, return_lse=True, **ids, **options)


def draw(q_len: int, kv_len: int, dtype: Any = np.float32) -> tuple[Any, Any]:
    """Operands and cotangents: batch 2, 4 heads over 2 key heads of 8."""
    rng = np.random.default_rng(0)
    shapes = [(2, q_len, 4, 8), (2, kv_len, 2, 8), (2, kv_len, 2, 8), (2, q_len, 4, 8)]
    *operands, dout = (rng.standard_normal(s).astype(dtype) for s in shapes)
    return tuple(operands), (dout, rng.standard_normal((2, 4, q_len)).astype(np.float32))


def results(
    function: Any, operands: Any, cotangents: Any, mesh: Mesh | None = None
) -> dict[str, Any]:
    """Output, LSE, and the gradients of q, k and v through both."""
    everywhere = NamedSharding(mesh or ring_mesh(1), PartitionSpec())  # type: ignore[no-untyped-call]

    def run(operands: Any, cotangents: Any) -> Any:
        def of_floats(q: Any, k: Any, v: Any) -> Any:
            return function(q, k, v, *operands[3:])

        found, pull = jax.vjp(of_floats, *operands[:3])
        return (*found, *pull(cotangents))

    found = jax.device_get(jax.jit(run)(*jax.device_put((operands, cotangents), everywhere)))
    return dict(zip(("out", "lse", "dq", "dk", "dv"), found, strict=True))


def ring_results(
    mesh: Mesh, order: Order, operands: Any, cotangents: Any, **options: Any
) -> dict[str, Any]:
    """The same for ring attention, reordered on the host before and after."""
    run = in_place(mesh, order, **options)
    if order == "contiguous":
        return results(run, operands, cotangents, mesh)
    dout, dlse = cotangents
    size = mesh.size
    found = results(
        run,
        tuple(zigzag(x, size) for x in operands),
        (zigzag(dout, size), zigzag(dlse, size, 2)),
        mesh,
    )
    return {name: unzigzag(x, size, 2 if name == "lse" else 1) for name, x in found.items()}


def assert_equal(found: Any, wanted: Any, tolerance: float) -> None:
    for name, x in wanted.items():
        size = 1 + np.max(np.abs(np.where(np.isinf(x), 0, x)))
        error = tolerance * size
        np.testing.assert_allclose(found[name], x, rtol=0, atol=error, err_msg=name)


@pytest.mark.parametrize(
    ("size", "order", "options"),
    [
        (4, "zigzag", {"causal": True, "scale": 0.7, "soft_cap": 2.0}),
        (3, "zigzag", {"causal": True, "window": 25}),
        (4, "contiguous", {"causal": True, "window": 25}),
        (2, "contiguous", {"window": 30}),
        (3, "zigzag", {"window": 20, "symmetric_window": True}),
    ],
)
def test_ring_equals_attention_on_the_global_sequence(
    size: int, order: Order, options: Any
) -> None:
    operands, cotangents = draw(96, 96)
    found = ring_results(ring_mesh(size), order, operands, cotangents, **options)
    assert_equal(found, results(partial(whole, **options), operands, cotangents), 2e-6)


@pytest.mark.parametrize(("size", "order"), [(3, "zigzag"), (4, "contiguous")])
def test_segment_ids_rotate_with_their_keys(size: int, order: Order) -> None:
    operands, cotangents = draw(96, 96)
    rng = np.random.default_rng(1)
    q_ids, kv_ids = (np.sort(rng.integers(0, 4, (2, 96)), 1).astype(np.int32) for _ in range(2))
    q_ids[:, 10:50:3] = 9  # rows that see nothing
    given = (*operands, q_ids, kv_ids)
    found = ring_results(ring_mesh(size), order, given, cotangents, causal=True)
    assert_equal(found, results(partial(whole, causal=True), given, cotangents), 2e-6)
    dead = np.isneginf(found["lse"])
    assert np.all(dead[:, :, 10:50:3])
    assert np.all(found["out"].swapaxes(1, 2)[dead] == 0)
    assert np.all(found["dq"].swapaxes(1, 2)[dead] == 0)


def test_queries_of_another_sequence_over_two_axes_of_the_mesh() -> None:
    operands, cotangents = draw(24, 36)
    mesh = Mesh(np.array(jax.devices()[:6]).reshape(2, 3), ("outer", "inner"))
    found = ring_results(mesh, "contiguous", operands, cotangents)
    assert_equal(found, results(whole, operands, cotangents), 2e-6)


def test_a_ring_of_one_device_equals_flash_attention() -> None:
    operands, cotangents = draw(96, 96)
    alone = results(partial(whole, causal=True), operands, cotangents)
    found = ring_results(ring_mesh(1), "zigzag", operands, cotangents, causal=True)
    for name in ("out", "lse"):
        np.testing.assert_array_equal(found[name], alone[name])
    assert_equal(found, alone, 1e-6)


def test_bfloat16_errs_at_most_twice_as_much_as_on_one_device() -> None:
    rounded, cotangents = draw(96, 96, ml_dtypes.bfloat16)
    exact = results(
        partial(whole, causal=True, implementation="reference"),
        jax.tree.map(lambda x: x.astype(np.float32), rounded),
        jax.tree.map(lambda x: x.astype(np.float32), cotangents),
    )

    def errors(found: Any) -> dict[str, float]:
        return {n: np.max(np.abs(found[n].astype(np.float32) - x)) for n, x in exact.items()}

    ring = errors(ring_results(ring_mesh(2), "zigzag", rounded, cotangents, causal=True))
    alone = errors(results(partial(whole, causal=True), rounded, cotangents))
    for name, error in alone.items():
        assert ring[name] <= 2 * error + 1e-6, name


# --- what is sent, and what is kept ---------------------------------------------------------------


def shapes(mesh: Mesh, length: int) -> list[Any]:
    """Operands of which each device holds `length` tokens: 4 heads over 2 key heads of 16."""
    rows = NamedSharding(mesh, PartitionSpec(None, "context"))  # type: ignore[no-untyped-call]
    return [
        jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]
            (1, length * mesh.size, heads, 16), jnp.bfloat16, sharding=rows
        )
        for heads in (4, 2, 2)
    ]


def gradient(mesh: Mesh) -> Any:
    run = in_place(mesh, "zigzag", causal=True)

    def loss(q: Any, k: Any, v: Any) -> Any:
        out, lse = run(q, k, v)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

    return jax.grad(loss, argnums=(0, 1, 2))


def test_no_remote_keys_are_stored_for_the_backward_pass() -> None:
    mesh, length = ring_mesh(8), 64
    run = in_place(mesh, "zigzag", causal=True)
    _, pull = jax.eval_shape(lambda *given: jax.vjp(run, *given), *shapes(mesh, length))
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pull)) / mesh.size
    q, k, v, out = (length * heads * 16 * 2 for heads in (4, 2, 2, 4))
    lse = length * 4 * 4
    assert kept == q + k + v + out + lse


def test_memory_of_a_device_does_not_grow_with_the_ring() -> None:
    def memory(size: int) -> int:
        mesh = ring_mesh(size)
        compiled: Any = jax.jit(gradient(mesh)).lower(*shapes(mesh, 128)).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    assert memory(8) <= 1.05 * memory(4)


def equations(jaxpr: Any) -> Any:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from equations(getattr(inner, "jaxpr", inner))


def test_keys_are_sent_on_before_they_are_used() -> None:
    """In the loop's body no transfer waits for a computation, nor a computation for a transfer."""
    mesh = ring_mesh(8)
    jaxpr = jax.make_jaxpr(gradient(mesh))(*shapes(mesh, 32))
    loops = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "scan"]
    rings = [
        body
        for body in (loop.params["jaxpr"].jaxpr for loop in loops)
        if any(e.primitive.name == "ppermute" for e in body.eqns)
    ]
    assert len(rings) == 2  # forward and backward
    for body, arrays in zip(rings, (2, 4), strict=True):
        sent = [e for e in body.eqns if e.primitive.name == "ppermute"]
        computed = [e for e in body.eqns if e.primitive.name == "cond"]
        assert len(sent) == arrays  # k and v, and in the backward pass their gradients
        assert len(computed) == 1
        assert all(x in body.invars for e in sent for x in e.invars)
        assert not {x for e in sent for x in e.outvars} & set(computed[0].invars)


def test_only_neighbours_communicate() -> None:
    mesh = ring_mesh(4)
    run = in_place(mesh, "contiguous", causal=True)
    text: Any = jax.jit(run).lower(*shapes(mesh, 32)).compile().as_text()
    assert "collective-permute" in text
    for other in ("all-gather", "all-reduce", "all-to-all", "reduce-scatter"):
        assert other not in text


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "order", "options", "message"),
    [
        ((6, 6), "zigzag", {"causal": True}, "3 tokens; .* in zigzag order"),
        ((8, 4), "contiguous", {"causal": True}, "2 keys with 4 queries"),
        ((8, 8), "zigzag", {"implementation": "x"}, "implementation: got 'x'"),
        ((8, 8), "zigzag", {"implementation": "cudnn"}, "a ring needs a backward pass that takes"),
        (
            (8, 8),
            "zigzag",
            {"interpret": True, "implementation": "reference"},
            "leave out interpret",
        ),
    ],
)
def test_invalid_arguments_raise(lengths: Any, order: Any, options: Any, message: str) -> None:
    operands, _ = draw(*lengths)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(in_place(ring_mesh(2), order, **options), *operands)


def test_unknown_order_raises() -> None:
    operands, _ = draw(8, 8)
    order: Any = "sideways"
    # (Type checks at run time, where they are on, come first.)
    with pytest.raises((ValueError, TypeError), match="sideways"):
        jax.eval_shape(in_place(ring_mesh(2), order), *operands)


def test_outside_a_shard_map_raises() -> None:
    operands, _ = draw(8, 8)
    with pytest.raises(ValueError, match="'context', which no enclosing"):
        jax.eval_shape(partial(ring_attention, axis_name="context"), *operands)


def test_an_empty_sequence_gives_dead_rows() -> None:
    operands, _ = draw(8, 0)
    mesh = ring_mesh(2)
    everywhere = NamedSharding(mesh, PartitionSpec())  # type: ignore[no-untyped-call]
    run = jax.jit(in_place(mesh, "contiguous"))
    out, lse = jax.device_get(run(*jax.device_put(operands, everywhere)))
    assert np.all(out == 0)
    assert np.all(lse == -np.inf)
