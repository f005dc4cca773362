"""`load` and `save`: models in transformers' format, of every family that we have."""

import dataclasses
from pathlib import Path
from typing import Any

from tjx_nn.config import TransformerConfig
from tjx_nn.functional import Params
from tjx_nn.hf.bart import BART
from tjx_nn.hf.bert import BERT
from tjx_nn.hf.convert_config import read_config, write_config
from tjx_nn.hf.convert_params import read_params, write_params
from tjx_nn.hf.family import Json, ModelFamily
from tjx_nn.hf.gpt2 import GPT2
from tjx_nn.hf.hub import find
from tjx_nn.hf.llama import LLAMA, MISTRAL, QWEN3
from tjx_nn.hf.safetensors_folder import CONFIG, WRITABLE, Tensors, read_json, write_folder
from tjx_nn.hf.vit import VIT

# Where several can hold a model, the first is written.
FAMILIES = (GPT2, LLAMA, MISTRAL, QWEN3, BERT, VIT, BART)


def load(
    path_or_hub_name: str | Path, *, revision: str | None = None
) -> tuple[TransformerConfig, Params]:
    """Read a model in transformers' format.

    Parameters
    ----------
    path_or_hub_name
        A folder with config.json and model.safetensors, or several such files and their index; or
        a name on the Hugging Face hub, such as "openai-community/gpt2", which is downloaded to the
        hub's cache.
    revision
        Branch, tag or commit on the hub.

    Returns
    -------
    tuple
        Our configuration, and parameters as those of `tjx_nn.init`: nested dicts of NumPy arrays,
        float32 whatever the file's type.

    Raises
    ------
    ValueError
        If the model is of no family that we have, or does what we have not; if tensors are missing,
        of another shape or not a part of it (all are named); or if the folder has only a pickle.

    Examples
    --------
    >>> import dataclasses
    >>> config, params = load("openai-community/gpt2")  # doctest: +SKIP
    >>> config = dataclasses.replace(config, dtype="bfloat16")  # doctest: +SKIP
    """
    folder = find(path_or_hub_name, revision)
    theirs = read_json(folder / CONFIG)
    try:
        family = _family_of(theirs)
        config = read_config(family, theirs)
        with Tensors(folder) as tensors:
            return config, read_params(family, config, tensors)
    except ValueError as error:
        error.add_note(f"while reading {folder}")
        raise


def save(
    path: str | Path,
    config: TransformerConfig,
    params: Params,
    *,
    max_shard_bytes: int = 5 * 10**9,
    dtype: str | None = None,
) -> None:
    """Write a model in transformers' format, for its `from_pretrained` and our `load`.

    Biases that a family has and the model has not are written as zeros, and table rows beyond
    vocab_size, or tokenizer_size, are left out; both change no result. Ids of special tokens are
    not known here, and written as none: they come with the tokenizer.

    Parameters
    ----------
    path
        A folder, made if there is none. It may not have a model already.
    config
        The model.
    params
        Its parameters, nested as `tjx_nn.init` returns them.
    max_shard_bytes
        Tensors are spread over several files where one would be larger.
    dtype
        Type of the tensors: "float32" (None is that), "bfloat16" or "float16".

    Raises
    ------
    ValueError
        If no family holds such a model (the fields are named), parameters do not fit the
        configuration, or are too large for float16.

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
        raise ValueError(f"dtype is {dtype!r}: give one of {list(WRITABLE)}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}: give a number above 0")
    family, held, theirs = _family_for(config)
    shapes, tensor = write_params(family, config, held, params)
    write_folder(
        Path(path),
        {**theirs, "dtype": dtype},
        shapes,
        tensor,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )


def _family_of(theirs: Json) -> ModelFamily:
    """Return the family that a config.json is of."""
    kind, architectures = theirs.get("model_type"), theirs.get("architectures")
    for family in FAMILIES:
        given = [family.architecture] if architectures is None else architectures
        if kind == family.model_type and isinstance(given, list) and family.architecture in given:
            return family
    known = [f"{family.model_type} ({family.architecture})" for family in FAMILIES]
    raise ValueError(
        f"model_type is {str(kind)[:60]!r} and architectures {str(architectures)[:60]}: what can "
        f"be read is {', '.join(known)}"
    )


def _without_unused_ids(config: TransformerConfig) -> dict[str, Any]:
    """Return the fields of a vocabulary that holds the tokenizer's ids alone."""
    size = getattr(config, "tokenizer_size", None)
    return {} if size is None else {"vocab_size": size, "tokenizer_size": None}


def _family_for(config: TransformerConfig) -> tuple[ModelFamily, TransformerConfig, dict[str, Any]]:
    """Return the first family that holds a model, the model as it holds it, and its config.json."""
    reasons = []
    for family in FAMILIES:
        if type(config) is not family.config:
            continue
        try:
            held = dataclasses.replace(config, **family.fills, **_without_unused_ids(config))
            return family, held, write_config(family, held)
        except ValueError as error:
            reasons.append((str(error).splitlines(), family))
    if not reasons:
        raise ValueError(f"transformers has no family for a {type(config).__name__}")
    # The nearest is the one that lacks the least.
    problems, family = min(reasons, key=lambda reason: len(reason[0]))
    raise ValueError(
        "\n".join(
            [f"transformers cannot hold this model; {family.architecture}, the nearest, because:"]
            + [f"  {problem}" for problem in problems]
        )
    )
