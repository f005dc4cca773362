"""Configurations: theirs as ours, and ours as theirs where theirs can hold it."""

import dataclasses
import math
from types import NoneType
from typing import Any, get_args, get_type_hints

from tjx_nn.config import TransformerConfig
from tjx_nn.hf.family import LARGEST_SIZE, MOST_LAYERS, FieldMapping, Json, ModelFamily
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.sub_configs import raise_problems

# Fields whose default depends on others, and the properties that say what they come to.
_RESOLVED = {
    "d_head": "head_dim",
    "n_kv_head": "kv_heads",
    "d_ff": "ff_dim",
    "image_size": "height_width",
}
# Fields that change how a model is trained or run, and not what it computes.
_OF_TRAINING = {
    "dropout", "embedding_dropout", "attention_dropout", "init_std", "scan_layers", "remat",
    "remat_every", "dtype", "attention_implementation", "check_ids", "vocab_multiple",
}  # fmt: skip


def read_config(family: ModelFamily, theirs: Json) -> TransformerConfig:
    """Return our configuration of a model of theirs.

    Raises
    ------
    ValueError
        Naming all entries that ask for what we do not have.
    """
    features = {"quantization_config": None, **family.features}
    problems = [
        f"{key} is {theirs[key]!r}: only {value!r} can be read"
        for key, value in features.items()
        if key in theirs and theirs[key] != value
    ]
    fields: dict[str, Any] = dict(family.constants)
    before = len(problems)
    for field in family.fields:
        try:
            fields[field.ours] = _read_field(field, theirs, family.config)
        except ValueError as error:
            problems.append(str(error))
    if len(problems) == before:  # it may count on what the fields were checked for
        try:
            fields |= family.read_extra(theirs)
        except ValueError as error:
            problems.append(str(error))
    raise_problems([f"{family.architecture}: {problem}" for problem in problems])
    return family.config(**fields)


def _read_field(field: FieldMapping, theirs: Json, kind: type[TransformerConfig]) -> Any:
    found = {key: theirs.get(key, field.default) for key in field.theirs}
    value = found[field.theirs[0]]
    if any(other != value for other in found.values()):
        raise ValueError(f"{found} must be equal: we have one {field.ours}")
    if field.values is not None:
        if not isinstance(value, str) or value not in field.values:
            raise ValueError(
                f"{field.theirs[0]} is {value!r}: only {list(field.values)} can be read"
            )
        return field.values[value]
    kinds = _kinds(kind, field.ours)
    largest = MOST_LAYERS if field.ours in _DEPTHS else LARGEST_SIZE
    if not _fits(value, kinds) or (isinstance(value, int) and not 0 <= value <= largest):
        names = " or ".join(_NAMES[each] for each in kinds)
        raise ValueError(f"{field.theirs[0]} is {str(value)[:60]}: give {names} up to {largest}")
    # JSON's 0 and 10000 may be meant as fractions.
    return float(value) if isinstance(field.default, float) and value is not None else value


_DEPTHS = ("n_layer", "n_encoder_layer")
_NAMES = {
    int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"
}  # fmt: skip


def _kinds(kind: type[TransformerConfig], field: str) -> tuple[type, ...]:
    """Return what a field may be: one type, or those of a union."""
    hint = get_type_hints(kind)[field]
    return get_args(hint) or (hint,)


def _fits(value: Any, kinds: tuple[type, ...]) -> bool:
    """Tell whether a value of JSON is of a type; whole numbers are fractions too."""
    if type(value) is int:
        return int in kinds or float in kinds
    return type(value) in kinds and (not isinstance(value, float) or math.isfinite(value))


def write_config(family: ModelFamily, config: TransformerConfig) -> dict[str, Any]:
    """Return config.json's entries of a model of ours.

    Raises
    ------
    ValueError
        Naming all fields that the family has no place for.
    """
    theirs: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        # Which ids begin and end a text is for the tokenizer to say; the family's defaults are
        # those of its first model.
        "bos_token_id": None,
        "eos_token_id": None,
        **family.features,
    }
    for field in family.fields:
        value = getattr(config, _RESOLVED.get(field.ours, field.ours))
        if field.values is not None:
            names = (name for name, ours in field.values.items() if ours == value)
            value = next(names, field.default)
        theirs |= dict.fromkeys(field.theirs, value)
    theirs |= family.write_extra(config)
    # What cannot be written is what would be read otherwise: no list of it has to be kept.
    wanted, kept = _essence(config), _essence(read_config(family, theirs))
    raise_problems(
        [
            f"{name} is {value!r} and would be read back as {kept[name]!r}"
            for name, value in wanted.items()
            if name in kept and value != kept[name]
        ]
    )
    return theirs


def _essence(config: TransformerConfig) -> dict[str, Any]:
    """Return everything that decides what a model computes, each choice in one form."""
    left_out = {*_OF_TRAINING, "window", "global_every"}
    left_out |= {"rope"} if config.positions != "rope" else set()
    if isinstance(config, GPTConfig) and config.positions != "sinusoidal":
        left_out.add("scale_embeddings")
    essence: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, _RESOLVED.get(field.name, field.name))
        if field.name in left_out:
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            parts = dataclasses.asdict(value)
            essence |= {f"{field.name}.{name}": part for name, part in parts.items()}
        else:
            essence[field.name] = value
    return {**essence, "windows": config.windows}
