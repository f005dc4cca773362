"""Conversion of rotary position embeddings between config.json of transformers and tjx."""

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from tjx_nn.config import TransformerConfig
from tjx_nn.hf.family import ComputedFields, Json
from tjx_nn.problems import raise_problems
from tjx_nn.sub_configs import RopeConfig, RopeScaling

# tjx scaling of each transformers rope type, and the transformers keys of its numbers.
_SCALINGS: dict[str, RopeScaling] = {
    "default": "none",
    "linear": "linear",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
    "su": "longrope",
}
_COMMON = ("default", "linear", "llama3", "yarn")
_NUMBERS: dict[RopeScaling, dict[str, str]] = {
    "none": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_seq_len": "original_max_position_embeddings",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_seq_len": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
    "longrope": {
        "factor": "factor",
        "original_seq_len": "original_max_position_embeddings",
        "attention_factor": "attention_factor",
    },
}
_LISTS = {"short_factors": "short_factor", "long_factors": "long_factor"}
# Keys of YaRN from which transformers computes a missing attention_factor.
_MSCALES = ("mscale", "mscale_all_dim")
_LARGEST_NUMBER = 1e15
# Keys of transformers 5, and those of earlier versions.
_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")


def rope(
    *,
    base: float = 10000.0,
    rotary: float | None = None,
    types: Collection[str] = _COMMON,
    interleaved: bool = False,
) -> ComputedFields:
    """Convert the RoPE configuration of a family.

    transformers 5 stores it in rope_parameters; earlier versions in rope_theta and rope_scaling,
    whose rope type could be named "type".

    Parameters
    ----------
    base
        Base of a config.json without one.
    rotary
        Fraction of rotated features of a config.json without one; None for a family that always
        rotates all.
    types
        Supported values of rope_type.
    interleaved
        Whether a pair of rotated features is side by side.
    """
    read = partial(_read_rope, base=base, rotary=rotary, types=types, interleaved=interleaved)
    return ComputedFields(keys=_KEYS, read=read, write=partial(_write_rope, rotary=rotary))


def dual_rope(
    *, base: float, local_base: float, local_key: str | None, keys: Sequence[str] = _KEYS
) -> ComputedFields:
    """Convert the RoPE configurations of blocks without and with a window (Gemma 3, OLMo 3).

    transformers 5 stores each in rope_parameters; earlier versions in rope_theta, rope_scaling and
    a key of the family.

    Parameters
    ----------
    base, local_base
        Bases of a config.json without them.
    local_key
        Key of earlier versions of the base of blocks with a window; None if there was none.
    keys
        Keys of the other blocks.
    """
    full, local = "full_attention", "sliding_attention"

    def read(config_json: Json) -> dict[str, Any]:
        given = config_json.get("rope_parameters") or {}
        if not isinstance(given, Mapping) or given.keys() - {full, local}:
            raise ValueError(f"rope_parameters: got {str(given)[:60]}; expected {full} and {local}")
        every = {key: value for key, value in config_json.items() if key != "rope_parameters"}
        of_full = every | {"rope_parameters": given.get(full)}
        of_local = {
            "rope_parameters": given.get(local),
            "rope_theta": config_json.get(local_key) if local_key else None,
        }
        fields = _read_rope(of_full, base=base)
        found: RopeConfig = _read_rope(of_local, base=local_base)["rope"]
        if found != RopeConfig(base=found.base):
            raise ValueError(f"rope_parameters.{local}: got {given[local]}; expected no scaling")
        values = {name: getattr(fields["rope"], name) for name in fields["rope"].__dict__}
        return {"rope": RopeConfig(**values | {"local_base": found.base})}

    def write(config: TransformerConfig) -> dict[str, Any]:
        every = _write_rope(config)["rope_parameters"]
        theta = config.rope.local_base or config.rope.base
        return {
            "rope_parameters": {full: every, local: {"rope_type": "default", "rope_theta": theta}}
        }

    all_keys = (*keys, local_key) if local_key else keys
    return ComputedFields(keys=all_keys, read=read, write=write)


def _read_rope(
    config_json: Json,
    *,
    base: float,
    rotary: float | None = None,
    types: Collection[str] = _COMMON,
    interleaved: bool = False,
) -> dict[str, Any]:
    present = [
        value
        for key in ("rope_parameters", "rope_scaling")
        if (value := config_json.get(key)) is not None
    ]
    if len(present) == 2 and present[0] != present[1]:
        raise ValueError(
            f"rope_scaling: got {str(present[1])[:60]} with rope_parameters; expected one of both"
        )
    given = present[0] if present else {}
    if not isinstance(given, Mapping):
        raise ValueError(f"rope_parameters: got {str(given)[:60]}; expected an object")
    kinds = (given.get("rope_type"), given.get("type"), "default")
    kind = next(kind for kind in kinds if kind is not None)
    if not isinstance(kind, str) or kind not in types:
        raise ValueError(f"rope_type: got {kind!r}; expected one of {list(types)}")
    names = _NUMBERS[_SCALINGS[kind]]
    numbers: dict[str, Any] = {
        field: read_number(given, key) for field, key in names.items() if given.get(key) is not None
    }
    longrope = _SCALINGS[kind] == "longrope"
    if "factor" in names and "factor" not in numbers and not longrope:
        raise ValueError(f"factor: missing; expected a number for rope_type {kind!r}")
    if "original_seq_len" in names:
        length = numbers.pop("original_seq_len", config_json.get("max_position_embeddings", 0))
        numbers["original_seq_len"] = int(length)
    # Old checkpoints have this key at the top level.
    options = {"partial_rotary_factor": config_json.get("partial_rotary_factor"), **given}
    # Supported values of other keys: the defaults.
    supported = {"truncate": True, "partial_rotary_factor": 1.0}
    known = {"rope_type", "type", "rope_theta", *names.values()}
    if kind == "yarn":
        known.update(_MSCALES, ["truncate"])
        numbers["attention_factor"] = _attention_factor(given, numbers)
        numbers["truncate"] = given.get("truncate", True)
        if type(numbers["truncate"]) is not bool:
            raise ValueError(f"truncate: got {str(given['truncate'])[:60]}; expected a boolean")
    if longrope:
        known.update(_LISTS.values())
        numbers |= {field: _read_numbers(given, key) for field, key in _LISTS.items()}
    if rotary is not None:
        known.add("partial_rotary_factor")
        numbers["dim"] = _rotary_dim(config_json, options, rotary)
    raise_problems(
        [
            f"rope_parameters.{name}: got {value!r}; expected no such key, which tjx does not "
            "support"
            for name, value in options.items()
            if name not in known and value is not None and supported.get(name) != value
        ]
    )
    source = config_json if given.get("rope_theta") is None else given
    base = base if source.get("rope_theta") is None else read_number(source, "rope_theta")
    scaling = _SCALINGS[kind]
    return {"rope": RopeConfig(base=base, scaling=scaling, interleaved=interleaved, **numbers)}


def _attention_factor(given: Json, numbers: Mapping[str, float]) -> float | None:
    """Return the factor of rotated queries and keys of YaRN; None for tjx's default."""
    default = yarn_scale(numbers["factor"])
    factor = numbers.get("attention_factor", default)
    if "attention_factor" not in numbers and all(given.get(key) for key in _MSCALES):
        of_rotary, of_all = (
            yarn_scale(numbers["factor"], read_number(given, key)) for key in _MSCALES
        )
        factor = of_rotary / of_all
    return None if factor == default else factor


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """Return YaRN's scale of queries and keys for a factor of the context length.

    Parameters
    ----------
    factor
        Factor of the context length; below 1 it counts as 1.
    weight
        mscale or mscale_all_dim of config.json (DeepSeek); 1 is the scale of the paper.
    """
    return 0.1 * weight * math.log(max(factor, 1)) + 1


def _rotary_dim(config_json: Json, options: Json, rotary: float) -> int | None:
    """Return the number of rotated features of a head; None for all."""
    if options.get("partial_rotary_factor") is not None:
        rotary = read_number(options, "partial_rotary_factor")
    head_dim = head_features(config_json)
    dim = int(head_dim * rotary)
    return None if dim == head_dim else dim


def head_features(config_json: Json) -> int:
    """Return the number of features of a head; 0 if the sizes are invalid."""
    given: int | None = config_json.get("head_dim")
    heads: int = config_json["num_attention_heads"] or 1
    return given or config_json["hidden_size"] // heads


def read_number(given: Json, name: str) -> float:
    """Return a number of an object of config.json.

    Raises
    ------
    ValueError
        If the value is no number, or too large.
    """
    value = given[name]
    if type(value) not in (int, float) or not abs(value) < _LARGEST_NUMBER:
        raise ValueError(
            f"{name}: got {str(value)[:60]}; expected a number below {_LARGEST_NUMBER:g}"
        )
    return float(value)


def _read_numbers(given: Json, name: str) -> tuple[float, ...]:
    """Return the numbers of a list of config.json."""
    values = given.get(name)
    if not isinstance(values, list):
        raise ValueError(f"{name}: got {str(values)[:60]}; expected a list of numbers")
    return tuple(read_number({name: value}, name) for value in values)


def _write_rope(config: TransformerConfig, *, rotary: float | None = None) -> dict[str, Any]:
    given = config.rope
    kinds = (kind for kind, scaling in _SCALINGS.items() if scaling == given.scaling)
    names = _NUMBERS.get(given.scaling, {})
    numbers: dict[str, Any] = {
        key: value for field, key in names.items() if (value := getattr(given, field)) is not None
    }
    if given.scaling == "yarn" and not given.truncate:
        numbers["truncate"] = False
    if given.scaling == "longrope":
        numbers |= {key: list(getattr(given, field)) for field, key in _LISTS.items()}
    if rotary is not None:
        numbers["partial_rotary_factor"] = (given.dim or config.head_dim) / config.head_dim
    kind = next(kinds, "default")
    return {"rope_parameters": {"rope_type": kind, "rope_theta": given.base, **numbers}}
