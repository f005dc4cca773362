"""Prompts with answers or preferences: reading, encoding, and loaders of their rows."""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

import tjx_data
from tjx_data.corpora.arithmetic import addition_problems
from tjx_data.corpora.documents import assign_split
from tjx_data.corpora.tiny_chat import question_problems
from tjx_data.loading.base import IGNORED_LABEL
from tjx_data.loading.samplers import derive_key
from tjx_trainer.config.run_config import Config
from tjx_trainer.tasks.task import DataShard

Split = Literal["train", "validation"]
_PURPOSE = int.from_bytes(b"examples")


class Example(NamedTuple):
    """A prompt with its answer, its pair of responses, or its completion.

    Attributes
    ----------
    prompt : str
        The prompt.
    texts : tuple of str
        An answer, a chosen and a rejected response, or a completion.
    label : bool or None
        Whether the completion is desirable; None for the other kinds.
    """

    prompt: str
    texts: tuple[str, ...]
    label: bool | None = None


# Keys of each line besides "prompt", and the types of their values.
KEYS: Mapping[str, Mapping[str, type]] = {
    "grpo": {"answer": str},
    "dpo": {"chosen": str, "rejected": str},
    "kto": {"completion": str, "label": bool},
}


def read_examples(config: Config) -> dict[Split, list[Example]]:
    """Return the examples of both splits; those of a file are divided by a hash of their prompt.

    Parameters
    ----------
    config : Config
        ``data.path``, else the corpus arithmetic or tiny-chat.

    Raises
    ------
    ValueError
        If a line is not a JSON object with the `KEYS` of the task, or a split is empty.
    """
    if config.data.path is None:
        splits: tuple[Split, Split] = ("train", "validation")
        problems = question_problems if config.data.corpus == "tiny-chat" else addition_problems
        return {
            split: [Example(each.prompt, (each.answer,)) for each in problems(split)]
            for split in splits
        }
    found: dict[Split, list[Example]] = {"train": [], "validation": []}
    for example in _read_lines(Path(config.data.path), KEYS[str(config.task)]):
        split = assign_split(example.prompt, config.data.holdout_fraction)
        found[split].append(example)
    for name, examples in found.items():
        if not examples:
            raise ValueError(
                f"data.path: got {config.data.path} without {name} examples; expected at least one "
                f"of data.holdout_fraction={config.data.holdout_fraction}; give more lines"
            )
    return found


def read_prompts(path: Path) -> list[Example]:
    """Return the prompts and answers of a file, in the format of the task grpo.

    Parameters
    ----------
    path : Path
        A ``.jsonl`` file.

    Raises
    ------
    ValueError
        If a line is not a JSON object with prompt and answer, or there is none.
    """
    if found := list(_read_lines(path, KEYS["grpo"])):
        return found
    raise ValueError(f"{path}: got no line; expected at least one with prompt and answer")


def _read_lines(path: Path, keys: Mapping[str, type]) -> Iterator[Example]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _parse(line, keys, f"{path}:{number}")


def _parse(line: bytes, keys: Mapping[str, type], where: str) -> Example:
    try:
        record: Any = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: got no JSON ({error}); expected an object a line") from error
    kinds = {"prompt": str, **keys}
    texts, flags = ([n for n in kinds if kinds[n] is kind] for kind in (str, bool))
    if not isinstance(record, dict) or any(
        not isinstance(record.get(name), kind) for name, kind in kinds.items()
    ):
        given = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(
            f"{where}: got {given}; expected an object with the strings {', '.join(texts)}"
            f"{''.join(f' and true or false as {name}' for name in flags)}; correct the line"
        )
    label = record[flags[0]] if flags else None
    return Example(record["prompt"], tuple(record[name] for name in texts[1:]), label)


def encode_row(
    tokenizer: tjx_data.Tokenizer, prompt: Sequence[int], text: str, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and labels, int32 [length], of a prompt and a response with its end.

    Labels of the prompt and of padding are -100.

    Raises
    ------
    ValueError
        If the row is longer than `length`.
    """
    end = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
    return make_row(prompt, [*tokenizer.encode(text), *end], length)


def make_row(
    prompt: Sequence[int], response: Sequence[int], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and labels of an encoded prompt and response, as `encode_row`."""
    ids = [*prompt, *response]
    if len(ids) - 1 > length:
        raise ValueError(
            f"data.seq_len: got {length}; expected at least {len(ids) - 1}, the tokens of a prompt "
            "and its response; give a longer --data.seq_len or shorter examples"
        )
    tokens, labels = np.zeros(length, np.int32), np.full(length, IGNORED_LABEL, np.int32)
    tokens[: len(ids) - 1] = ids[:-1]
    labels[len(prompt) - 1 : len(ids) - 1] = response
    return tokens, labels


class ExampleLoader(tjx_data.Loader):
    """Indices of examples, shuffled anew in each epoch; a pure function of (seed, step).

    Parameters
    ----------
    examples : sequence of Example
        All examples of the split.
    validation_rows : list of (tokens, labels)
        Rows that `evaluation_batches` yields; may be empty.
    facts : mapping of str to str
        What else determines the rows, such as the tokenizer.
    batch_size, seed, process_index, process_count
        As of `tjx_data.Loader`.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        validation_rows: list[tuple[np.ndarray, np.ndarray]],
        facts: Mapping[str, str],
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
        )
        self.examples, self._rows, self._facts = examples, validation_rows, facts

    @functools.cached_property
    def _digest(self) -> str:
        # Without label as before there was one, so that older runs resume.
        values = [each[: 2 if each.label is None else 3] for each in self.examples]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    @property
    def identity(self) -> Mapping[str, str]:
        """Hash of the examples, and the settings that determine the rows."""
        return {"examples": self._digest, "seed": str(self.seed), **self._facts}

    @functools.lru_cache(maxsize=2)  # noqa: B019  as long-lived as the run
    def _order(self, epoch: int) -> np.ndarray:
        key = int(derive_key(self.seed, _PURPOSE, epoch))
        return np.random.Generator(np.random.Philox(key)).permutation(len(self.examples))

    def rows(self, row_indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return ``example`` int64 [R]: the index of the example of each row."""
        epochs, places = np.divmod(row_indices, len(self.examples))
        pairs = zip(epochs.tolist(), places.tolist(), strict=True)
        return {
            "example": np.array([self._order(epoch)[place] for epoch, place in pairs], np.int64)
        }

    def evaluation_batches(self, limit: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """Yield the validation rows once, up to `limit` tokens, in batches of one shape."""
        rows = self._rows
        if limit is not None and rows:
            rows = rows[: max(1, limit // len(rows[0][0]))]
        for first in range(0, len(rows), self.batch_size):
            part = rows[first : first + self.batch_size]
            padding = [(part[0][0], np.full_like(part[0][1], IGNORED_LABEL))]
            part = part + padding * (self.batch_size - len(part))
            local = [part[row] for row in self._local_rows]
            yield {
                "tokens": np.stack([t for t, _ in local]),
                "labels": np.stack([y for _, y in local]),
            }


def make_example_loaders(
    examples: Mapping[Split, list[Example]],
    rows: list[tuple[np.ndarray, np.ndarray]],
    facts: Mapping[str, str],
    share: DataShard,
    *,
    batch_size: int,
    seed: int,
) -> tuple[ExampleLoader, ExampleLoader]:
    """Return the loaders of both splits; `rows` are those of the validation split.

    Every process reads all training examples of a step: means and groups are of the whole batch.
    """
    return (
        ExampleLoader(examples["train"], [], facts, batch_size=batch_size, seed=seed),
        ExampleLoader(
            examples["validation"],
            rows,
            facts,
            batch_size=share.evaluation_batch_size,
            seed=seed,
            process_index=share.process_index,
            process_count=share.process_count,
        ),
    )
