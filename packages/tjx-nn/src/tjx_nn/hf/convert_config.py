"""Conversion of configurations between config.json of transformers and tjx."""

import dataclasses
import math
from types import NoneType
from typing import Any, get_args, get_type_hints

from tjx_nn.config import TransformerConfig
from tjx_nn.hf.family import LARGEST_SIZE, MOST_LAYERS, FieldMapping, Json, ModelFamily
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.sub_configs import raise_problems

# Fields whose default depends on others, and the properties with their resolved values.
_RESOLVED = {
    "d_head": "head_dim",
    "n_kv_head": "kv_heads",
    "d_ff": "ff_dim",
    "image_size": "height_width",
}
# Fields that affect training or execution, but not the function that a model computes.
_TRAINING_FIELDS = {
    "dropout", "embedding_dropout", "attention_dropout", "init_std", "scan_layers", "remat",
    "remat_every", "dtype", "attention_implementation", "check_ids", "vocab_multiple",
}  # fmt: skip


def read_config(family: ModelFamily, config_json: Json) -> TransformerConfig:
    """Convert config.json to a tjx configuration.

    Raises
    ------
    ValueError
        With a line for each unsupported or invalid entry.
    """
    features = {"quantization_config": None, **family.features}
    problems = [
        f"{key}: got {config_json[key]!r}; expected {value!r}, as tjx supports no other value"
        for key, value in features.items()
        if key in config_json and config_json[key] != value
    ]
    fields: dict[str, Any] = dict(family.constants)
    before = len(problems)
    for field in family.fields:
        try:
            fields[field.field] = _read_field(field, config_json, family.config)
        except ValueError as error:
            problems.append(str(error))
    if len(problems) == before:  # read_extra relies on valid fields
        try:
            fields |= family.read_extra(config_json)
        except ValueError as error:
            problems.append(str(error))
    raise_problems([f"{family.architecture}: {problem}" for problem in problems])
    return family.config(**fields)


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
    hint = get_type_hints(kind)[field]
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
        **family.features,
    }
    for field in family.fields:
        value = getattr(config, _RESOLVED.get(field.field, field.field))
        if field.values is not None:
            names = (name for name, tjx_value in field.values.items() if tjx_value == value)
            value = next(names, field.default)
        config_json |= dict.fromkeys(field.keys, value)
    config_json |= family.write_extra(config)
    # A field cannot be represented if reading the result back gives another value.
    wanted = _functional_fields(config)
    restored = _functional_fields(read_config(family, config_json))
    raise_problems(
        [
            f"{name}: got {value!r}; expected {restored[name]!r}, the only value of this family"
            for name, value in wanted.items()
            if name in restored and value != restored[name]
        ]
    )
    return config_json


def _functional_fields(config: TransformerConfig) -> dict[str, Any]:
    """Return the fields that determine the function of a model, resolved to a canonical form."""
    excluded = {*_TRAINING_FIELDS, "window", "global_every"}
    excluded |= {"rope"} if config.positions != "rope" else set()
    if isinstance(config, GPTConfig) and config.positions != "sinusoidal":
        excluded.add("scale_embeddings")
    functional: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, _RESOLVED.get(field.name, field.name))
        if field.name in excluded:
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            parts = dataclasses.asdict(value)
            functional |= {f"{field.name}.{name}": part for name, part in parts.items()}
        else:
            functional[field.name] = value
    return {**functional, "windows": config.windows}
