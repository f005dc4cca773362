"""The choices of a model as a table, made from the fields of its configuration.

`python -m tjx_nn.config_reference` prints the tables of the README.
"""

import re
import sys
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tjx_nn.config import TransformerConfig
from tjx_nn.models.bert_config import BertConfig
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.models.vit_config import ViTConfig
from tjx_nn.sub_configs import ExpertsConfig, LatentConfig, RopeConfig, SparseConfig

_TABLES: dict[str, tuple[type, str]] = {
    "All models": (TransformerConfig, ""),
    "`rope`": (RopeConfig, "rope."),
    "`latent`": (LatentConfig, "latent."),
    "`sparse`": (SparseConfig, "sparse."),
    "`experts`": (ExpertsConfig, "experts."),
    "`GPTConfig`": (GPTConfig, ""),
    "`BertConfig`": (BertConfig, ""),
    "`ViTConfig`": (ViTConfig, ""),
    "`EncoderDecoderConfig`": (EncoderDecoderConfig, ""),
}


def config_table() -> str:
    """Return every field of every configuration, in Markdown."""
    lines: list[str] = []
    for title, (kind, prefix) in _TABLES.items():
        lines += [f"**{title}**", "", "| field | values | default | |", "|---|---|---|---|"]
        lines += [
            f"| `{prefix}{entry.name}` | {_values(get_type_hints(kind)[entry.name])} "
            f"| {_default(entry)} | {_about(kind, entry.name)} |"
            for entry in fields(kind)
            if entry.init and _is_own(kind, entry.name)
        ]
        lines.append("")
    return "\n".join(lines).rstrip()


def _is_own(kind: type, name: str) -> bool:
    """Whether a field is told of in the class's own table."""
    hint = get_type_hints(kind)[name]
    if is_dataclass(hint):  # it has a table of its own
        return False
    inherited = kind is not TransformerConfig and name in TransformerConfig.__dataclass_fields__
    return not inherited


def _values(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(str(value) for value in get_args(hint))
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    if not kinds or get_origin(hint) is tuple:
        return (
            "whole number"
            if hint is int
            else {float: "number", bool: "true, false"}.get(
                hint, "text" if hint is str else "height and width"
            )
        )
    return " or ".join(_values(kind) for kind in kinds) + (
        " or none" if NoneType in get_args(hint) else ""
    )


def _default(entry: "Field[Any]") -> str:
    assert entry.default is not MISSING
    shown = {None: "none", True: "true", False: "false"}
    known = entry.default is None or isinstance(entry.default, bool)
    return shown[entry.default] if known else str(entry.default)


def _about(kind: type, name: str) -> str:
    """Return what the docstring says of a field."""
    text = kind.__doc__ or ""
    found = re.search(rf"^    {name}\n((?:        .*\n)+)", text, re.MULTILINE)
    assert found is not None, f"{kind.__name__} says nothing of {name}"
    return " ".join(found[1].split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(config_table() + "\n")
