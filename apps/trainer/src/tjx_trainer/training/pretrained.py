"""Initialization from pretrained weights: the transformers format, a run, an Orbax checkpoint."""

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

import tjx_data
import tjx_nn
import tjx_parallel
from tjx_core import ConfigError, Problem
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.models.vit_config import ViTConfig
from tjx_parallel.config import MeshConfig
from tjx_trainer.config.run_config import Config
from tjx_trainer.runtime.run_dir import RunDirectory
from tjx_trainer.training.pretrained_orbax import check_orbax, orbax_params

# Fields that may differ from the pretrained model: training and implementation choices.
_FREE = frozenset({
    "dropout", "embedding_dropout", "attention_dropout", "z_loss", "init_std", "zero_init_residual",
    "mup_base", "scan_layers", "remat", "remat_every", "dtype", "attention_implementation",
    "kv_cache_dtype", "check_ids", "vocab_multiple", "max_seq_len",
    "tokenizer_size", "scale_embeddings",  # of an unused vocabulary, and of sinusoids
    "multi_token_loss",  # a weight; its module is checked
})  # fmt: skip


@cache
def load_pretrained(name: str) -> tuple[Any, dict[str, Any]]:
    """Return the configuration and parameters of a trained model.

    Parameters
    ----------
    name : str
        A run directory, a folder in the format of Hugging Face transformers, or a name on its hub.

    Returns
    -------
    model configuration, and nested dict of arrays
        The parameters are on the host. Both stay in memory until ``load_pretrained.cache_clear``.

    Raises
    ------
    ValueError
        If there is no such model, or the run has no checkpoint.
    """
    if not RunDirectory(Path(name)).config.is_file():
        return tjx_nn.hf.load(name)
    from tjx_trainer.run_reader import SavedRun  # it imports the modules that import this one

    run = SavedRun(Path(name))
    if not run.steps():
        raise ValueError(
            f"{name}: got a run without a checkpoint; expected a trained one; give another one to "
            "train.init_from or distill.teacher"
        )
    mesh = tjx_parallel.make_mesh(MeshConfig(), jax.local_devices()[:1])
    params, _ = run.load_params(mesh)
    return run.config.model, jax.device_get(params)


def _load_converted(config: Config) -> tuple[Any, dict[str, Any]]:
    """Load the weights of ``train.init_from``, converted for a model with latents without norms."""
    name, ours = config.train.init_from, config.model
    assert name is not None
    theirs, params = load_pretrained(name)
    rank = ours.latent.kv_dim
    if rank is None or ours.latent.use_norm or theirs.latent.kv_dim is not None:
        return theirs, params
    return _as_latent(name, rank, ours.latent.rope_heads if theirs.positions == "rope" else None)


@cache
def _as_latent(name: str, rank: int, rope_heads: int | None) -> tuple[Any, dict[str, Any]]:
    try:
        return tjx_nn.to_latent_attention(*load_pretrained(name), rank, rope_heads=rope_heads)
    except ValueError as error:
        message = "; ".join(str(error).splitlines())
        raise ConfigError(
            [Problem("model.latent", f"of train.init_from {name}: {message}")]
        ) from error


def params_digest(params: Any, prefix: str = "") -> str:
    """Return the SHA-256 of parameters with their names, after a text."""
    hasher = hashlib.sha256(prefix.encode())
    for path, leaf in jax.tree.leaves_with_path(params):
        hasher.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return hasher.hexdigest()


def check_pretrained(config: Config) -> None:
    """Raise if the model's architecture differs from that of ``train.init_from``.

    Parameters
    ----------
    config : Config
        The resolved configuration. Returns at once without ``train.init_from``.

    Raises
    ------
    ValueError
        Naming each value that differs, a line each; or why the weights cannot be read.
    """
    if config.train.init_from is None:
        return
    if (path := config.train.orbax_path) is not None:
        check_orbax(path, config.model)
        return
    theirs, _ = _load_converted(config)
    if problems := _differences(config, theirs):
        raise ConfigError(problems)


def check_tokenizer(config: Config, tokenizer: tjx_data.Tokenizer) -> list[str]:
    """Compare the tokenizer of the data with that of the pretrained weights.

    Parameters
    ----------
    config : Config
        Nothing is compared without ``train.init_from``.
    tokenizer : tjx_data.Tokenizer
        The tokenizer of the data.

    Returns
    -------
    list of str
        Notes for the user: the weights have no tokenizer, or the files differ but not their ids.

    Raises
    ------
    ValueError
        If a token of the weights' tokenizer has another id in the data, or none.
    """
    name = config.train.init_from
    if name is None:
        return []
    if config.train.orbax_path is not None:
        return [f"train.init_from {name}: an Orbax checkpoint has no tokenizer to compare"]
    try:
        theirs = tjx_data.Tokenizer.load(name)
    except (ValueError, tjx_data.HubError) as error:
        return [f"train.init_from {name}: no tokenizer to compare with the data's ({error})"]
    if theirs.fingerprint == tokenizer.fingerprint:
        return []
    prints = f"fingerprint {theirs.fingerprint[:8]} there and {tokenizer.fingerprint[:8]} here"
    ours = tokenizer.vocabulary
    moved = [token for token, i in theirs.vocabulary.items() if ours.get(token) != i]
    if not moved:
        return [f"train.init_from {name}: its tokenizer has the same ids as the data's ({prints})"]
    examples = ", ".join(
        f"{token!r} is {theirs.vocabulary[token]} there and {ours.get(token, 'missing')} here"
        for token in sorted(moved, key=theirs.vocabulary.__getitem__)[:3]
    )
    raise ValueError(
        f"data.tokenizer: got {config.data.tokenizer} ({prints}); expected the ids of "
        f"train.init_from {name}, and {len(moved):,} tokens differ ({examples}); give "
        f"--data.tokenizer {name}, or leave it out"
    )


def pretrained_params(config: Config) -> dict[str, Any]:
    """Return the pretrained weights in the run's own parameter layout.

    Token tables are padded with rows of zeros to ``model.vocab_multiple``; the model masks these
    rows. Position tables are truncated to ``model.max_seq_len``, as in nanoGPT. Rows of new tokens
    are those of ``train.new_tokens``. With ``train.new_head`` the head of a ViT has its initial
    values. The module of ``model.multi_token_loss`` is omitted if the weight is 0.

    Returns
    -------
    nested dict of arrays
        On the host, float32.

    Raises
    ------
    ValueError
        As `check_pretrained`.
    """
    check_pretrained(config)
    assert config.train.init_from is not None
    if (path := config.train.orbax_path) is not None:
        return orbax_params(path)
    theirs, params = _load_converted(config)
    # The weights are read once and are as large as the model.
    load_pretrained.cache_clear()
    _as_latent.cache_clear()
    if isinstance(config.model, ViTConfig):
        return _with_new_head(config, params) if config.train.new_head else params
    tables = {name: dict(table) for name, table in params.items() if name in _ROWS}
    for name, table in tables.items():
        for key, rows in table.items():
            table[key] = _fit(np.asarray(rows), _ROWS[name](config.model))
            if name in _TOKEN_TABLES:
                _fill_new_tokens(config, theirs, name, table[key])
    model: Any = config.model  # a decoder
    left_out = () if model.multi_token_loss else ("multi_token",)
    return {name: x for name, x in {**params, **tables}.items() if name not in left_out}


def _with_new_head(config: Config, params: dict[str, Any]) -> dict[str, Any]:
    """Return pretrained parameters with the initial values of the head and of new pooling."""
    init = jax.jit(tjx_nn.init, static_argnums=0)
    fresh = jax.device_get(init(config.model, jax.random.key(config.seed)))
    return {
        name: fresh[name] if name == "head" else params.get(name, fresh[name]) for name in fresh
    }


_ROWS: Mapping[str, Any] = {
    "wte": lambda model: model.vocab_rows,
    "head": lambda model: model.vocab_rows,
    "wpe": lambda model: model.max_seq_len,
}


_TOKEN_TABLES = ("wte", "head")


def _fill_new_tokens(config: Config, theirs: Any, name: str, table: np.ndarray) -> None:
    """Initialize the rows of token ids that the pretrained model's tokenizer does not have."""
    first = theirs.tokenizer_size or theirs.vocab_size
    model: Any = config.model
    last = max(first, model.tokenizer_size or model.vocab_size)
    if config.train.new_tokens == "mean":
        table[first:last] = table[:first].mean(0, dtype=np.float64)
    elif config.train.new_tokens == "random":
        rng = np.random.default_rng([config.seed, _TOKEN_TABLES.index(name)])
        shape = (last - first, table.shape[1])
        table[first:last] = model.init_std * rng.standard_normal(shape)


def _fit(table: np.ndarray, rows: int) -> np.ndarray:
    """Truncate a table to `rows` rows, or pad it with rows of zeros."""
    missing = max(0, rows - len(table))
    return np.pad(table[:rows], ((0, missing), (0, 0)))


def _differences(config: Config, theirs: Any) -> list[Problem]:
    ours, new_head = config.model, config.train.new_head
    source = f"train.init_from {config.train.init_from}"
    if type(theirs) is not type(ours) or not isinstance(ours, GPTConfig | ViTConfig):
        message = f"got {ours.family}; expected the family {theirs.family} of {source}: gpt or vit"
        return [Problem("model.family", message)]
    if new_head and not isinstance(ours, ViTConfig):
        message = f"got true with model.family {ours.family}; expected vit; leave it out"
        return [Problem("train.new_head", message, ("model.family",))]
    expected, given = _flat(theirs), _flat(ours)
    if isinstance(ours, ViTConfig):
        return _image_differences(source, expected, given, new_head=new_head)
    problems = _other_values(source, expected, given, free=frozenset({"vocab_size"}))
    size = expected["vocab_size"]
    extended = config.train.new_tokens != "error" and size < ours.vocab_size
    if size != ours.vocab_size and not extended:
        message = (
            f"got one of {ours.vocab_size} tokens; expected {size}, those of "
            f"{source}; give --data.tokenizer the model's own (gpt2, or the folder of the model)"
        )
        if size < ours.vocab_size:
            message += ", or --train.new_tokens mean to add the others"
        problems.append(Problem("data.tokenizer", message))
    weight = given["multi_token_loss"]
    if weight and not expected["multi_token_loss"]:
        message = f"got {weight}; expected 0, as {source} has no module for it; leave it out"
        problems.append(Problem("model.multi_token_loss", message))
    if theirs.longest_seq_len < ours.max_seq_len:
        message = (
            f"got {ours.max_seq_len}; expected at most {theirs.longest_seq_len}, that of {source}; "
            f"give --model.max_seq_len {theirs.longest_seq_len} and at most this --data.seq_len"
        )
        problems.append(Problem("model.max_seq_len", message))
    return problems


def _image_differences(
    source: str, expected: dict[str, Any], given: dict[str, Any], *, new_head: bool
) -> list[Problem]:
    """Compare ViTs: with a new head classes and pooling may differ, but not the class token."""
    free = {"n_classes", "image_size"}
    if new_head and ("class" in expected["pool"]) == ("class" in given["pool"]):
        free.add("pool")
    problems = _other_values(source, expected, given, free=frozenset(free))
    size = expected["image_size"]
    if given["image_size"] != size:
        message = (
            f"got {given['image_size']}; expected {size}, that of {source}; give "
            f"--model.image_size {_flag_value(size)}, or weights of `tjx_nn.resize_positions`"
        )
        problems.append(Problem("model.image_size", message))
    classes = expected["n_classes"]
    if not new_head and given["n_classes"] != classes:
        same = "" if classes is None else f", or --model.n_classes {classes}"
        message = (
            f"got {given['n_classes']}; expected {classes}, that of {source}; give "
            f"--train.new_head true to train a new head{same}"
        )
        problems.append(Problem("model.n_classes", message, ("train.new_head",)))
    return problems


def _other_values(
    source: str, expected: dict[str, Any], given: dict[str, Any], *, free: frozenset[str]
) -> list[Problem]:
    return [
        Problem(
            f"model.{field}",
            f"got {given[field]}; expected {expected[field]}, that of {source}; give "
            f"--model.{field} {_flag_value(expected[field])}",
        )
        for field in expected
        if field not in _FREE | free and expected[field] != given[field]
    ]


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of a configuration by dotted name, with derived defaults resolved."""
    found: dict[str, Any] = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            found |= _flat(value, f"{prefix}{entry.name}.")
        else:
            found[prefix + entry.name] = value
    if not prefix:  # None means a value derived from others: compare the derived values
        found |= {"n_kv_head": config.kv_heads, "d_head": config.head_dim, "d_ff": config.ff_dim}
        found["qkv_bias"] = None if config.has_qkv_bias == config.bias else config.has_qkv_bias
        found |= {"image_size": config.height_width} if isinstance(config, ViTConfig) else {}
    return found


def _flag_value(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "none" if value is None else str(value).lower()
