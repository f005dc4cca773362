"""Export a decoder to a GGUF file, for llama.cpp and Ollama."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import BinaryIO, NamedTuple

import numpy as np

from tjx_eval.errors import EvalError
from tjx_eval.export.gguf_file import BLOCK, Dtype, Tensor, Value, write_gguf
from tjx_eval.export.gguf_tokenizer import tokenizer_metadata
from tjx_eval.load_model import TrainedModel
from tjx_nn import GPTConfig
from tjx_nn.hf.convert_params import write_params
from tjx_nn.hf.family import ModelFamily
from tjx_nn.hf.load_save import family_for
from tjx_nn.layers.position_encoding import rope_frequencies
from tjx_nn.problems import InvalidConfigError


class _Architecture(NamedTuple):
    """Options that an architecture of llama.cpp supports."""

    activation: str
    scalings: tuple[str, ...]


# By name, which is also the model_type of Transformers.
_ARCHITECTURES = {
    "llama": _Architecture("swiglu", ("none", "linear", "llama3")),
    "qwen2": _Architecture("swiglu", ("none", "linear")),
    "qwen3": _Architecture("swiglu", ("none", "linear")),
    "gpt2": _Architecture("gelu_tanh", ("none",)),
}
# Name in llama.cpp of each module of Transformers.
_MODULES = {
    "model.embed_tokens": "token_embd", "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "model.norm": "output_norm", "transformer.ln_f": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm", "ln_1": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "ln_2": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "attn.c_attn": "attn_qkv",
    "self_attn.o_proj": "attn_output", "attn.c_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.c_fc": "ffn_up",
    "mlp.down_proj": "ffn_down", "mlp.c_proj": "ffn_down",
}  # fmt: skip
_TENSOR_NAME = re.compile(r"(?:(?:model\.layers|transformer\.h)\.(\d+)\.)?(.+)\.(weight|bias)")
# Kernels of GPT-2 are stored as [in, out].
_CONV1D = re.compile(r"\.c_\w+\.weight$")
# Features that the architecture llama rotates.
_ROTATED = re.compile(r"\.attn_([qk])\.")
_FILE_TYPES: dict[Dtype, int] = {"f32": 0, "f16": 1, "q8_0": 7}
_QUANTIZATION_VERSION = 2
# Factors of the wavelengths of RoPE, of all blocks.
_ROPE_FACTORS = "rope_freqs.weight"


def export_gguf(model: TrainedModel, file: BinaryIO, *, dtype: Dtype) -> str:
    """Write a decoder, its tokenizer and its chat template.

    Matrices have the dtype; vectors and position embeddings are float32, and matrices whose rows
    are no multiple of 32 are float16 instead of q8_0. The host holds one tensor at a time.

    Parameters
    ----------
    model : TrainedModel
        A decoder.
    file : BinaryIO
        Empty file.
    dtype : {"f32", "f16", "q8_0"}
        Dtype of matrices.

    Returns
    -------
    str
        Name of the architecture in llama.cpp.

    Raises
    ------
    EvalError
        If llama.cpp has no such model or tokenizer, or a value overflows the dtype; the message
        lists what is not supported.
    """
    family, config = find_architecture(model.gpt)
    template = model.chat_template() if model.has_chat_template else None
    metadata: dict[str, Value] = {
        "general.architecture": family.model_type,
        "general.name": model.path.resolve().name,
        "general.file_type": _FILE_TYPES[dtype],
        "general.quantization_version": _QUANTIZATION_VERSION,
        **_model_metadata(family.model_type, config),
        **tokenizer_metadata(model.tokenizer, config.vocab_size, template),
    }
    try:
        shapes, read = write_params(family, model.gpt, config, model.params)
        tensors, values = _tensors(family.model_type, config, shapes, read, dtype)
        write_gguf(file, metadata, tensors, values)
    except ValueError as error:
        raise EvalError(" ".join(str(error).split())) from error
    return family.model_type


def find_architecture(config: GPTConfig) -> tuple[ModelFamily, GPTConfig]:
    """Return the architecture of llama.cpp as a Transformers family, and its configuration.

    Raises
    ------
    EvalError
        If there is none; the message lists the fields that the nearest one lacks.
    """
    reasons = []
    for name, architecture in _ARCHITECTURES.items():
        problems = {
            field: f"{field}: {reason}"
            for field, reason in _unsupported(config, architecture).items()
        }
        try:
            family, family_config, _ = family_for(config, name)
        except InvalidConfigError as error:
            for problem in error.problems[1:]:  # the first says that there is no such family
                problems[problem.path or problem.message] = str(problem)
        else:
            if not problems:
                assert isinstance(family_config, GPTConfig)
                return family, family_config
        reasons.append((problems, name))
    problems, name = min(reasons, key=lambda reason: len(reason[0]))
    raise EvalError(
        f"--format gguf: llama.cpp has no such model; its nearest architecture is {name}: "
        + "; ".join(problems.values())
    )


def _unsupported(config: GPTConfig, architecture: _Architecture) -> dict[str, str]:
    """Return an error by field that llama.cpp lacks; Transformers can have more of them."""
    problems = {}
    if any(config.windows):
        problems["windows"] = f"got {config.windows}; expected None for all blocks"
    if config.activation != architecture.activation:
        problems["activation"] = f"got {config.activation!r}; expected {architecture.activation!r}"
    if config.positions == "rope" and config.rope.scaling not in architecture.scalings:
        problems["rope.scaling"] = (
            f"got {config.rope.scaling!r}; expected one of {list(architecture.scalings)}"
        )
    return problems


def _model_metadata(name: str, config: GPTConfig) -> dict[str, Value]:
    """Return the hyperparameters of an architecture."""
    rms = "_rms" if config.norm == "rmsnorm" else ""
    keys: dict[str, Value] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_seq_len,
        "embedding_length": config.d_model,
        "block_count": config.n_layer,
        "feed_forward_length": config.ff_dim,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": config.kv_heads,
        f"attention.layer_norm{rms}_epsilon": config.norm_eps,
    }
    if config.positions == "rope":
        keys |= {
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "rope.dimension_count": config.head_dim,
            "rope.freq_base": config.rope.base,
        }
    if config.positions == "rope" and config.rope.scaling == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope.factor}
    return {f"{name}.{key}": value for key, value in keys.items()}


def _tensors(
    name: str,
    config: GPTConfig,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    dtype: Dtype,
) -> tuple[dict[str, Tensor], Callable[[str], np.ndarray]]:
    """Return the tensors of an architecture, and a function that computes one by name.

    Parameters
    ----------
    name : str
        The architecture.
    config : GPTConfig
        Configuration of the model.
    shapes : Mapping
        Shapes of the tensors of Transformers.
    read : callable
        From a name in Transformers to the tensor.
    dtype : {"f32", "f16", "q8_0"}
        Dtype of matrices.
    """
    sources = {_gguf_name(source): source for source in shapes}
    transposed = {own for own, source in sources.items() if _CONV1D.search(source)}
    stored = {
        own: shapes[source][::-1] if own in transposed else shapes[source]
        for own, source in sources.items()
    }
    factors = {}
    if config.positions == "rope" and config.rope.scaling == "llama3":
        factors[_ROPE_FACTORS] = _rope_factors(config)
        stored[_ROPE_FACTORS] = factors[_ROPE_FACTORS].shape

    def values(own: str) -> np.ndarray:
        if own in factors:
            return factors[own]
        array = read(sources[own])
        if own in transposed:
            return array.T
        if name == "llama" and (found := _ROTATED.search(own)):
            return _interleave(array, config.n_head if found[1] == "q" else config.kv_heads)
        return array

    return {own: Tensor(shape, _dtype(own, shape, dtype)) for own, shape in stored.items()}, values


def _gguf_name(source: str) -> str:
    found = _TENSOR_NAME.fullmatch(source)
    assert found is not None, source
    layer, module, kind = found.groups()
    return f"{'' if layer is None else f'blk.{layer}.'}{_MODULES[module]}.{kind}"


def _dtype(name: str, shape: tuple[int, ...], dtype: Dtype) -> Dtype:
    """Return the dtype of a tensor."""
    if len(shape) < 2 or name.startswith("position_embd"):
        return "f32"
    return "f16" if dtype == "q8_0" and shape[-1] % BLOCK else dtype


def _interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of queries or keys: pairs (i, i + d / 2) of a head become (2i, 2i + 1).

    llama.cpp rotates neighboring features in its architecture llama.
    """
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def _rope_factors(config: GPTConfig) -> np.ndarray:
    """Return how much longer the wavelength of each feature pair is than without scaling."""
    plain = dataclasses.replace(config.rope, scaling="none")
    scaled, _ = rope_frequencies(config.rope, config.head_dim)
    factors: np.ndarray = rope_frequencies(plain, config.head_dim)[0] / scaled
    return factors
