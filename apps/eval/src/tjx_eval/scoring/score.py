"""Loss of every token of token sequences, computed on all devices of all processes.

Results do not depend on the batch: rows are independent, experts drop no tokens, and rows that
fill up the devices are padding without labels.

Array axes: B rows, T tokens in a row, C tokens whose logits are computed at once, n chunks of
C tokens, K values of top-k, D d_model.
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
from tjx_eval.scoring.windows import (
    Window,
    make_batch,
    plan_batches,
    sliding_windows,
)
from tjx_metrics import cross_entropy, top_k_correct
from tjx_nn.id_checks import IGNORE_INDEX
from tjx_nn.models.gpt_config import GPTConfig
from tjx_trainer.run_reader import model_layout

TOP_K = (1, 5, 10)
_MAX_LOGITS = 1 << 26  # per device at once: 256 MiB of float32

# A value in the output of a command.
Metric = float | int | str
# Called with the number of finished tokens and the total number, 0 if unknown.
ProgressCallback = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """Ignore progress."""


@dataclass(frozen=True)
class TokenLosses:
    """Losses of all tokens of several sequences.

    Attributes
    ----------
    losses : list of float32 [labels]
        Loss of every token but the first of each sequence, nats.
    correct : dict
        k -> number of tokens among the model's k highest logits.
    tokens_per_sec : float
        Scored tokens per second, excluding compilation.
    """

    losses: list[NDArray[np.float32]]
    correct: dict[int, int]
    tokens_per_sec: float


def score_tokens(
    model: TrainedModel,
    sequences: Sequence[NDArray[np.int32]],
    *,
    window: int,
    stride: int,
    batch_size: int,
    on_progress: ProgressCallback = no_progress,
) -> TokenLosses:
    """Score every token but the first of each sequence, by sliding windows.

    Parameters
    ----------
    model : TrainedModel
        A decoder.
    sequences : sequence of int32 [labels + 1]
        Token ids.
    window, stride : int
        Tokens per window, and between the starts of two windows.
    batch_size : int
        Windows per batch over all devices; does not change results.
    on_progress : callable
        Called after each batch.
    """
    devices = model.mesh.size
    batch_size = -(-batch_size // devices) * devices
    windows = [
        each
        for number, sequence in enumerate(sequences)
        for each in sliding_windows(len(sequence) - 1, window, stride, number)
    ]
    losses = [np.zeros(len(sequence) - 1, np.float32) for sequence in sequences]
    correct = np.zeros(len(TOP_K), np.int64)
    total, done = sum(len(each) for each in losses), 0
    step = _ScoringStep(model, batch_size)
    started = time.perf_counter()

    def read(batch: Sequence[Window], scores: tuple[Any, Any]) -> int:
        losses_BT, correct_BK = jax.device_get(scores)
        for window, losses_T in zip(batch, losses_BT, strict=False):
            scored = slice(window.scored - window.start, window.end - window.start)
            losses[window.sequence][window.scored : window.end] = losses_T[scored]
        correct[:] += correct_BK.sum(0, dtype=np.int64)
        return sum(window.end - window.scored for window in batch)

    pending: tuple[list[Window], tuple[Any, Any]] | None = None
    for length, batch in plan_batches(windows, window, batch_size):
        dispatched = batch, step(make_batch(sequences, batch, batch_size, length))
        if pending is not None:  # read one batch late, so that the devices do not wait
            done += read(*pending)
            on_progress(done, total)
        pending = dispatched
    assert pending is not None
    done += read(*pending)
    on_progress(done, total)
    seconds = time.perf_counter() - started - step.compile_seconds
    counts = dict(zip(TOP_K, correct.tolist(), strict=True))
    return TokenLosses(losses, counts, total / seconds)


class _ScoringStep:
    """Score batches, and measure the compilation time of each new shape in seconds."""

    def __init__(self, model: TrainedModel, batch_size: int) -> None:
        self._mesh, self._params = model.mesh, model.params
        rows = batch_size // model.mesh.size
        chunk = max(1, _MAX_LOGITS // (rows * model.gpt.vocab_rows))
        self._function = _make_scoring_function(model.gpt, model.mesh, chunk)
        self._shapes: set[tuple[int, ...]] = set()
        self._index, self._count = tjx_parallel.batch_process(model.mesh)
        self.compile_seconds = 0.0

    def __call__(self, batch: dict[str, NDArray[np.int32]]) -> tuple[Any, Any]:
        rows = len(batch["tokens"]) // self._count
        own = slice(self._index * rows, (self._index + 1) * rows)
        placed = tjx_parallel.shard_batch(
            self._mesh, {name: values[own] for name, values in batch.items()}
        )
        started = time.perf_counter()
        scores: tuple[Any, Any] = self._function(self._params, **placed)
        if (shape := batch["tokens"].shape) not in self._shapes:  # this call compiled
            self._shapes.add(shape)
            self.compile_seconds += time.perf_counter() - started
        return scores


@functools.cache
def _make_scoring_function(gpt: GPTConfig, mesh: jax.sharding.Mesh, max_chunk: int) -> Any:
    """Return the jitted function to losses [B, T] and top-k counts [B, K] of a batch.

    At most `max_chunk` tokens of each row have their logits in memory at once.
    """
    layout = model_layout(gpt, mesh)

    def score_batch(
        params: Any, tokens: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        network = tjx_nn.bind(gpt, params, layout=layout)
        x_BTD = network.hidden(tokens)

        def score_chunk(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x_BCD, labels_BC = chunk
            logits = network.logits(x_BCD)
            correct_BK: jax.Array = jax.vmap(_top_k_of_row)(logits, labels_BC)
            return cross_entropy(logits, labels_BC, IGNORE_INDEX), correct_BK

        rows, length = labels.shape
        count = -(-length // max_chunk)
        if count == 1:
            return score_chunk((x_BTD, labels))
        size = -(-length // count)
        padding = count * size - length
        x_BTD = jnp.pad(x_BTD, ((0, 0), (0, padding), (0, 0)))
        labels = jnp.pad(labels, ((0, 0), (0, padding)), constant_values=IGNORE_INDEX)
        chunks = (
            jnp.moveaxis(x_BTD.reshape(rows, count, size, -1), 1, 0),
            jnp.moveaxis(labels.reshape(rows, count, size), 1, 0),
        )
        losses_nBC, correct_nBK = jax.lax.map(score_chunk, chunks)
        losses_BT = jnp.moveaxis(losses_nBC, 0, 1).reshape(rows, -1)[:, :length]
        return losses_BT, correct_nBK.sum(0)

    spec: Any = jax.sharding.PartitionSpec  # JAX has no annotation
    replicated = jax.sharding.NamedSharding(mesh, spec())
    return jax.jit(score_batch, out_shardings=replicated)  # every process reads all rows


def _top_k_of_row(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return top_k_correct(logits, labels, TOP_K, IGNORE_INDEX)
