"""Prompts of generation: validation, padding to buckets of lengths, and prefill of the KV cache.

The prompt of an encoder-decoder is the beginning of the target, in addition to the source.

Axes in names: B batch, T time, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float32, Int

from tjx_nn.attention.kv_cache import cache_slots, prefill_cache, quantize_cache
from tjx_nn.binding import Params
from tjx_nn.generation.sampling import stop_tokens
from tjx_nn.id_checks import check_ids
from tjx_nn.inputs import Ids, Mask
from tjx_nn.models.encoder_decoder import EncoderDecoder
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig
from tjx_nn.models.gpt import GPT
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.problems import raise_problems

# Models that generate text, and their configurations.
GenerativeConfig = GPTConfig | EncoderDecoderConfig
GenerativeModel = GPT | EncoderDecoder

Lengths = Int[Array | np.ndarray, " B"]

# Smallest bucket: shorter prompts and continuations share a compiled program.
_MIN_BUCKET = 16


class Prompt(NamedTuple):
    """Padded prompts of a batch.

    Attributes
    ----------
    tokens
        Token ids, int32 [batch, bucket]; padding is 0.
    lengths
        Number of tokens of each row, int32 [batch].
    source, source_mask
        Source of an encoder-decoder, int32 [batch, bucket], and its padding mask, bool, False for
        padding; None for GPT.
    """

    tokens: Int[Array, "B T"]
    lengths: Int[Array, " B"]
    source: Int[Array, "B S"] | None = None
    source_mask: Bool[Array, "B S"] | None = None


class PromptOptions(TypedDict, total=False):
    """Options of generation besides sampling.

    Attributes
    ----------
    stop_token
        Token, or any of several tokens, that ends a row; the rest of the row repeats it.
    source, source_mask
        Source token ids of an encoder-decoder and their padding mask (True or 1 for real tokens);
        None is no padding.
    """

    stop_token: int | Sequence[int] | None
    source: Ids | None
    source_mask: Mask | None


def check_option_names(given: Mapping[str, Any], known: type) -> None:
    """Raise TypeError for keyword arguments that the TypedDict `known` does not define."""
    names = known.__annotations__
    if unknown := [name for name in given if name not in names]:
        raise TypeError(f"got unexpected keyword arguments {unknown}; expected {list(names)}")


def make_prompt(
    config: GenerativeConfig,
    prompt: Ids,
    prompt_lengths: Lengths,
    max_new_tokens: int,
    task: PromptOptions,
    problems: list[str],
    columns: int = 1,
) -> Prompt:
    """Validate prompts and pad them to the bucket of at least `columns` tokens, as NumPy arrays.

    Raises
    ------
    ValueError
        With a line for each error, followed by the `problems` of other arguments.
    """
    tokens, lengths, source, mask = jax.device_get(
        (prompt, prompt_lengths, task.get("source"), task.get("source_mask"))
    )
    if source is not None and mask is None:
        mask = np.ones(source.shape, bool)
    own_problems = [
        *_check_prompt(config, tokens, lengths, max_new_tokens, task.get("stop_token")),
        *_check_source(config, len(tokens), source, mask),
    ]
    raise_problems([*own_problems, *problems])
    longest = max(int(lengths.max(initial=1)), min(columns, tokens.shape[1]))
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
    """Prefill the KV cache with prompts, inside of `jax.jit`.

    Parameters
    ----------
    model, blocks
        Model and its `unstacked_blocks()`.
    prompt
        Padded prompts.
    slots
        Cache slots of a block without a window, for prompt and continuation.
    new
        Largest number of tokens of a decoding step.

    Returns
    -------
    logits
        Logits of the first new token of each row.
    cache
        KV cache of each block.
    """
    entries: list[Any]
    if isinstance(model, EncoderDecoder):
        assert prompt.source is not None
        encoded = model.encode(prompt.source, source_mask=prompt.source_mask)
        hidden_BTD, entries = model.prefill(blocks, prompt.tokens, encoded, prompt.source_mask)
    else:
        hidden_BTD, entries = model.prefill(blocks, prompt.tokens)
    if model.config.kv_cache_dtype == "int8":
        entries = [quantize_cache(each) for each in entries]
    sizes = cache_slots(model.config, slots, new)
    cache = [
        prefill_cache(each, prompt.lengths, size) for each, size in zip(entries, sizes, strict=True)
    ]
    last_B11 = prompt.lengths[:, None, None] - 1
    return model.logits(jnp.take_along_axis(hidden_BTD, last_B11, axis=1))[:, 0], cache


def bucket(length: int) -> int:
    """Round a length up to a power of two, at least 16."""
    return max(_MIN_BUCKET, 1 << (length - 1).bit_length())


def input_sharding(params: Params | NamedSharding) -> jax.sharding.Sharding | None:
    """Return the sharding of inputs: replicated over all devices of the parameters."""
    leaf = jax.tree.leaves(params)[0]
    sharding = leaf.sharding if isinstance(leaf, jax.Array) else leaf
    if isinstance(sharding, NamedSharding):
        whole = PartitionSpec()  # type: ignore[no-untyped-call]  # as jax is
        return NamedSharding(sharding.mesh, whole)
    return sharding if isinstance(leaf, jax.Array) else None  # NumPy arrays: the default device


def row_shards(sharding: NamedSharding) -> int:
    """Return the number of parts into which a sharding divides rows."""
    axes = sharding.spec[0] if len(sharding.spec) else None
    names = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
    return math.prod(sharding.mesh.shape[name] for name in names)


def put_on_devices[T](inputs: T, shardings: T | None) -> T:
    """Transfer inputs, which are the same in all processes, to the devices of their shardings.

    Parameters
    ----------
    inputs
        Tree of NumPy arrays and PRNG keys.
    shardings
        Their shardings, a prefix of the tree; None is the default device.
    """

    def put(x: Any, sharding: jax.sharding.Sharding) -> Any:
        if sharding.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
            return jax.device_put(x, sharding)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(x), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        host = np.asarray(jax.device_get(x))
        # `jax.device_put` would compare the arrays of all processes each time.
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    placed: T
    if shardings is None:
        placed = jax.device_put(inputs)
        return placed
    with jax.transfer_guard_host_to_device("allow"):  # intended transfers
        placed = jax.tree.map(put, inputs, jax.tree.broadcast(shardings, inputs))
    return placed


def params_platform(params: Any) -> str:
    """Return the platform of the devices of parameters, or of weights made from them."""
    leaf = jax.tree.leaves(params)[0]
    return (
        next(iter(leaf.devices())).platform
        if isinstance(leaf, jax.Array)
        else jax.default_backend()
    )


def _padded(config: GenerativeConfig, x: np.ndarray, used: np.ndarray | None = None) -> np.ndarray:
    """Pad rows to a bucket with zeros; entries with `used` False become 0 too."""
    columns = max(min(bucket(x.shape[1]), config.max_seq_len), x.shape[1])
    out = np.zeros((len(x), columns), bool if x.dtype == bool else np.int32)
    out[:, : x.shape[1]] = x if used is None else np.where(used, x, 0)
    return out


def _check_prompt(
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
            f"prompt_lengths: got {len(lengths)}; expected one for each of the {len(tokens)} rows "
            "of prompt"
        )
    if lengths.min(initial=1) < 1 or (len(lengths) and longest > columns):
        problems.append(
            f"prompt_lengths: got values from {lengths.min()} to {longest}; expected 1 to "
            f"{columns}, the number of columns of prompt"
        )
    if new < 0:
        problems.append(f"max_new_tokens: got {new}; expected at least 0")
    elif longest + new > config.max_seq_len:
        problems.append(
            f"max_new_tokens: got {new} after a prompt of {longest} tokens; expected a sum of at "
            f"most max_seq_len {config.max_seq_len}; shorten the prompt or generate fewer tokens"
        )
    stops = stop_tokens(stop_token).tolist()
    if wrong := [stop for stop in stops if not 0 <= stop < config.vocab_size]:
        problems.append(
            f"stop_token: got {wrong}; expected ids from 0 to {config.vocab_size - 1}, as "
            f"vocab_size is {config.vocab_size}"
        )
    return problems


def _check_source(
    config: GenerativeConfig, rows: int, source: np.ndarray | None, mask: np.ndarray | None
) -> list[str]:
    if not isinstance(config, EncoderDecoderConfig):
        if source is None and mask is None:
            return []
        return ["source: got a source for a model without an encoder; expected None; omit it"]
    if source is None:
        return ["source: got None for an encoder-decoder; expected source token ids; give them"]
    assert mask is not None
    problems = []
    if len(source) != rows or mask.shape != source.shape:
        problems.append(
            f"source: got shape {list(source.shape)} with a mask of shape {list(mask.shape)}; "
            f"expected a row for each of the {rows} prompts, and a mask of the same shape"
        )
    if source.shape[1] > config.max_seq_len:
        problems.append(
            f"source: got {source.shape[1]} tokens; expected at most max_seq_len "
            f"{config.max_seq_len}; shorten the source"
        )
    return problems
