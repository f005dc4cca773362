"""Pipeline parallelism: schedules, equivalence to plain differentiation, memory."""

import itertools
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tjx_parallel.pipeline.gradients import pipeline_gradients
from tjx_parallel.pipeline.schedule import PipelineSchedule, Work, make_pipeline_schedule

P: Any = PartitionSpec  # JAX gives no types
shaped: Any = jax.ShapeDtypeStruct
constraint: Any = jax.lax.with_sharding_constraint

# Layers L, width D, MLP width F, vocabulary V; M microbatches of B sequences of T tokens.
L, D, F, V, M, B, T = 24, 16, 32, 32, 12, 4, 8

KINDS = ("gpipe", "1f1b", "interleaved_1f1b")


def schedules(kind: str) -> list[PipelineSchedule]:
    """Return schedules of a kind with few and many microbatches, multiples of stages and not."""
    several = kind == "interleaved_1f1b"
    return [
        make_pipeline_schedule(kind, stages, groups * stages + more, chunks)
        for stages in (1, 2, 3, 5)
        for groups in (1, 2, 6)
        for more in ((0,) if several else (0, 1))
        for chunks in ((2, 3, 4) if several else (1,))
    ]


def passes(schedule: PipelineSchedule, work: Work) -> dict[tuple[int, int], tuple[int, int, int]]:
    """Return (part of the model, microbatch) -> (tick, stage, slot) of each pass."""
    found = {}
    for tick, stage in np.argwhere(work.runs):
        part = work.chunk[tick, stage] * schedule.stages + stage
        key = int(part), int(work.microbatch[tick, stage])
        assert key not in found, "once is enough"
        found[key] = int(tick), int(stage), int(work.slot[tick, stage])
    parts = schedule.stages * schedule.chunks
    assert found.keys() == {(p, m) for p in range(parts) for m in range(schedule.microbatches)}
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_schedules_satisfy_all_dependencies(kind: str) -> None:
    for schedule in schedules(kind):
        forward = passes(schedule, schedule.forward)
        backward = passes(schedule, schedule.backward)
        kept: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for (part, microbatch), (tick, stage, slot) in forward.items():
            # A stage holds what has arrived for one tick only.
            if part > 0:
                assert tick == forward[part - 1, microbatch][0] + 1
                assert backward[part - 1, microbatch][0] == backward[part, microbatch][0] + 1
            end = backward[part, microbatch]
            assert end[0] >= tick
            assert end[1:] == (stage, slot)
            kept.setdefault((stage, slot), []).append((tick, end[0]))
        for uses in kept.values():
            for (_, end_of_one), (start_of_next, _) in itertools.pairwise(sorted(uses)):
                assert start_of_next > end_of_one, f"{schedule} overwrites an input it needs"


@pytest.mark.parametrize("kind", KINDS)
def test_schedule_costs_match_the_papers(kind: str) -> None:
    for schedule in schedules(kind):
        stages, work_items = schedule.stages, schedule.chunks * schedule.microbatches
        for work in (schedule.forward, schedule.backward):
            ticks, busy = np.flatnonzero(work.runs.any(axis=1)), work.runs.sum(axis=0)
            assert (busy == work_items).all()
            waiting = (ticks[-1] - ticks[0] + 1 - busy) / busy
            np.testing.assert_allclose(waiting, (stages - 1) / work_items)
            np.testing.assert_allclose(waiting, schedule.bubble)
        bound = (schedule.chunks + 1) * stages - 1
        assert schedule.slots == (work_items if kind == "gpipe" else min(work_items, bound))


@pytest.mark.parametrize("kind", KINDS)
def test_phases_cover_exactly_the_passes(kind: str) -> None:
    for schedule in schedules(kind):
        last = schedule.backward.runs[:, -1]
        forward, backward, head = (
            schedule.forward.runs.any(axis=1),
            schedule.backward.runs.any(axis=1),
            last & (schedule.backward.chunk[:, -1] == schedule.chunks - 1),
        )
        phases = schedule.phases()
        ticks = [tick for phase in phases for tick in range(schedule.ticks)[phase.ticks]]
        assert ticks == list(range(schedule.ticks))
        for phase in phases:
            assert set(forward[phase.ticks]) == {phase.forward}
            assert set(backward[phase.ticks]) == {phase.backward}
            assert head[phase.ticks].any() == phase.head
            if schedule.chunks == 1:  # else the engine looks in each tick
                assert set(head[phase.ticks]) == {phase.head}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("zigzag", 2, 4, 1), ["zigzag", "gpipe", "interleaved_1f1b"]),
        (("1f1b", 0, 4, 1), ["stages: got 0"]),
        (("1f1b", 2, 4, 2), ["chunks: got 2", "1f1b"]),
        (("interleaved_1f1b", 4, 6, 1), ["microbatches: got 6", "stages 4", "chunks: got 1"]),
    ],
)
def test_invalid_schedules_raise_with_their_numbers(arguments: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the words are checked below
        make_pipeline_schedule(*arguments)
    assert all(word in str(caught.value) for word in words)


def norm(x: Any) -> Any:
    # 0 / 0 for what stages compute for want of work: one missing mask makes all gradients nan.
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True))


type Constraint = Callable[[Any, Any], Any]


def free(x: Any, _: Any) -> Any:
    return x


def model(constrain: Constraint) -> tuple[Any, Any, Any]:
    """Return begin, run_stage, finish: noise by microbatch and layer, penalties, a tied head."""
    between = P("data", "tensor", None)

    def begin(outer: Any, microbatch: Any) -> Any:
        table = constrain(outer["embedding"], P(None, None))
        return constrain(table[microbatch["tokens"]], between)

    def run_stage(layers: Any, first: Any, x: Any, microbatch: Any) -> Any:
        def layer(carry: Any, w: Any) -> Any:
            x, number = carry
            key = jax.random.fold_in(microbatch["key"], number)
            x = x * (1 + 0.1 * jax.random.uniform(key, x.shape, x.dtype))
            h = constrain(norm(x + jnp.cumsum(x, 1)), P("data", None, None))
            h = jnp.tanh(h @ constrain(w["up"], P(None, "tensor")))
            x = constrain(x + h @ constrain(w["down"], P("tensor", None)), between)
            return (x, number + 1), (0.1 * number * jnp.mean(h * h), jnp.mean(h))

        (x, _), (penalties, means) = jax.lax.scan(layer, (x, jnp.int32(first)), layers)
        return x, (penalties.sum(), {"activity": means.sum()})

    def finish(outer: Any, x: Any, microbatch: Any, take: Any) -> Any:
        table = constrain(outer["embedding"], P("tensor", None))
        logits = (norm(x) * outer["scale"][None, None]) @ table.T
        labels = take(microbatch["labels"])
        picked = jnp.where(labels[..., None] == jnp.arange(V)[None, None], logits, 0).sum(-1)
        losses = jnp.where(labels >= 0, jax.nn.logsumexp(logits, -1) - picked, 0)
        return losses.sum(), ((labels >= 0).sum(), {"cross_entropy": losses.sum()})

    return begin, run_stage, finish


SPECS = (
    {"embedding": P("tensor", "data"), "scale": P()},
    {"up": P("stage", "data", "tensor"), "down": P("stage", "tensor", "data")},
)


def parameters() -> Any:
    def values(*shape: int) -> Any:
        return rng.uniform(-0.3, 0.3, shape).astype(np.float32)

    rng: Any = np.random.default_rng(0)
    outer = {"embedding": values(V, D), "scale": values(D)}
    return outer, {"up": values(L, D, F), "down": values(L, F, D)}


def batch(count: int = M) -> Any:
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, V, (count, B, T)).astype(np.int32)
    labels = rng.integers(-5, V, (count, B, T)).astype(np.int32)  # below 0: not counted
    keys = jax.device_put(np.arange(2 * count, dtype=np.uint32).reshape(count, 2))
    return {"tokens": tokens, "labels": labels, "key": jax.random.wrap_key_data(keys)}


def mesh_of(stage: int, data: int = 1, tensor: int = 1) -> Mesh:
    devices = jax.devices()[: stage * data * tensor]
    return jax.make_mesh(
        (stage, data, tensor), ("stage", "data", "tensor"), (AxisType.Auto,) * 3, devices=devices
    )


def shardings(mesh: Mesh, specs: Any) -> Any:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


BATCH_SPECS = {"tokens": P(None, "data"), "labels": P(None, "data"), "key": P()}


def pipeline(mesh: Mesh, schedule: PipelineSchedule, split_tokens: bool = True) -> Any:
    """Return the compiled (outer, layers, microbatches) -> (gradients, sums)."""
    run = partial(
        pipeline_gradients,
        *model(constraint),
        mesh=mesh,
        schedule=schedule,
        spec=P("data", "tensor", None),
        loss_scale=4.0,
        split_tokens=split_tokens,
    )
    places = shardings(mesh, (*SPECS, BATCH_SPECS))
    arrays = jax.tree.map(
        lambda a, place: shaped(a.shape, a.dtype, sharding=place),
        (*parameters(), jax.eval_shape(partial(batch, schedule.microbatches))),
        places,
    )
    return jax.jit(run, out_shardings=(places[:2], NamedSharding(mesh, P()))).lower(*arrays)


@pytest.fixture(scope="module")
def plain() -> Any:
    """Return the loss, what was counted, and the gradients, of jax.value_and_grad."""

    def loss_of(params: Any, microbatches: Any) -> Any:
        begin, run_stage, finish = model(free)

        def one(microbatch: Any) -> Any:
            x, (penalty, measures) = run_stage(
                params[1], 0, begin(params[0], microbatch), microbatch
            )
            loss, (count, sums) = finish(params[0], x, microbatch, lambda labels: labels)
            return loss + penalty, (count, measures | sums)

        losses, counted = jax.lax.map(one, microbatches)
        return losses.sum(), jax.tree.map(jnp.sum, counted)

    return jax.jit(jax.value_and_grad(loss_of, has_aux=True))(
        jax.device_put(parameters()), jax.device_put(batch())
    )


@pytest.mark.parametrize(
    ("sizes", "kind", "chunks", "split_tokens"),
    [
        ((4, 2, 1), "gpipe", 1, True),
        pytest.param((4, 2, 1), "1f1b", 1, False, marks=pytest.mark.slow),
        pytest.param((4, 2, 1), "interleaved_1f1b", 2, True, marks=pytest.mark.slow),
        pytest.param((2, 2, 2), "gpipe", 1, False, marks=pytest.mark.slow),
        ((2, 2, 2), "1f1b", 1, True),
        ((2, 2, 2), "interleaved_1f1b", 3, True),
        ((3, 1, 1), "interleaved_1f1b", 2, False),
    ],
)
def test_every_schedule_gives_the_gradients_of_the_plain_loss(
    plain: Any, sizes: tuple[int, int, int], kind: str, chunks: int, split_tokens: bool
) -> None:
    mesh, schedule = mesh_of(*sizes), make_pipeline_schedule(kind, sizes[0], M, chunks)
    step = pipeline(mesh, schedule, split_tokens).compile()
    arrays = jax.device_put((*parameters(), batch()), shardings(mesh, (*SPECS, BATCH_SPECS)))
    gradients, found = jax.device_get(step(*arrays))
    (loss, (count, sums)), expected = jax.device_get(plain)
    np.testing.assert_allclose(found.loss, loss, rtol=1e-6)
    assert found.count == count
    assert found.sums.keys() == sums.keys()
    for name, value in sums.items():
        np.testing.assert_allclose(found.sums[name], value, rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a / 4, b, rtol=0, atol=5e-6 * np.abs(b).max()),
        gradients,
        expected,
    )
    # One way in each scan that goes it, and each chunk of each parameter there and back.
    scans = {"gpipe": 3, "1f1b": 4, "interleaved_1f1b": 4 + 2 * 2 * chunks}
    text = step.as_text()
    assert len(re.findall(r" collective-permute(?:-start)?\(", text)) == scans[kind]
    # The head's tokens go from stage to stage as they lie, whatever the other axes.
    shares = re.findall(r"f32\[([\d,]*)\]\S* reduce-scatter\(", text)
    lying = [B * T * D // math.prod(sizes)] if split_tokens else []
    assert [math.prod(map(int, share.split(","))) for share in shares] == lying


def test_memory_of_1f1b_does_not_grow_with_microbatches() -> None:
    def temporaries(kind: str, count: int) -> int:
        step = pipeline(mesh_of(2), make_pipeline_schedule(kind, 2, count)).compile()
        return int(step.memory_analysis().temp_size_in_bytes)

    assert temporaries("1f1b", 4) == pytest.approx(temporaries("1f1b", 64), rel=0.02)
    inputs = 60 * B * T * D * 4  # of 60 microbatches
    assert temporaries("gpipe", 64) - temporaries("gpipe", 4) == pytest.approx(inputs, rel=0.1)


def abstract(
    mesh: Mesh, schedule: PipelineSchedule, *, finish: Any = None, params: Any = None
) -> Any:
    """Return the shapes of what the pipeline returns."""
    begin, run_stage, usual = model(free)
    run = partial(pipeline_gradients, begin, run_stage, finish or usual)
    run = partial(run, mesh=mesh, schedule=schedule, spec=P())
    return jax.eval_shape(run, *(params or parameters()), jax.eval_shape(batch))


def test_arguments_that_do_not_match_the_schedule_raise() -> None:
    with pytest.raises(ValueError, match="mesh: got 2 stages; expected 3"):
        abstract(mesh_of(2), make_pipeline_schedule("1f1b", 3, M))
    with pytest.raises(ValueError, match=r"microbatches: got \{12\}; expected 8"):
        abstract(mesh_of(2), make_pipeline_schedule("1f1b", 2, 8))
    with pytest.raises(ValueError, match="layers: got 24; expected a multiple of 5 stages"):
        abstract(mesh_of(5), make_pipeline_schedule("1f1b", 5, M))
    with pytest.raises(
        ValueError, match="with 8 tokens on a device; expected a multiple of 3 stages"
    ):
        abstract(mesh_of(3), make_pipeline_schedule("1f1b", 3, M))

    def same_name(*arguments: Any) -> Any:
        loss, (count, _) = model(free)[2](*arguments)
        return loss, (count, {"activity": loss})

    with pytest.raises(ValueError, match="got activity from run_stage and finish"):
        abstract(mesh_of(2), make_pipeline_schedule("1f1b", 2, M), finish=same_name)


def test_gradients_are_float32_for_narrower_parameters() -> None:
    narrow = jax.tree.map(lambda a: shaped(a.shape, jnp.bfloat16), parameters())
    schedule = make_pipeline_schedule("1f1b", 2, M)
    gradients, _ = abstract(mesh_of(2), schedule, params=narrow)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
