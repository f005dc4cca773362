"""Text: predicting the next token, or tokens that were masked."""

import functools
import lzma
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import tjx_data
import tjx_nn
from tjx_nn.gpt_config import GPTConfig
from tjx_trainer.config import Config
from tjx_trainer.run_dir import RunDirectory
from tjx_trainer.sampling import continue_prompt, longest_continuation
from tjx_trainer.step import IGNORED, Batch
from tjx_trainer.task import Opened, Put, Share


def open_text(
    config: Config, progress: tjx_data.Progress | None = None
) -> tuple[str, tjx_data.Tokenizer]:
    """Return the folder of the prepared text, made if need be, and its tokenizer.

    Raises
    ------
    tjx_data.HubError
        If the corpus or tokenizer is neither in the cache nor within reach.
    ValueError
        If the text cannot be used.
    """
    folder = tjx_data.open_or_prepare(config.data, progress=progress)
    return str(folder), tjx_data.Tokenizer.load(folder)


def open_language_modelling(config: Config, progress: tjx_data.Progress | None = None) -> Opened:
    """Open the text of a decoder; its vocabulary is the tokenizer's."""
    folder, tokenizer = open_text(config, progress)
    config = config.with_vocabulary(tokenizer.vocab_size)
    return config, lambda share: LanguageModelling(config, folder, tokenizer, share)


def open_masked_language_modelling(
    config: Config, progress: tjx_data.Progress | None = None
) -> Opened:
    """Open the text of an encoder; its vocabulary is the tokenizer's and one token, the mask."""
    folder, tokenizer = open_text(config, progress)
    config = config.with_vocabulary(tokenizer.vocab_size + 1)
    return config, lambda share: MaskedLanguageModelling(config, folder, tokenizer, share)


class LanguageModelling:
    """Predicting the token after each.

    Parameters
    ----------
    config : Config
        Resolved.
    folder : str
        The prepared text.
    tokenizer : tjx_data.Tokenizer
        The tokenizer that made it.
    share : Share
        This process's rows.
    """

    accuracies: tuple[int, ...] = ()

    def __init__(
        self, config: Config, folder: str, tokenizer: tjx_data.Tokenizer, share: Share
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.token_byte_lengths: np.ndarray | None = tokenizer.token_byte_lengths

        def loader(split: Literal["train", "validation"], batch_size: int) -> tjx_data.TokenLoader:
            return tjx_data.TokenLoader(
                folder,
                split=split,
                seq_len=config.data.seq_len,
                batch_size=batch_size,
                seed=config.seed,
                process_index=share.process_index,
                process_count=share.process_count,
                tokenizer=tokenizer,
            )

        self.train_data = loader("train", share.batch_size)
        self.validation_data = loader("validation", share.evaluation_batch_size)

    @property
    def fingerprints(self) -> dict[str, str]:
        """What a checkpoint of this run goes with."""
        return {"data": self.train_data.fingerprint, "tokenizer": self.tokenizer.fingerprint}

    @property
    def introduction(self) -> str:
        """How much text there is."""
        return (
            f"{self.train_data.n_tokens:,} tokens to train on, "
            f"{self.validation_data.n_tokens:,} held out, "
            f"vocabulary {self.tokenizer.vocab_size:,}"
        )

    def batch(self, step: int, put: Put) -> Batch:
        """Return the batch of a step."""
        return put(self.train_data.batch(step))

    def evaluation_batches(self, put: Put) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yield the validation text, or as much of it as the configuration says."""
        for batch in self.validation_data.evaluation_batches(self.config.train.eval_tokens):
            yield put(batch), batch["labels"]

    def record(self, run: RunDirectory) -> None:
        """Keep the tokenizer with the run, and where its text lies."""
        self.tokenizer.save(run.tokenizer)
        run.point_to_data(self.train_data.directory, fingerprint=self.fingerprints["data"])

    def conclusion(self, params: dict[str, Any], metrics: Mapping[str, float], /) -> list[str]:
        """Say how well the text was predicted, and let the model write some."""
        lines = [
            f"validation loss  {metrics['loss']:.4f} nats a token, "
            f"perplexity {metrics['perplexity']:.2f}",
            f"bits per byte    {metrics['bits_per_byte']:.3f} "
            f"(`xz -9` needs {self._xz_bits_per_byte():.3f} for the same text)",
        ]
        if self.config.train.sample_tokens:
            lines = ["a sample", "--------", self._sample(params), "--------", *lines]
        return lines

    def _sample(self, params: dict[str, Any]) -> str:
        config, prompt = self.config, self.config.train.sample_prompt or ""
        assert isinstance(config.model, GPTConfig)
        room = longest_continuation(config.model, self.tokenizer, prompt)
        text = continue_prompt(
            config.model,
            params,
            self.tokenizer,
            prompt,
            max_new_tokens=min(config.train.sample_tokens, room),
            temperature=config.train.sample_temperature,
            top_k=config.train.sample_top_k,
            seed=config.seed,
        )
        return prompt + text[0]

    def _xz_bits_per_byte(self) -> float:
        """Return what `xz -9` needs for the text that was evaluated, in bits a byte.

        xz sees the text once and knows nothing else; the model has seen the training text.
        """
        loader, tokenizer = self.validation_data, self.tokenizer
        n_labels = min(loader.n_tokens - 1, self.config.train.eval_tokens or loader.n_tokens)
        tokens = loader.read(1, n_labels).tolist()
        text = tokenizer.decode([token for token in tokens if token != tokenizer.eot_id]).encode()
        return 8 * len(lzma.compress(text, preset=9)) / len(text)


class MaskedLanguageModelling(LanguageModelling):
    """Predicting tokens that were masked (Devlin et al. 2018, "BERT", section 3.1)."""

    accuracies: tuple[int, ...] = (1,)

    def __init__(
        self, config: Config, folder: str, tokenizer: tjx_data.Tokenizer, share: Share
    ) -> None:
        super().__init__(config, folder, tokenizer, share)
        self.token_byte_lengths = None  # what is masked is no text by itself

    def batch(self, step: int, put: Put) -> Batch:
        """Return the batch of a step, masked anew each time that a text comes by."""
        return self._masked(super().batch(step, put), 2 * step)

    def evaluation_batches(self, put: Put) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yield the validation text, masked in the same places at every evaluation."""
        for index, (batch, next_tokens) in enumerate(super().evaluation_batches(put)):
            masked = dict(self._masked(batch, 2 * index + 1))
            # Rows beyond the end of the text are no text.
            masked["labels"] = _ignored(masked["labels"], put({"labels": next_tokens})["labels"])
            yield masked, np.asarray(jax.device_get(masked["labels"]))

    def conclusion(self, _: dict[str, Any], metrics: Mapping[str, float], /) -> list[str]:
        """Say how well the masked tokens were predicted."""
        return [
            f"validation loss  {metrics['loss']:.4f} nats a masked token",
            f"accuracy         {metrics['top1_accuracy']:.2%} of the masked tokens",
        ]

    def _masked(self, batch: Batch, draw: int) -> Batch:
        eot, sharding = self.tokenizer.eot_id, batch["tokens"].sharding
        assert isinstance(sharding, NamedSharding)
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())  # type: ignore[no-untyped-call]  # as jax is
        seed_and_draw = np.array([self.config.seed, draw], np.uint32)
        tokens, labels = _mask(
            batch["tokens"],
            jax.device_put(seed_and_draw, everywhere),
            mask_id=self.tokenizer.vocab_size,
            special_ids=() if eot is None else (eot,),
        )
        return {"tokens": tokens, "labels": labels}


@functools.partial(jax.jit, static_argnames=("mask_id", "special_ids"))
def _mask(
    tokens: jax.Array, seed_and_draw: jax.Array, *, mask_id: int, special_ids: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    key = jax.random.fold_in(jax.random.key(seed_and_draw[0]), seed_and_draw[1])
    return tjx_nn.mask_tokens(
        tokens, key, mask_id=mask_id, vocab_size=mask_id + 1, special_ids=special_ids
    )


@jax.jit
def _ignored(labels: jax.Array, next_tokens: jax.Array) -> jax.Array:
    return jnp.where(next_tokens == IGNORED, IGNORED, labels)
