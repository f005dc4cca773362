"""The loss of every token of some texts, on all devices of all processes.

Nothing depends on the batch: rows see nothing of each other, experts drop nothing, and what rows
are wanting to fill the devices is padding without labels.

Names of array axes: B rows, T tokens in a row, C tokens whose logits are held at once, K numbers of
guesses, D d_model.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import tjx_nn
import tjx_parallel
from tjx_eval.load_model import TrainedModel
from tjx_eval.scoring.windows import IGNORED_LABEL, Row, cut_windows, fill_batch, plan_batches
from tjx_metrics import cross_entropy, top_k_correct
from tjx_nn.models.gpt_config import GPTConfig
from tjx_parallel.config import MeshConfig
from tjx_trainer.training.mesh_layout import make_layout

TOP_K = (1, 5, 10)
_LOGITS_HELD = 1 << 26  # numbers on a device at once: 256 MiB

# Told how many tokens are done, and how many there are in all; 0 is not known.
ProgressCallback = Callable[[int, int], None]


def nobody(done: int, total: int) -> None:
    """Hear how far it is, and tell nobody."""


@dataclass(frozen=True)
class Scores:
    """What was found of the tokens of some stretches.

    Attributes
    ----------
    losses : list of float32 [labels]
        Of every token but the first of each stretch, nats.
    correct : dict
        k -> number of tokens that were among so many likeliest.
    tokens_per_sec : float
        Tokens scored a second, compiling not counted.
    """

    losses: list[NDArray[np.float32]]
    correct: dict[int, int]
    tokens_per_sec: float


def score(
    model: TrainedModel,
    stretches: Sequence[NDArray[np.int32]],
    *,
    window: int,
    stride: int,
    batch_size: int,
    told: ProgressCallback = nobody,
) -> Scores:
    """Score every token of some stretches but the first of each.

    Parameters
    ----------
    model : TrainedModel
        A decoder.
    stretches : sequence of int32 [labels + 1]
        Token ids.
    window, stride : int
        Tokens in a row, and from one row's begin to the next.
    batch_size : int
        Rows at once, over all devices; changes no result.
    told : callable
        Told the tokens that are scored so far, and all there are.
    """
    devices = model.mesh.size
    batch_size = -(-batch_size // devices) * devices
    rows = [
        row
        for number, stretch in enumerate(stretches)
        for row in cut_windows(len(stretch) - 1, window, stride, number)
    ]
    losses = [np.zeros(len(stretch) - 1, np.float32) for stretch in stretches]
    correct = np.zeros(len(TOP_K), np.int64)
    total, done = sum(len(each) for each in losses), 0
    step = _Step(model, batch_size)
    started = time.perf_counter()

    def take(batch: Sequence[Row], found: tuple[Any, Any]) -> int:
        losses_BT, correct_BK = jax.device_get(found)
        for row, of_row in zip(batch, losses_BT, strict=False):
            here = slice(row.scored - row.start, row.end - row.start)
            losses[row.stretch][row.scored : row.end] = of_row[here]
        correct[:] += correct_BK.sum(0, dtype=np.int64)
        return sum(row.end - row.scored for row in batch)

    pending: tuple[list[Row], tuple[Any, Any]] | None = None
    for length, batch in plan_batches(rows, window, batch_size):
        begun = batch, step(fill_batch(stretches, batch, batch_size, length))
        if pending is not None:  # read a batch late, so that the devices do not wait
            done += take(*pending)
            told(done, total)
        pending = begun
    assert pending is not None
    done += take(*pending)
    told(done, total)
    seconds = time.perf_counter() - started - step.compiling
    counts = dict(zip(TOP_K, correct.tolist(), strict=True))
    return Scores(losses, counts, total / seconds)


class _Step:
    """Scores batches; compiles for each shape once, and knows how long that took [s]."""

    def __init__(self, model: TrainedModel, batch_size: int) -> None:
        self._mesh, self._params = model.mesh, model.params
        rows = batch_size // model.mesh.size
        held = max(1, _LOGITS_HELD // (rows * model.gpt.vocab_rows))
        self._function = _scores_of_batch(model.gpt, model.mesh, held)
        self._shapes: set[tuple[int, ...]] = set()
        self._index, self._count = tjx_parallel.batch_process(model.mesh)
        self.compiling = 0.0

    def __call__(self, batch: dict[str, NDArray[np.int32]]) -> tuple[Any, Any]:
        share = len(batch["tokens"]) // self._count
        own = slice(self._index * share, (self._index + 1) * share)
        placed = tjx_parallel.shard_batch(
            self._mesh, {name: values[own] for name, values in batch.items()}
        )
        started = time.perf_counter()
        found: tuple[Any, Any] = self._function(self._params, **placed)
        if (shape := batch["tokens"].shape) not in self._shapes:  # it was compiled
            self._shapes.add(shape)
            self.compiling += time.perf_counter() - started
        return found


@functools.cache
def _scores_of_batch(gpt: GPTConfig, mesh: jax.sharding.Mesh, held: int) -> Any:
    """Return the jitted losses [B, T] and numbers of right guesses [B, K] of a batch.

    Logits of `held` tokens of each row are in memory at once.
    """
    layout = make_layout(gpt, mesh, tjx_parallel.ShardingRules(), MeshConfig())

    def scores(params: Any, tokens: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        network = tjx_nn.bind(gpt, params, layout=layout)
        x_BTD = network.hidden(tokens)

        def of_some(some: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x_BCD, labels_BC = some
            logits = network.logits(x_BCD)
            right_BK: jax.Array = jax.vmap(_right_of_row)(logits, labels_BC)
            return cross_entropy(logits, labels_BC, IGNORED_LABEL), right_BK

        batch, length = labels.shape
        count = -(-length // held)
        if count == 1:
            return of_some((x_BTD, labels))
        size = -(-length // count)
        wanting = count * size - length
        x_BTD = jnp.pad(x_BTD, ((0, 0), (0, wanting), (0, 0)))
        labels = jnp.pad(labels, ((0, 0), (0, wanting)), constant_values=IGNORED_LABEL)
        some = (
            jnp.moveaxis(x_BTD.reshape(batch, count, size, -1), 1, 0),
            jnp.moveaxis(labels.reshape(batch, count, size), 1, 0),
        )
        losses, right = jax.lax.map(of_some, some)
        return jnp.moveaxis(losses, 0, 1).reshape(batch, -1)[:, :length], right.sum(0)

    spec: Any = jax.sharding.PartitionSpec  # JAX gives no types
    whole = jax.sharding.NamedSharding(mesh, spec())
    return jax.jit(scores, out_shardings=whole)  # every process reads all of it


def _right_of_row(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return top_k_correct(logits, labels, TOP_K, IGNORED_LABEL)
