"""`load` and `save` of models in the format of Hugging Face transformers."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tjx_nn.binding import Params
from tjx_nn.config import TransformerConfig
from tjx_nn.hf.convert_config import read_config, write_config
from tjx_nn.hf.convert_params import read_params, resolve_head, write_params
from tjx_nn.hf.families import all_families
from tjx_nn.hf.family import Json, ModelFamily
from tjx_nn.hf.hub import find
from tjx_nn.hf.int_groups import IntGroups
from tjx_nn.hf.quantization import Quantization, split_quantization
from tjx_nn.hf.safetensors_folder import (
    CONFIG,
    WRITABLE,
    Tensors,
    has_weights,
    read_json,
    write_folder,
)
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.problems import InvalidConfigError, Problem, problems_of


def load(
    path_or_hub_name: str | Path,
    *,
    revision: str | None = None,
    shardings: Callable[[TransformerConfig], Any] | None = None,
    dequantize: bool = True,
) -> tuple[TransformerConfig, Params]:
    """Load the configuration and parameters of a transformers checkpoint.

    Parameters
    ----------
    path_or_hub_name
        Folder with config.json and model.safetensors (or shards with an index), or a name on the
        Hugging Face hub, such as "openai-community/gpt2", which is downloaded to the hub cache.
    revision
        Branch, tag or commit on the hub.
    shardings
        From the configuration to the sharding of each parameter, nested as from `tjx_nn.init`. Each
        parameter is transferred to its devices before the next one is read, so that the host holds
        one parameter (of all layers), or those of fused tensors, at a time.
    dequantize
        Whether the result has no quantized kernels. False keeps the matrices of 4-bit GPTQ and AWQ
        checkpoints without activation order as `Int4Kernel`, as from `quantize`: those of linear
        layers in blocks, if they are quantized in all layers.

    Returns
    -------
    config : TransformerConfig
        Configuration of the model.
    params : dict
        Parameters as from `tjx_nn.init`, float32 for any stored dtype: NumPy arrays, or with
        `shardings` arrays on its devices. Block-scaled FP8, MXFP4, GPTQ and AWQ are dequantized.

    Raises
    ------
    ValueError
        If the family or a feature of the model is not supported, tensors are missing, unexpected or
        have wrong shapes (all are listed), the folder has only pickle files, or its matrices cannot
        be kept as `dequantize` requests.

    Examples
    --------
    >>> import dataclasses
    >>> config, params = load("openai-community/gpt2")  # doctest: +SKIP
    >>> config = dataclasses.replace(config, dtype="bfloat16")  # doctest: +SKIP
    """
    folder = find(path_or_hub_name, revision)
    config_json = read_json(folder / CONFIG)
    try:
        family, config, quantization = read_family_config(config_json)
        with Tensors(folder, quantization=quantization) as tensors:
            config = resolve_head(family, config, tensors)
            if not dequantize:
                groups = _kept_groups(quantization, shardings)
                return config, read_params(family, config, tensors, int_groups=groups)
            if shardings is None:
                return config, read_params(family, config, tensors)
            return config, read_params(family, config, tensors, _transfer(shardings(config)))
    except ValueError as error:
        error.add_note(f"while reading {folder}")
        raise


def load_config(path_or_hub_name: str | Path, *, revision: str | None = None) -> TransformerConfig:
    """Load the configuration of a transformers checkpoint, without its parameters.

    Weights are read only if they decide whether the head is tied (T5).

    Parameters
    ----------
    path_or_hub_name, revision
        As for `load`; the files of a hub name are all downloaded.

    Raises
    ------
    ValueError
        If the family or a feature of the model is not supported.

    Examples
    --------
    >>> load_config("openai-community/gpt2").n_layer  # doctest: +SKIP
    12
    """
    folder = find(path_or_hub_name, revision)
    try:
        family, config, quantization = read_family_config(read_json(folder / CONFIG))
        if family.untied_head is None or not has_weights(folder):
            return config
        with Tensors(folder, quantization=quantization) as tensors:
            return resolve_head(family, config, tensors)
    except ValueError as error:
        error.add_note(f"while reading {folder}")
        raise


def read_family_config(
    config_json: Json,
) -> tuple[ModelFamily, TransformerConfig, Quantization | None]:
    """Return the family of a config.json, the configuration of the model and its quantization.

    Raises
    ------
    ValueError
        As `load_config`.
    """
    config_json, quantization = split_quantization(config_json)
    family = _family_of(config_json)
    return family, read_config(family, config_json), quantization


def save(
    path: str | Path,
    config: TransformerConfig,
    params: Params,
    *,
    max_shard_bytes: int = 5 * 10**9,
    dtype: str | None = None,
    model_type: str | None = None,
) -> None:
    """Save a model in the format of transformers, for `from_pretrained` and `tjx_nn.hf.load`.

    Biases that only the family has are saved as zeros; table rows beyond vocab_size or
    tokenizer_size and the module of multi_token_loss are omitted. Neither changes a logit. Special
    tokens are saved as null, as they belong to the tokenizer.

    Parameters
    ----------
    path
        Folder to create; an existing folder must not contain a model.
    config
        Configuration of the model.
    params
        Parameters of the model.
    max_shard_bytes
        Maximum size of a safetensors file in bytes; larger models are sharded.
    dtype
        Dtype of the tensors: "float32" (also None), "bfloat16" or "float16".
    model_type
        Family to save as, such as "phi3"; None is the first one that can represent the model.

    Raises
    ------
    ValueError
        If no family, or not the requested one, can represent the model (the fields are listed),
        the parameters do not match the configuration, or values overflow float16.

    Examples
    --------
    >>> import jax, tempfile
    >>> from tjx_nn import GPTConfig, hf, init
    >>> config = GPTConfig(vocab_size=11, max_seq_len=8, n_layer=2, n_head=2, d_model=4)
    >>> params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    >>> folder = tempfile.mkdtemp()
    >>> hf.save(folder, config, params)
    >>> hf.load(folder)[0].n_layer
    2
    """
    dtype = "float32" if dtype is None else dtype
    if dtype not in WRITABLE:
        raise ValueError(f"dtype: got {dtype!r}; expected one of {list(WRITABLE)}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: got {max_shard_bytes}; expected a positive number")
    family, family_config, config_json = family_for(config, model_type)
    shapes, tensor = write_params(family, config, family_config, params)
    write_folder(
        Path(path),
        {**config_json, "dtype": dtype},
        shapes,
        tensor,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )


def _kept_groups(quantization: Quantization | None, shardings: Any) -> IntGroups:
    """Return the quantization of matrices that are not dequantized, or raise."""
    if not isinstance(quantization, IntGroups):
        raise ValueError(
            "dequantize: got False for a checkpoint without GPTQ or AWQ matrices; expected True; "
            "omit it, and quantize the parameters with tjx_nn.quantize"
        )
    if shardings is not None:
        raise ValueError(
            "dequantize: got False with shardings; expected one of them; transfer the result"
        )
    return quantization


def _transfer(shardings: Any) -> Callable[[str, np.ndarray], jax.Array]:
    """Return the function that transfers a parameter to its devices and waits for it."""
    by_path = {
        jax.tree_util.keystr(path, simple=True, separator="."): sharding
        for path, sharding in jax.tree.leaves_with_path(shardings)
    }

    def put(path: str, value: np.ndarray) -> jax.Array:
        array: jax.Array = jax.device_put(value, by_path[path])
        return array.block_until_ready()

    return put


def _family_of(config_json: Json) -> ModelFamily:
    """Return the family of a config.json."""
    kind, architectures = config_json.get("model_type"), config_json.get("architectures")
    for family in all_families():
        given = [family.architecture] if architectures is None else architectures
        if kind == family.model_type and isinstance(given, list) and family.architecture in given:
            return family
    known = [f"{family.model_type} ({family.architecture})" for family in all_families()]
    raise ValueError(
        f"model_type: got {str(kind)[:60]!r} with architectures {str(architectures)[:60]}; "
        "expected "
        f"one of {', '.join(known)}"
    )


def _without_unused(config: TransformerConfig) -> dict[str, Any]:
    """Return the fields of a model without parameters that its logits do not depend on.

    These are the rows of ids that the tokenizer lacks, and the module of `multi_token_loss`.
    """
    size = getattr(config, "tokenizer_size", None)
    fields = {} if size is None else {"vocab_size": size, "tokenizer_size": None}
    return {**fields, "multi_token_loss": 0.0} if isinstance(config, GPTConfig) else fields


def family_for(
    config: TransformerConfig, model_type: str | None = None
) -> tuple[ModelFamily, TransformerConfig, dict[str, Any]]:
    """Return the first family that can represent a model, its configuration and config.json.

    Parameters
    ----------
    config
        Configuration of the model.
    model_type
        model_type of the family; None is any.
    """
    known = {family.model_type for family in all_families()}
    if model_type is not None and model_type not in known:
        raise ValueError(f"model_type: got {model_type!r}; expected one of {sorted(known)}")
    reasons = []
    for family in all_families():
        if type(config) is not family.config or model_type not in (None, family.model_type):
            continue
        try:
            family_config = dataclasses.replace(config, **family.fills, **_without_unused(config))
            return family, family_config, write_config(family, family_config)
        except ValueError as error:
            reasons.append((problems_of(error), family))
    if not reasons:
        kinds = {family.config.__name__ for family in all_families()}
        raise ValueError(
            f"config: got a {type(config).__name__} for model_type {model_type}; expected one of "
            f"{sorted(kinds)}, or the class of a family that `tjx_nn.hf.register` adds"
        )
    # Report the family with the fewest errors.
    problems, family = min(reasons, key=lambda reason: len(reason[0]))
    head = f"no transformers family can represent this model; {family.architecture} cannot, as:"
    raise InvalidConfigError([Problem("config", head), *problems])
