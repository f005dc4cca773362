"""Prompts: checked, padded to a bucket of lengths, and read into a cache.

A prompt is the beginning of the sequence that is to be continued; an encoder-decoder's is the
beginning of the target, and there is a source.

Axes in names: B batch, T time, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float32, Int

from tjx_nn.attention import kv_cache as caches
from tjx_nn.functional import Params
from tjx_nn.generation.sampling import stop_tokens
from tjx_nn.models.encoder_decoder import EncoderDecoder
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig
from tjx_nn.models.gpt import GPT
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.sub_configs import raise_problems
from tjx_nn.tokens import Ids, Mask, check_ids

# What writes: their configurations, and the models.
GenerativeConfig = GPTConfig | EncoderDecoderConfig
GenerativeModel = GPT | EncoderDecoder

Lengths = Int[Array | np.ndarray, " B"]

# Shorter prompts and continuations share one compiled program.
_SMALLEST_BUCKET = 16


class Prompt(NamedTuple):
    """The prompts of a batch, padded.

    Attributes
    ----------
    tokens
        int32 [batch, bucket]; 0 beyond a row's length.
    lengths
        Tokens of each row, int32 [batch].
    source, source_mask
        The source of an encoder-decoder, int32 [batch, bucket], and bool, False where it is
        padding; None for GPT.
    """

    tokens: Int[Array, "B T"]
    lengths: Int[Array, " B"]
    source: Int[Array, "B S"] | None = None
    source_mask: Bool[Array, "B S"] | None = None


class PromptOptions(TypedDict, total=False):
    """What there is to be written, beside the prompt.

    Attributes
    ----------
    stop_token
        A row ends with this token, or with any of these; the rest of it is filled with the same.
    source, source_mask
        Token ids that an encoder-decoder reads, and True or 1 where they are no padding; without a
        mask none is.
    """

    stop_token: int | Sequence[int] | None
    source: Ids | None
    source_mask: Mask | None


def check_option_names(given: Mapping[str, Any], known: type) -> None:
    """Raise TypeError for names that a TypedDict does not have."""
    names = known.__annotations__
    if unknown := [name for name in given if name not in names]:
        raise TypeError(f"unexpected arguments {unknown}: there are {list(names)}")


def make_prompt(
    config: GenerativeConfig,
    prompt: Ids,
    prompt_lengths: Lengths,
    max_new_tokens: int,
    task: PromptOptions,
    problems: list[str],
) -> Prompt:
    """Return the prompts as NumPy arrays of a bucket's length.

    Raises
    ------
    ValueError
        Naming everything that is wrong, before the `problems` of other arguments.
    """
    tokens, lengths, source, mask = jax.device_get(
        (prompt, prompt_lengths, task.get("source"), task.get("source_mask"))
    )
    if source is not None and mask is None:
        mask = np.ones(source.shape, bool)
    found = [
        *_wrong_prompt(config, tokens, lengths, max_new_tokens, task.get("stop_token")),
        *_wrong_source(config, len(tokens), source, mask),
    ]
    raise_problems([*found, *problems])
    longest = int(lengths.max(initial=1))
    used = np.arange(tokens.shape[1]) < lengths[:, None]
    check_ids("prompt ids", tokens[used], config.vocab_size, "vocab_size")
    padded: Any = _padded(config, tokens[:, :longest], used[:, :longest])
    counts: Any = lengths.astype(np.int32)
    if source is None:
        return Prompt(padded, counts)
    assert isinstance(config, EncoderDecoderConfig)
    check_ids("source ids", source[mask != 0], config.source_vocab, "source_vocab_size")
    sources: tuple[Any, Any] = _padded(config, source, mask != 0), _padded(config, mask != 0)
    return Prompt(padded, counts, *sources)


def read_prompt(
    model: GenerativeModel, blocks: list[Any], prompt: Prompt, slots: int, new: int = 1
) -> tuple[Float32[Array, "B V"], list[Any]]:
    """Return the logits after each row's last token, and a cache; inside `jax.jit`.

    Parameters
    ----------
    model, blocks
        The model, and its `unstacked_blocks()`.
    prompt
        The prompts.
    slots
        Tokens, with the prompt's, that there must be room for.
    new
        Tokens that are decoded at once.
    """
    kept: list[Any]
    if isinstance(model, EncoderDecoder):
        assert prompt.source is not None
        memory = model.encode(prompt.source, source_mask=prompt.source_mask)
        hidden_BTD, kept = model.prefill(blocks, prompt.tokens, memory, prompt.source_mask)
    else:
        hidden_BTD, kept = model.prefill(blocks, prompt.tokens)
    sizes = caches.cache_slots(model.config, slots, new)
    cache = [
        caches.prefill_cache(entries, prompt.lengths, size)
        for entries, size in zip(kept, sizes, strict=True)
    ]
    last_B11 = prompt.lengths[:, None, None] - 1
    return model.logits(jnp.take_along_axis(hidden_BTD, last_B11, axis=1))[:, 0], cache


def bucket(length: int) -> int:
    """Return the power of two, not too small, that a length is rounded up to."""
    return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def input_sharding(params: Params) -> jax.sharding.Sharding | None:
    """Return where inputs go: whole onto every device that holds parameters."""
    leaf = jax.tree.leaves(params)[0]
    if not isinstance(leaf, jax.Array):
        return None  # NumPy arrays go where JAX puts everything
    if isinstance(leaf.sharding, NamedSharding):
        whole = PartitionSpec()  # type: ignore[no-untyped-call]  # as jax is
        return NamedSharding(leaf.sharding.mesh, whole)
    return leaf.sharding


def params_platform(params: Params) -> str:
    """Return the platform of the device that computes with these parameters."""
    leaf = jax.tree.leaves(params)[0]
    return (
        next(iter(leaf.devices())).platform
        if isinstance(leaf, jax.Array)
        else jax.default_backend()
    )


def _padded(config: GenerativeConfig, x: np.ndarray, used: np.ndarray | None = None) -> np.ndarray:
    """Pad rows to a bucket with zeros, which also stand where `used` is False."""
    columns = max(min(bucket(x.shape[1]), config.max_seq_len), x.shape[1])
    out = np.zeros((len(x), columns), bool if x.dtype == bool else np.int32)
    out[:, : x.shape[1]] = x if used is None else np.where(used, x, 0)
    return out


def _wrong_prompt(
    config: GenerativeConfig,
    tokens: np.ndarray,
    lengths: np.ndarray,
    new: int,
    stop_token: int | Sequence[int] | None,
) -> list[str]:
    problems = []
    columns, longest = tokens.shape[1], int(lengths.max(initial=1))
    if len(lengths) != len(tokens):
        problems.append(
            f"prompt has {len(tokens)} rows and prompt_lengths {len(lengths)}: give one for each"
        )
    if lengths.min(initial=1) < 1 or (len(lengths) and longest > columns):
        problems.append(
            f"prompt_lengths are from {lengths.min()} to {longest} and prompt has {columns} "
            f"columns: give lengths from 1 to {columns}"
        )
    if new < 0:
        problems.append(f"max_new_tokens is {new}: give 0 or more")
    elif longest + new > config.max_seq_len:
        problems.append(
            f"the longest prompt has {longest} tokens, max_new_tokens is {new} and "
            f"max_seq_len is {config.max_seq_len}: together they must not exceed max_seq_len"
        )
    stops = stop_tokens(stop_token).tolist()
    if wrong := [stop for stop in stops if not 0 <= stop < config.vocab_size]:
        problems.append(
            f"stop_token is {wrong} and vocab_size is {config.vocab_size}: give ids from 0 to "
            f"{config.vocab_size - 1}"
        )
    return problems


def _wrong_source(
    config: GenerativeConfig, rows: int, source: np.ndarray | None, mask: np.ndarray | None
) -> list[str]:
    if not isinstance(config, EncoderDecoderConfig):
        if source is None and mask is None:
            return []
        return ["source or source_mask is given and the model has no encoder: leave them out"]
    if source is None:
        return ["source is None and the model is an encoder-decoder: give the ids that it reads"]
    assert mask is not None
    problems = []
    if len(source) != rows or mask.shape != source.shape:
        problems.append(
            f"prompt has {rows} rows, source is {list(source.shape)} and source_mask "
            f"{list(mask.shape)}: give a row for each prompt, and a mask of the source's shape"
        )
    if source.shape[1] > config.max_seq_len:
        problems.append(
            f"source has {source.shape[1]} tokens and max_seq_len is {config.max_seq_len}: "
            "give a shorter source"
        )
    return problems
