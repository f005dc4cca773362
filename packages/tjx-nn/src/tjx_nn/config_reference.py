"""Reference tables of all configuration fields, in Markdown.

`python -m tjx_nn.config_reference` prints the tables of CONFIG.md.
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
    """Format every field of every configuration as Markdown tables."""
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
    """Return whether a field belongs to the table of its class, not of a base or nested class."""
    hint = get_type_hints(kind)[name]
    if is_dataclass(hint):  # nested configurations have their own tables
        return False
    derived = issubclass(kind, TransformerConfig) and kind is not TransformerConfig
    return not (derived and name in TransformerConfig.__dataclass_fields__)


def _values(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(str(value) for value in get_args(hint))
    if hint == tuple[float, ...]:
        return "numbers"
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    if not kinds or get_origin(hint) is tuple:
        return (
            "integer"
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
    shown = {None: "none", True: "true", False: "false", (): "none"}
    known = entry.default is None or isinstance(entry.default, bool | tuple)
    return shown[entry.default] if known else str(entry.default)


def _about(kind: type, name: str) -> str:
    """Return the description of a field in the docstring of its class."""
    text = kind.__doc__ or ""
    match = re.search(rf"^    {name}\n((?:        .*\n)+)", text, re.MULTILINE)
    assert match is not None, f"{kind.__name__} does not document {name}"
    return " ".join(match[1].split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(config_table() + "\n")
