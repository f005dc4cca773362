"""Mappings between transformers models and tjx models: config fields and tensors of a family.

Loading and saving use the same mappings. A tensor mapping applies if the tjx model has the
parameter, so that one table serves models with and without biases or a tied head.

A family is a `ModelFamily`; `tjx_nn.hf.register` adds one from another package.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tjx_nn.config import TransformerConfig

Json = Mapping[str, Any]

# Upper bounds of sizes and depths in config.json, so that a malformed file cannot cause long loops.
LARGEST_SIZE = 1 << 24
MOST_LAYERS = 4096

# transformers names of MLP activations; saving uses the first of several.
PLAIN_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu_erf",
    "relu": "relu",
    "relu2": "relu2",
}


# Keys of any config.json that do not change the computation: files, tokens, outputs, training,
# heads of other tasks, and the options of text generation that old versions stored.
UNUSED_KEYS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_flash_attn_2_enabled",
    "_name_or_path", "architectures", "attn_implementation", "auto_map", "bad_words_ids",
    "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "classifier_dropout",
    "cls_token_id", "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty",
    "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "gradient_checkpointing", "id2label", "is_encoder_decoder", "label2id",
    "length_penalty", "max_length", "min_length", "model_type", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_labels", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_past", "output_scores", "pad_token_id", "prefix",
    "pretraining_tp", "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params",
    "temperature", "tf_legacy_loss", "tokenizer_class", "top_k", "top_p", "torch_dtype",
    "torchscript", "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version",
    "use_bfloat16", "use_cache",
})  # fmt: skip
# Keys of any config.json with the only supported value.
REQUIRED_VALUES: Json = {
    "quantization_config": None, "pruned_heads": {}, "tie_encoder_decoder": False,
}  # fmt: skip

Shape = tuple[int, ...]


class TensorTransform(NamedTuple):
    """Conversion between a transformers tensor and the tjx parameters that it contains.

    Attributes
    ----------
    read
        Converts the tensor to the parameters.
    write
        Converts the parameters to the tensor.
    shape
        Computes the shape of the tensor from those of the parameters, without allocating it: a
        malformed config.json can describe tensors larger than memory.
    """

    read: Callable[[np.ndarray], Sequence[np.ndarray]]
    write: Callable[[Sequence[np.ndarray]], np.ndarray]
    shape: Callable[[Sequence[Shape]], Shape]


IDENTITY = TensorTransform(lambda x: [x], lambda parts: parts[0], lambda shapes: shapes[0])
# PyTorch linear layers have kernels [out, in].
TRANSPOSED = TensorTransform(
    lambda x: [x.T], lambda parts: parts[0].T, lambda shapes: shapes[0][::-1]
)


def concatenated(count: int) -> TensorTransform:
    """Concatenate parameters of equal size along the last axis (fused QKV)."""
    return TensorTransform(
        lambda x: np.split(x, count, axis=-1),
        lambda parts: np.concatenate(parts, -1),
        lambda shapes: (*shapes[0][:-1], sum(shape[-1] for shape in shapes)),
    )


def interleaved(count: int) -> TensorTransform:
    """Interleave parameters of equal size along the last axis."""
    return TensorTransform(
        lambda x: [x[..., i::count] for i in range(count)],
        lambda parts: np.stack(parts, -1).reshape(*parts[0].shape[:-1], -1),
        lambda shapes: (*shapes[0][:-1], sum(shape[-1] for shape in shapes)),
    )


def fused_linear(sizes: Sequence[int]) -> TensorTransform:
    """Concatenate the outputs of linear layers: kernels [in, size], stored [sum of sizes, in]."""
    borders = np.cumsum(sizes)[:-1]
    return TensorTransform(
        lambda x: np.split(x.T, borders, axis=-1),
        lambda parts: np.concatenate(parts, -1).T,
        lambda shapes: (sum(shape[-1] for shape in shapes), *shapes[0][-2::-1]),
    )


def offset_rows(count: int) -> TensorTransform:
    """Prepend unused rows to a table."""

    def write(parts: Sequence[np.ndarray]) -> np.ndarray:
        (x,) = parts
        return np.concatenate([np.zeros((count, *x.shape[1:]), x.dtype), x])

    return TensorTransform(
        lambda x: [x[count:]], write, lambda shapes: (shapes[0][0] + count, *shapes[0][1:])
    )


def leading_axes(count: int) -> TensorTransform:
    """Prepend axes of size 1."""
    return TensorTransform(
        lambda x: [x.reshape(x.shape[count:])],
        lambda parts: parts[0].reshape(*[1] * count, *parts[0].shape),
        lambda shapes: (*[1] * count, *shapes[0]),
    )


class TensorMapping(NamedTuple):
    """Mapping of a transformers tensor to the tjx parameters that it contains.

    Attributes
    ----------
    params
        Dotted paths of the parameters; stacked ones have a leading axis "layers".
    tensor
        Name of the tensor, with "{layer}" if each layer has one, and "{expert}" if each expert has
        one.
    transform
        Conversion between them.
    """

    params: tuple[str, ...]
    tensor: str
    transform: TensorTransform = IDENTITY


def tensor(param: str, tensor: str, transform: TensorTransform = IDENTITY) -> list[TensorMapping]:
    """Map a single parameter."""
    return [TensorMapping((param,), tensor, transform)]


def linear(param: str, tensor: str) -> list[TensorMapping]:
    """Map a linear layer: kernel and bias."""
    return [
        TensorMapping((f"{param}.kernel",), f"{tensor}.weight", TRANSPOSED),
        TensorMapping((f"{param}.bias",), f"{tensor}.bias"),
    ]


def norm(param: str, tensor: str) -> list[TensorMapping]:
    """Map a norm: scale and bias."""
    return [
        TensorMapping((f"{param}.scale",), f"{tensor}.weight"),
        TensorMapping((f"{param}.bias",), f"{tensor}.bias"),
    ]


class FieldMapping(NamedTuple):
    """Mapping of a tjx configuration field to keys of config.json.

    Attributes
    ----------
    field
        Name of the tjx field; of a nested configuration with a dot, such as "experts.count".
    keys
        Keys of config.json, which must all have the same value.
    default
        Value of a missing key.
    values
        tjx value of each transformers value; None if they are equal.
    """

    field: str
    keys: tuple[str, ...]
    default: Any
    values: Mapping[str, str] | None = None


def same(field: str, key: str, default: Any) -> FieldMapping:
    """Map a field whose values are equal in both configurations."""
    return FieldMapping(field, (key,), default)


@dataclass(frozen=True, kw_only=True)
class ComputedFields:
    """Conversion of tjx configuration fields that do not correspond to one key of config.json.

    Attributes
    ----------
    keys
        Keys of config.json that `read` uses.
    read
        Computes tjx fields from config.json.
    write
        Computes entries of config.json from the tjx configuration.
    """

    keys: Sequence[str] = ()
    read: Callable[[Json], dict[str, Any]] = lambda _: {}
    write: Callable[[Any], dict[str, Any]] = lambda _: {}


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """Description of a family of transformers models.

    Attributes
    ----------
    model_type, architecture
        Identification of the family in config.json.
    config
        tjx configuration class.
    constants
        tjx fields with the same value for all models of the family.
    fields
        Mappings of tjx fields to keys of config.json.
    computed
        Conversions of further fields, such as `tjx_nn.hf.rope.rope`.
    features
        Keys of config.json for features that tjx lacks, with the only supported value, which is
        also the default.
    legacy
        As features, of keys that current transformers versions do not write; `save` omits them.
    unused_keys
        Keys of config.json that do not change the computation, besides `UNUSED_KEYS`. Every other
        key that the family does not list raises.
    aliases
        Old keys of config.json and the current ones.
    fills
        tjx fields to set before saving: the family always has biases (saved as zeros), and never
        padding rows of tables.
    tensors
        Returns the tensor mappings of a tjx configuration.
    tied
        Names of tensors that some checkpoints store twice, with the tensor that they must equal;
        used if no mapping contains them.
    untied_head
        Name of the tensor of the output head, if this tensor decides `tied_head` and not
        config.json: a head with other values than the tied tensor is untied. None: config.json.
    ignored
        Patterns of tensor names that are not weights of the model.
    renamed
        Patterns of old tensor names and their replacements.
    """

    model_type: str
    architecture: str
    config: type[TransformerConfig]
    constants: Mapping[str, Any]
    fields: Sequence[FieldMapping]
    computed: Sequence[ComputedFields] = ()
    features: Mapping[str, Any] = field(default_factory=dict)
    legacy: Mapping[str, Any] = field(default_factory=dict)
    unused_keys: Sequence[str] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    fills: Mapping[str, Any] = field(default_factory=dict)
    tensors: Callable[[Any], Sequence[TensorMapping]]
    tied: Mapping[str, str] = field(default_factory=dict)
    untied_head: str | None = None
    ignored: Sequence[str] = ()
    renamed: Sequence[tuple[str, str]] = ()
