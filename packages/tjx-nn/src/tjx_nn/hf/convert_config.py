"""Conversion of configurations between config.json of transformers and tjx."""

import dataclasses
import math
from collections.abc import Iterable
from operator import attrgetter
from types import NoneType
from typing import Any, get_args, get_type_hints

from tjx_nn.config import TransformerConfig
from tjx_nn.hf.family import (
    LARGEST_SIZE,
    MOST_LAYERS,
    REQUIRED_VALUES,
    UNUSED_KEYS,
    FieldMapping,
    Json,
    ModelFamily,
)
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.problems import Problem, problems_of, raise_problems

# Fields whose default depends on others, and the properties with their resolved values.
_RESOLVED = {
    "d_head": "head_dim",
    "n_kv_head": "kv_heads",
    "d_ff": "ff_dim",
    "image_size": "height_width",
    "qkv_bias": "has_qkv_bias",
    "logit_bias": "has_logit_bias",
    "embedding_dropout": "embedding_dropout_rate",
    "experts.d_ff": "expert_dim",
    "latent.v_dim": "v_dim",
}
# Fields that affect training or execution, but not the function that a model computes.
_TRAINING_FIELDS = {
    "dropout", "embedding_dropout", "attention_dropout", "z_loss", "init_std", "zero_init_residual",
    "scan_layers", "remat", "remat_every", "dtype", "kv_cache_dtype", "attention_implementation",
    "check_ids", "vocab_multiple", "experts.capacity_factor", "experts.balance_loss",
    "experts.z_loss",
}  # fmt: skip


def read_config(family: ModelFamily, config_json: Json) -> TransformerConfig:
    """Convert config.json to a tjx configuration.

    Raises
    ------
    ValueError
        With a line for each unsupported, invalid or unknown entry.
    """
    features = {**REQUIRED_VALUES, **family.legacy, **family.features}
    config_json, problems = _current_keys(family, config_json)
    problems += [
        f"{key}: got {config_json[key]!r}; expected {value!r}, as tjx supports no other value"
        for key, value in features.items()
        if key in config_json and not _equivalent(config_json[key], value)
    ]
    problems += [
        f"{key}: got {str(config_json[key])[:60]}; expected no such key, which tjx does not know "
        "for this family; delete it if it does not change the computation"
        for key in config_json.keys() - _known_keys(family)
    ]
    fields: dict[str, Any] = dict(family.constants)
    before = len(problems)
    for field in family.fields:
        try:
            fields[field.field] = _read_field(field, config_json, family.config)
        except ValueError as error:
            problems += map(str, problems_of(error))
    defaults = {key: field.default for field in family.fields for key in field.keys}
    config_json = {**defaults, **config_json}
    for computed in family.computed if len(problems) == before else ():  # relies on valid fields
        try:
            fields |= computed.read(config_json)
        except ValueError as error:
            problems += map(str, problems_of(error))
    raise_problems([f"{family.architecture}: {problem}" for problem in problems])
    return _make(family.config, fields.items())


def _equivalent(given: Any, expected: Any) -> bool:
    """Return whether values are equal; null stands for false and empty values, and these for it."""
    return bool(given == expected or (None in (given, expected) and not (given or expected)))


def _current_keys(family: ModelFamily, config_json: Json) -> tuple[Json, list[str]]:
    """Rename old keys of config.json; also return errors."""
    renamed = dict(config_json)
    problems = []
    for old, key in family.aliases.items():
        if old in renamed:
            value = renamed.pop(old)
            if renamed.setdefault(key, value) != value:
                problems.append(
                    f"{old}: got {str(value)[:60]} with {key} {str(renamed[key])[:60]}; expected "
                    "one of both"
                )
    return renamed, problems


def _known_keys(family: ModelFamily) -> set[str]:
    keys = {*UNUSED_KEYS, *REQUIRED_VALUES, *family.legacy, *family.features, *family.unused_keys}
    keys.update(*(field.keys for field in family.fields))
    keys.update(*(computed.keys for computed in family.computed))
    return keys


def _make(kind: type[TransformerConfig], fields: Iterable[tuple[str, Any]]) -> TransformerConfig:
    """Make a configuration from fields by name; those of a nested one have dotted names."""
    flat: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in fields:
        head, _, rest = name.partition(".")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            flat[name] = value
    hints = get_type_hints(kind)
    return kind(**flat, **{name: hints[name](**parts) for name, parts in nested.items()})


def _read_field(field: FieldMapping, config_json: Json, kind: type[TransformerConfig]) -> Any:
    found = {key: config_json.get(key, field.default) for key in field.keys}
    value = found[field.keys[0]]
    if any(other != value for other in found.values()):
        raise ValueError(
            f"{field.keys}: got {found}; expected equal values, as tjx has one {field.field}"
        )
    if field.values is not None:
        if not isinstance(value, str) or value not in field.values:
            raise ValueError(
                f"{field.keys[0]}: got {value!r}; expected one of {list(field.values)}"
            )
        return field.values[value]
    kinds = _kinds(kind, field.field)
    largest = MOST_LAYERS if field.field in _DEPTHS else LARGEST_SIZE
    if not _fits(value, kinds) or (isinstance(value, int) and not 0 <= value <= largest):
        names = " or ".join(_NAMES[each] for each in kinds)
        raise ValueError(
            f"{field.keys[0]}: got {str(value)[:60]}; expected {names} up to {largest}"
        )
    # JSON has no distinct floats: convert 0 and 10000 to the type of the default.
    return float(value) if isinstance(field.default, float) and value is not None else value


_DEPTHS = ("n_layer", "n_encoder_layer")
_NAMES = {
    int: "an integer", float: "a number", bool: "a boolean", NoneType: "null"
}  # fmt: skip


def _kinds(kind: type[TransformerConfig], field: str) -> tuple[type, ...]:
    """Return the types of a field: one type, or the members of a union."""
    *parents, name = field.split(".")
    owner: Any = kind
    for parent in parents:
        owner = get_type_hints(owner)[parent]
    hint = get_type_hints(owner)[name]
    return get_args(hint) or (hint,)


def _fits(value: Any, kinds: tuple[type, ...]) -> bool:
    """Return whether a JSON value has one of the types; integers are valid floats."""
    if type(value) is int:
        return int in kinds or float in kinds
    return type(value) in kinds and (not isinstance(value, float) or math.isfinite(value))


def write_config(family: ModelFamily, config: TransformerConfig) -> dict[str, Any]:
    """Convert a tjx configuration to config.json of a family.

    Raises
    ------
    ValueError
        With a line for each field that the family cannot represent.
    """
    config_json: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        # Special tokens belong to the tokenizer; None overrides the defaults of the family.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **family.features,
    }
    for field in family.fields:
        if field.default is None and attrgetter(field.field)(config) is None:
            continue  # a missing key also means None
        value = attrgetter(_RESOLVED.get(field.field, field.field))(config)
        if field.values is not None:
            names = (name for name, tjx_value in field.values.items() if tjx_value == value)
            value = next(names, field.default)
        config_json |= dict.fromkeys(field.keys, value)
    for computed in family.computed:
        config_json |= computed.write(config)
    # A field cannot be represented if reading the result back gives another value.
    wanted = functional_fields(config)
    restored = functional_fields(read_config(family, config_json))
    raise_problems(
        [
            Problem(
                name, f"got {value!r}; expected {restored[name]!r}, the only one of this family"
            )
            for name, value in wanted.items()
            if name in restored and value != restored[name]
        ]
    )
    return config_json


def functional_fields(config: TransformerConfig) -> dict[str, Any]:
    """Return the fields that determine the function of a model, resolved to a canonical form."""
    excluded = {*_TRAINING_FIELDS, "window", "global_every", "global_first"}
    excluded |= {"rope"} if config.positions != "rope" else set()
    excluded |= {"rope.local_base", "symmetric_window"} if not any(config.windows) else set()
    # The lengths of "longrope" are in `rope`; transformers chooses its factors by the sequence.
    longrope = config.positions == "rope" and config.rope.scaling == "longrope"
    excluded |= {"max_seq_len"} if longrope else set()
    excluded |= {"parallel_norm"} if not config.parallel_block else set()
    excluded |= {"chunked_window"} if config.window is None else set()
    excluded |= {"nope_temperature_length"} if not config.nope_temperature else set()
    excluded |= {"qk_norm_features"} if not config.qk_norm else set()
    excluded |= {"swiglu_limit"} if config.activation != "clamped_swiglu" else set()
    excluded |= {"experts.group_top_k"} if config.experts.groups == 1 else set()
    if isinstance(config, GPTConfig) and config.positions != "sinusoidal":
        excluded.add("scale_embeddings")
    functional: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, _RESOLVED.get(field.name, field.name))
        if field.name in excluded:
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [f"{field.name}.{part.name}" for part in dataclasses.fields(value)]
            if field.name == "experts" and not config.experts.count:
                names = ["experts.count"]
            functional |= {
                name: attrgetter(_RESOLVED.get(name, name))(config)
                for name in names
                if name not in excluded
            }
        else:
            functional[field.name] = value
    return {**functional, "windows": config.windows}
