"""Presets: short YAML files of values by name, read so that every mistake in them has a line."""

import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from tjx_trainer.config.config_tree import leaves

DEFAULT_PRESET = "quickstart"

# What a run directory's config.yaml holds besides the configuration.
PROVENANCE_KEYS = ("versions", "git")

# Values whose defaults changed: a run keeps what it was started with (`_earlier_values`).
FIELDS_WITH_CHANGED_DEFAULTS = (
    "data.windows", "data.holdout", "model.scale_embeddings", "model.tokenizer_size"
)  # fmt: skip

# What the head of each preset that comes with the trainer says, in this order: what is trained, on
# what, how long that takes, and what it should reach.
HEAD = ("What", "Data", "Time", "Reaches")
_HEAD_LINE = re.compile(r"# ([A-Z][a-z]+): (.+)")

MAX_PRESET_BYTES = 100_000  # bytes; a preset is a page of text, and PyYAML takes a second for these
MAX_PROBLEMS = 50  # of a file; more are told when these are mended

# What plain YAML makes of a value. A tag that was written asks for something else, such as a
# Python object, and the value beside it would be taken for what it is not.
_PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{kind}"
    for kind in ("null", "bool", "int", "float", "str", "timestamp", "seq", "map", "merge")
)


@dataclass(frozen=True)
class RawValue:
    """A value as it was written, and where.

    Attributes
    ----------
    raw : str, list of str, or None
        The text; a list for a YAML list; None for YAML's null.
    where : str
        How a message names it, such as ``--train.batch_size`` or ``my.yaml:3: train.batch_size``.
    """

    raw: str | list[str] | None
    where: str


@dataclass(frozen=True)
class Preset:
    """What a preset's file says.

    Attributes
    ----------
    name : str
        The file's name without its ending.
    description : str
        The comment at the head of the file.
    head : mapping of str to str
        What of that comment has the form ``# Name: text``, by name; see `HEAD`.
    values : mapping of str to Given
        What is given, by dotted name.
    problems : list of str
        Everything wrong in the file, a line each.
    """

    name: str
    description: str
    head: Mapping[str, str]
    values: Mapping[str, RawValue]
    problems: list[str]


def preset_names() -> list[str]:
    """Return the names of the presets that come with the trainer."""
    files = (resources.files("tjx_trainer") / "configs").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def load_preset(name_or_path: str) -> Preset:
    """Read a preset, by its name or from a user's file.

    Parameters
    ----------
    name_or_path : str
        A name of `preset_names`; anything with a path separator or the ending .yaml or .yml is a
        path.

    Returns
    -------
    Preset
        With what could be read. What could not is told in its ``problems``, never raised.
    """
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"} or path.name != name_or_path:
        text, problem = _read_file(path)
        label = name_or_path
    elif name_or_path in preset_names():
        folder = resources.files("tjx_trainer") / "configs"
        text, problem = (folder / f"{name_or_path}.yaml").read_text(encoding="utf-8"), ""
        label = f"{name_or_path}.yaml"
    else:
        return Preset(name_or_path, "", {}, {}, [_unknown_preset(name_or_path)])
    if problem:
        return Preset(path.stem, "", {}, {}, [f"--config {name_or_path}: {problem}"])
    values, problems = _read_values(text, label)
    return Preset(path.stem, describe(text), read_head(text), values, problems)


def describe(text: str) -> str:
    """Return the comment at the head of a preset's text, as one line."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return " ".join(lines)


def read_head(text: str) -> dict[str, str]:
    r"""Return the named parts of the comment at the head of a preset's text.

    Examples
    --------
    >>> read_head("# What: a model\\n#   of text.\\n# Time: a minute.\\nmodel:\\n")
    {'What': 'a model of text.', 'Time': 'a minute.'}
    """
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if part := _HEAD_LINE.fullmatch(line):
            name = part[1]
            found[name] = part[2]
        elif name:
            found[name] += f" {line.lstrip('# ').rstrip()}"
    return found


def suggest_names(name: str) -> list[str]:
    """Return the dotted names that a wrong one most likely stands for, best first.

    Examples
    --------
    >>> nearest_names("model.n_layers")
    ['model.n_layer']
    >>> nearest_names("n_head")
    ['model.n_head']
    >>> nearest_names("optimizer.lr")
    ['optimizer.learning_rate']
    """
    wanted = name.lower().replace("-", "_")
    own_name = wanted.rpartition(".")[2]
    by_own_name: dict[str, list[str]] = {}
    for leaf in leaves():
        by_own_name.setdefault(leaf.rpartition(".")[2], []).append(leaf)
    if wanted in leaves():
        return [wanted]
    whole = difflib.get_close_matches(wanted, leaves(), n=1, cutoff=0.8)
    section = wanted.rpartition(".")[0]
    initials = [
        leaf
        for leaf in leaves()
        if leaf.rpartition(".")[0] == section and own_name == _initials(leaf.rpartition(".")[2])
    ]
    if section and initials:
        return initials
    if "." in wanted and whole:
        return whole
    if own_name in by_own_name:
        return sorted(by_own_name[own_name], key=lambda leaf: leaf.count("."))
    # Short for a name, as lr is for learning_rate; or one of its words, as steps is.
    short = [
        leaf
        for other, named in by_own_name.items()
        for leaf in named
        if own_name in {_initials(other), *other.split("_")}
    ]
    near = difflib.get_close_matches(own_name, by_own_name, n=1, cutoff=0.7)
    return short or (by_own_name[near[0]] if near else whole)


def _initials(name: str) -> str:
    return "".join(word[:1] for word in name.split("_"))


def _unknown_preset(name: str) -> str:
    near = difflib.get_close_matches(name.lower().replace("-", "_"), preset_names(), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    with suppress(OSError):  # a name may be longer than any file's
        if (Path(name) / "config.yaml").exists():
            hint = f"did you mean {Path(name) / 'config.yaml'}? "
    others = ", ".join(preset_names())
    return f"--config {name}: no preset has this name; {hint}(there are {others})"


def _read_file(path: Path) -> tuple[str, str]:
    """Return the text of a user's preset and an empty string, or nothing and what is wrong."""
    if path.is_dir():
        inside = path / "config.yaml"
        return "", f"this is a folder; give {inside if inside.exists() else 'a .yaml file'}"
    if path.is_fifo() and not path.is_relative_to("/dev"):
        return "", "this is a pipe, and nobody may ever write into it; give a file"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PRESET_BYTES + 1)
        if len(data) > MAX_PRESET_BYTES:
            return "", f"the file is larger than {MAX_PRESET_BYTES} bytes: is it a preset?"
        return data.decode("utf-8"), ""
    except FileNotFoundError:
        files = [*map(str, path.parent.glob("*.y*ml")), *preset_names()]
        near = difflib.get_close_matches(str(path), files, n=1)
        near = near or difflib.get_close_matches(path.stem, preset_names(), n=1)
        hint = (
            f"; did you mean {near[0]}?" if near else f"; presets are {', '.join(preset_names())}"
        )
        return "", f"there is no such file{hint}"
    except UnicodeDecodeError as error:
        return "", f"the file is not UTF-8 (byte {error.start}): save it as UTF-8 text"
    except (OSError, ValueError) as error:  # ValueError of a NUL in its name
        return "", f"the file cannot be read ({error})"


def _read_values(text: str, label: str) -> tuple[dict[str, RawValue], list[str]]:
    """Read YAML into values by dotted name, and what is wrong with it."""
    # Nodes instead of safe_load's objects: they know their lines, they show a key given twice,
    # and 6e-4 stays the text that the command line would give (PyYAML makes a string of it,
    # and of `on` a truth value). Nothing is constructed from them.
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        return {}, [
            f"{label}:{line}: not YAML ({error.problem}): write `section:`, then `  name: value`"
        ]
    except (yaml.YAMLError, RecursionError) as error:
        return {}, [f"{label}: not YAML ({str(error).splitlines()[0]}): save it as plain text"]
    if root is None:
        return {}, []
    if not isinstance(root, yaml.MappingNode) or root.tag not in _PLAIN_TAGS:
        return {}, [f"{label}:1: expected sections, such as `model:`, with `  name: value` below"]
    values: dict[str, RawValue] = {}
    problems: list[str] = []
    for name, node in _entries(root, "", label, problems):
        where = f"{label}:{node.start_mark.line + 1}: {name}"
        if len(problems) >= MAX_PROBLEMS:
            problems.append(f"{where}: and more; mend these first")
            break
        if node.tag not in _PLAIN_TAGS:
            problems.append(
                f"{where}: the tag {node.tag[:60]} asks for more than a value: leave it"
            )
        elif name in values:
            problems.append(f"{where} is given twice: keep one")
        elif name not in leaves():
            problems.append(f"{where}: there is no such key{_key_hint(name)}")
        elif isinstance(node, yaml.ScalarNode):
            is_null = node.tag == "tag:yaml.org,2002:null"
            values[name] = RawValue(None if is_null else node.value, where)
        elif isinstance(node, yaml.SequenceNode) and all(
            isinstance(item, yaml.ScalarNode) and item.tag in _PLAIN_TAGS for item in node.value
        ):
            values[name] = RawValue([item.value for item in node.value], where)
        else:
            problems.append(f"{where}: expected one value, not a section or nested lists")
    if any(key.value == PROVENANCE_KEYS[0] for key, _ in root.value):  # written by a run
        values = {**_earlier_values(values, label), **values}
    return values, problems


def _earlier_values(values: Mapping[str, RawValue], label: str) -> dict[str, RawValue]:
    """Return what a run's config.yaml meant by values that it does not hold."""

    def raw(name: str) -> str | list[str] | None:
        return values[name].raw if name in values else None

    earlier: dict[str, Any] = {"data.windows": "aligned", "data.holdout": "documents"}
    if raw("model.family") == "gpt":
        earlier["model.scale_embeddings"] = "false"
    if raw("model.family") in ("gpt", "bert") and raw("train.vocab_from_tokenizer") == "false":
        earlier["model.tokenizer_size"] = raw("model.vocab_size")
    return {name: RawValue(value, f"{label}: {name}") for name, value in earlier.items()}


def _entries(
    section: yaml.MappingNode, prefix: str, label: str, problems: list[str]
) -> Iterator[tuple[str, yaml.Node]]:
    """Yield what a section and the sections in it hold, by dotted name."""
    for key, value in section.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            problems.append(f"{label}:{line}: expected a name before the colon")
            continue
        name = f"{prefix}{key.value}"
        if name in PROVENANCE_KEYS or len(problems) > MAX_PROBLEMS:
            continue
        if name not in section_names():
            yield name, value
        elif value.tag not in _PLAIN_TAGS:
            problems.append(f"{label}:{line}: {name}: the tag {value.tag[:60]} is nothing here")
        elif isinstance(value, yaml.MappingNode):
            yield from _entries(value, f"{name}.", label, problems)
        elif value.value != "":  # a section whose lines are all commented out is empty
            problems.append(f"{label}:{line}: {name} is a section: write `  name: value` below it")


def section_names() -> list[str]:
    """Return the dotted names that hold others."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in leaves() if "." in name))


def _key_hint(name: str) -> str:
    sections = [] if "." in name else difflib.get_close_matches(name, section_names(), n=1)
    near = sections or suggest_names(name)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    section = name.rpartition(".")[0]
    inside = [leaf.rpartition(".")[2] for leaf in leaves() if leaf.rpartition(".")[0] == section]
    return f"; {section or 'the top'} has {', '.join(inside)}"
