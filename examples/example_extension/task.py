"""A task: rows of ids that count up from a random start."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

import tjx_data
from tjx_trainer.config.run_config import Config
from tjx_trainer.extensions import register_task
from tjx_trainer.tasks.base_task import LoaderTask, make_loaders
from tjx_trainer.tasks.task import DataShard, OpenedTask

EVALUATION_BATCHES = 2


class CountingLoader(tjx_data.Loader):
    """Rows of consecutive ids; each row is a function of the seed and its index."""

    def __init__(self, *, vocab_size: int, seq_len: int, split: str, **batching: Any) -> None:
        super().__init__(**batching)
        self.vocab_size, self.seq_len, self.split = vocab_size, seq_len, split

    @property
    def identity(self) -> Mapping[str, str]:
        """Everything that determines a row; a run resumes only with equal data."""
        return {"rows": f"{self.split}, {self.seq_len} of {self.vocab_size}, seed {self.seed}"}

    def rows(self, row_indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return tokens and labels, int32 [rows, seq_len]: the arguments of the model's losses."""
        offset = {"train": 0, "validation": 1}[self.split]
        starts = [np.random.default_rng((self.seed, offset, int(i))).integers(2**31)
                  for i in row_indices]  # fmt: skip
        counted = (np.array(starts)[:, None] + np.arange(self.seq_len + 1)) % self.vocab_size
        counted = counted.astype(np.int32)
        return {"tokens": counted[:, :-1], "labels": counted[:, 1:]}

    def evaluation_batches(self, limit: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """Yield the split once; `limit` is a number of batches."""
        yield from map(self.batch, range(min(limit or EVALUATION_BATCHES, EVALUATION_BATCHES)))


class CountingTask(LoaderTask[CountingLoader]):
    """Prediction of the next id."""

    def __init__(self, config: Config, shard: DataShard) -> None:
        model: Any = config.model
        open_split = functools.partial(
            CountingLoader, vocab_size=model.vocab_size, seq_len=config.data.seq_len
        )
        super().__init__(*make_loaders(open_split, config.seed, shard), eval_limit=None)

    @property
    def data_summary(self) -> str:
        """Line about the data in the log."""
        return f"rows that count to {self.train_data.vocab_size}"

    def final_report(self, _: dict[str, Any], metrics: Mapping[str, float], /) -> list[str]:
        """Lines that the trainer prints after the last step."""
        return [f"counting loss    {metrics['loss']:.4f} nats an id"]


def open_counting(config: Config, _: tjx_data.Progress | None = None) -> OpenedTask:
    """Return the configuration, and the function that makes the task of a process's rows."""
    return config, lambda shard: CountingTask(config, shard)


register_task(__name__, open_counting)
