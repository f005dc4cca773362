"""Conversion of layer_types and sliding_window of transformers to the windows of a tjx model."""

from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any

from tjx_nn.config import TransformerConfig
from tjx_nn.hf.family import ComputedFields, Json

FULL, SLIDING = "full_attention", "sliding_attention"


def uniform_window() -> ComputedFields:
    """Convert the window of all blocks, which the key use_sliding_window enables (Qwen3-MoE)."""
    return ComputedFields(
        keys=["sliding_window", "use_sliding_window"],
        read=lambda json: {"window": _read_window(json, optional=True, default=None)},
        write=lambda config: {
            "sliding_window": config.window, "use_sliding_window": config.window is not None,
        },
    )  # fmt: skip


def _read_window(config_json: Json, optional: bool, default: int | None) -> int | None:
    window = config_json.get("sliding_window", default)
    uses = config_json.get("use_sliding_window", False) if optional else True
    window = window if uses else None
    if type(uses) is not bool or type(window) not in (int, NoneType):
        raise ValueError(
            f"use_sliding_window: got {uses!r} with sliding_window {window!r}; expected a boolean "
            "and an integer"
        )
    return window


def fixed_interval(selected: Sequence[bool]) -> tuple[int | None, bool]:
    """Return n if every n-th layer is selected, None if none is, and whether one of both holds."""
    every = selected.index(True) + 1 if True in selected else None
    pattern = [every is not None and (i + 1) % every == 0 for i in range(len(selected))]
    return every, list(selected) == pattern


def layer_windows(
    is_full: Callable[[Json, int], bool],
    *,
    keys: Sequence[str] = (),
    optional: bool = False,
    default: int | None = None,
    global_first: bool = False,
) -> ComputedFields:
    """Convert attention windows that blocks have by type, with full ones at a fixed interval.

    Parameters
    ----------
    is_full
        Returns whether block i has no window, for a config.json without layer_types.
    keys
        Further keys that `is_full` reads.
    optional
        Whether the key use_sliding_window, false by default, enables the windows (Qwen).
    default
        Window of a config.json without sliding_window.
    global_first
        Whether the family can have the full block first in every interval, `global_first`.
    """

    def read(config_json: Json) -> dict[str, Any]:
        window, count = (
            _read_window(config_json, optional, default),
            config_json["num_hidden_layers"],
        )
        numbers = {key: config_json[key] for key in keys if key in config_json}
        if any(type(number) is not int or number < 1 for number in numbers.values()):
            raise ValueError(f"{list(keys)}: got {numbers}; expected positive integers")
        kinds = config_json.get("layer_types") or [
            FULL if (optional and window is None) or is_full(config_json, layer) else SLIDING
            for layer in range(count)
        ]
        if (
            not isinstance(kinds, list)
            or len(kinds) != count
            or not all(isinstance(kind, str) for kind in kinds)
        ):
            raise ValueError(
                f"layer_types: got {str(kinds)[:60]}; expected a type for each of {count} layers"
            )
        full = [kind == FULL for kind in kinds]
        if all(full):
            return {"window": None}
        every, regular = fixed_interval(full)
        first = global_first and not regular and full[0]
        if first:  # the full blocks after the first one are at the end of an interval again
            every, regular = fixed_interval(full[1:])
            every = every or count
        if window is None or not regular or set(kinds) - {FULL, SLIDING}:
            raise ValueError(
                f"layer_types: got {str(kinds)[:200]} with sliding_window {window}; expected "
                f"{SLIDING!r}, with {FULL!r} at a fixed interval"
            )
        return {"window": window, "global_every": every, "global_first": first}

    def write(config: TransformerConfig) -> dict[str, Any]:
        window = next((window for window in config.windows if window is not None), None)
        entries = {"use_sliding_window": window is not None} if optional else {}
        kinds = [FULL if window is None else SLIDING for window in config.windows]
        return {**entries, "sliding_window": window, "layer_types": kinds}

    own = ["layer_types", "sliding_window", *(["use_sliding_window"] if optional else [])]
    return ComputedFields(keys=[*own, *keys], read=read, write=write)
