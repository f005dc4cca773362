"""Short runs of tiny models on meshes of eight devices, for comparison."""

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
from one_device import ALL_DEVICES

import tjx_parallel
from tjx_nn.models.bert_config import BertConfig
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.models.vit_config import ViTConfig
from tjx_trainer.cli.command_line import parse
from tjx_trainer.config.mesh_checks import known_axis_sizes
from tjx_trainer.config.run_config import Config
from tjx_trainer.training.build import StepComponents, build_step_components
from tjx_trainer.training.train_state import initial_state

VOCAB, ROWS, TOKENS, STEPS = 64, 16, 32, 6

Flags = Mapping[str, object]
TINY: Flags = {
    "config": "quickstart",
    "model.n_layer": 4, "model.n_head": 4, "model.d_model": 32, "model.max_seq_len": TOKENS,
    "train.max_steps": STEPS, "train.batch_size": ROWS, "train.sample_tokens": 0,
    "data.seq_len": TOKENS, "optimizer.learning_rate": 3e-3, "schedule.warmup_steps": 2,
    "mesh.data": 1,
}  # fmt: skip


class Run(NamedTuple):
    """Result of a run.

    Attributes
    ----------
    losses
        Loss of each step.
    initial
        Initial parameters by path.
    gradients
        Gradients of the first batch by path, from Adam's first moment.
    config, parts
        Configuration and step components.
    program
        The compiled step.
    state
        The final state.
    """

    losses: list[float]
    initial: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    config: Config
    parts: StepComponents
    program: Any
    state: Any


def run(flags: Flags = {}, mesh: Flags = {}, *, packed: bool = False) -> Run:  # noqa: B006  read only
    """Train a tiny model for six steps; a flag of None is left out."""
    return _run(_words(flags, mesh), packed)


def build(flags: Flags, mesh: Flags) -> tuple[Config, StepComponents]:
    """Return the configuration and step components of a run, which is not made."""
    return _build(_words(flags, mesh))


def _words(flags: Flags, mesh: Flags) -> tuple[str, ...]:
    words = {**TINY, **flags, **{f"mesh.{name}": value for name, value in mesh.items()}}
    return tuple(f"--{name}={value}" for name, value in words.items() if value is not None)


def _build(words: tuple[str, ...]) -> tuple[Config, StepComponents]:
    config = parse(words)
    if isinstance(config.model, GPTConfig | BertConfig):
        config = config.with_vocabulary(VOCAB)
    devices = ALL_DEVICES[: math.prod(known_axis_sizes(config.mesh).values())]
    return config, build_step_components(config, devices)


@cache
def _run(words: tuple[str, ...], packed: bool) -> Run:
    with jax.transfer_guard("allow"):
        config, parts = _build(words)
        state = initial_state(config, parts.optimizer, parts.abstract)
        initial = flat(state.params)

        def batch(step: int) -> dict[str, jax.Array]:
            rows = batch_of(config, step % 2, packed=packed)
            teacher = {} if parts.teacher is None else {"teacher": parts.teacher.params}
            return {**tjx_parallel.shard_batch(parts.mesh, rows), **teacher}

        lowered: Any = parts.train_step
        compiled = lowered.lower(state, batch(0)).compile()
        losses: list[float] = []
        gradients: dict[str, np.ndarray] = {}
        for step in range(STEPS):
            state, metrics = compiled(state, batch(step))
            losses.append(float(metrics["loss"]))
            if not gradients:
                gradients = _first_moments(state.opt_state)
    return Run(losses, initial, gradients, config, parts, compiled, state)


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Return the leaves by path, on the host."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def _first_moments(opt_state: Any) -> dict[str, np.ndarray]:
    found = {}
    for path, leaf in flat(opt_state).items():
        _, mu, name = path.partition("mu/")
        if mu:
            found[name] = leaf
    assert found
    return found


def batch_of(config: Config, step: int, *, packed: bool) -> dict[str, np.ndarray]:
    """Return random rows of the kind that the model reads; a tenth of the labels is ignored."""
    rng = np.random.default_rng(step)
    model = config.model
    if isinstance(model, ViTConfig):
        shape = (ROWS, *model.height_width, model.channels)
        images = rng.standard_normal(shape).astype(np.float32)
        assert model.n_classes is not None
        return {"images": images, "labels": rng.integers(0, model.n_classes, ROWS, np.int32)}
    tokens = rng.integers(0, VOCAB, (ROWS, TOKENS + 1), np.int32)
    labels = np.where(rng.random((ROWS, TOKENS)) < 0.1, -100, tokens[:, 1:]).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "labels": labels}
    if model.family == "encoder_decoder":
        batch["source"] = rng.integers(0, VOCAB, (ROWS, TOKENS), np.int32)
    if packed:  # three documents a row
        ends = np.sort(rng.integers(1, TOKENS, (ROWS, 2)), axis=1)
        after = np.arange(TOKENS)[None, :, None] >= ends[:, None]
        batch["segment_ids"] = after.sum(-1).astype(np.int32)
    return batch


def assert_the_same_run(found: Run, expected: Run, *, bound: float = 5e-6) -> None:
    """Compare losses, initial values, and gradients to a relative error below `bound`."""
    np.testing.assert_allclose(found.losses, expected.losses, atol=1e-5, rtol=0)
    assert len(set(expected.losses)) == STEPS  # it learns
    for name, gradient in expected.gradients.items():
        np.testing.assert_array_equal(found.initial[name], expected.initial[name], err_msg=name)
        # The gradient of a key's bias is 0 but for rounding.
        size = max(np.linalg.norm(gradient), 1e-4)
        off = np.linalg.norm(found.gradients[name] - gradient) / size
        assert off < bound, (name, off)


def bytes_by_path(tree: Any, keep: Callable[[str], bool] = lambda _: True) -> dict[str, set[int]]:
    """Return how many bytes of each leaf devices hold, or are to hold, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    paths = [(jax.tree_util.keystr(p, simple=True, separator="/"), leaf) for p, leaf in leaves]
    return {path: _shard_bytes(leaf) for path, leaf in paths if keep(path)}


def _shard_bytes(leaf: jax.Array | jax.ShapeDtypeStruct) -> set[int]:
    if isinstance(leaf, jax.Array):
        return {shard.data.nbytes for shard in leaf.addressable_shards}
    assert leaf.sharding is not None
    return {math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize}
