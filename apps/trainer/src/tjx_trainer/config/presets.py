"""Presets: YAML files of values by dotted name, read with a line number for every mistake."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from tjx_core import nearest_name
from tjx_trainer import extensions
from tjx_trainer.config.config_tree import leaves

DEFAULT_PRESET = "quickstart"

# Keys of a run directory's config.yaml besides the configuration.
PROVENANCE_KEYS = ("versions", "git")

# Fields whose defaults changed: a run keeps the value that it was started with.
FIELDS_WITH_CHANGED_DEFAULTS = (
    "data.windows", "data.holdout", "model.scale_embeddings", "model.tokenizer_size"
)  # fmt: skip

# Named parts of the comment at the head of each shipped preset: model, data, duration, results.
HEAD = ("What", "Data", "Time", "Reaches")
_HEAD_LINE = re.compile(r"# ([A-Z][a-z]+): (.+)")

MAX_PRESET_BYTES = 100_000  # bytes; a preset is a page of text, and PyYAML takes a second for these
MAX_PROBLEMS = 50  # reported per file

# Tags of plain YAML values. An explicit tag such as !!python/object would change the value's
# meaning.
_PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{kind}"
    for kind in ("null", "bool", "int", "float", "str", "timestamp", "seq", "map", "merge")
)


@dataclass(frozen=True)
class RawValue:
    """A value as text, and its origin.

    Attributes
    ----------
    raw : str, list of str, or None
        The text; a list for a YAML list; None for YAML's null.
    where : str
        Origin in messages, such as ``--train.batch_size`` or ``my.yaml:3: train.batch_size``.
    """

    raw: str | list[str] | None
    where: str


@dataclass(frozen=True)
class Preset:
    """Content of a preset file.

    Attributes
    ----------
    name : str
        File name without its extension.
    description : str
        The comment at the head of the file.
    head : mapping of str to str
        Parts of that comment of the form ``# Name: text``; see `HEAD`.
    values : mapping of str to RawValue
        Values by dotted name.
    problems : list of str
        Mistakes in the file, a line each.
    """

    name: str
    description: str
    head: Mapping[str, str]
    values: Mapping[str, RawValue]
    problems: list[str]


def preset_names() -> list[str]:
    """Return the names of the shipped presets."""
    files = (resources.files("tjx_trainer") / "configs").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def load_preset(name_or_path: str) -> Preset:
    """Read a preset by name or path.

    Parameters
    ----------
    name_or_path : str
        A name of `preset_names`; text with a path separator or the extension .yaml or .yml is a
        path.

    Returns
    -------
    Preset
        Mistakes are in its ``problems``; none is raised.
    """
    path = Path(name_or_path)
    if is_preset_path(name_or_path):
        text, problem = read_preset_file(path)
        label = name_or_path
    elif name_or_path in preset_names():
        folder = resources.files("tjx_trainer") / "configs"
        text, problem = (folder / f"{name_or_path}.yaml").read_text(encoding="utf-8"), ""
        label = f"{name_or_path}.yaml"
    else:
        return Preset(name_or_path, "", {}, {}, [_unknown_preset(name_or_path)])
    if problem:
        return Preset(path.stem, "", {}, {}, [f"--config: got {name_or_path}; {problem}"])
    values, problems = _read_values(text, label)
    return Preset(path.stem, describe(text), read_head(text), values, problems)


def is_preset_path(name_or_path: str) -> bool:
    """Return whether a value of ``--config`` is a path; else it is a name."""
    path = Path(name_or_path)
    return path.suffix in {".yaml", ".yml"} or path.name != name_or_path


def describe(text: str) -> str:
    """Return the comment at the head of a preset as one line."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return " ".join(lines)


def read_head(text: str) -> dict[str, str]:
    r"""Return the named parts of the comment at the head of a preset.

    Examples
    --------
    >>> read_head("# What: a model\n#   of text.\n# Time: a minute.\nmodel:\n")
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
    """Return the dotted names most similar to a wrong name, best first.

    Examples
    --------
    >>> suggest_names("model.n_layers")
    ['model.n_layer']
    >>> suggest_names("n_head")
    ['model.n_head', 'model.sparse.n_head']
    >>> suggest_names("optimizer.lr")
    ['optimizer.learning_rate']
    """
    wanted = name.lower().replace("-", "_")
    own_name = wanted.rpartition(".")[2]
    by_own_name: dict[str, list[str]] = {}
    for leaf in leaves():
        by_own_name.setdefault(leaf.rpartition(".")[2], []).append(leaf)
    if wanted in leaves():
        return [wanted]
    whole = nearest_name(wanted, leaves(), cutoff=0.8)
    section = wanted.rpartition(".")[0]
    initials = [
        leaf
        for leaf in leaves()
        if leaf.rpartition(".")[0] == section and own_name == _initials(leaf.rpartition(".")[2])
    ]
    if section and initials:
        return initials
    if "." in wanted and whole and nearest_name(own_name, [whole.rpartition(".")[2]]):
        return [whole]
    if own_name in by_own_name:
        return sorted(by_own_name[own_name], key=lambda leaf: leaf.count("."))
    # Initials of a name, as lr of learning_rate, or one of its words, as steps.
    short = [
        leaf
        for other, named in by_own_name.items()
        for leaf in named
        if own_name in {_initials(other), *other.split("_")}
    ]
    near = nearest_name(own_name, by_own_name, cutoff=0.7)
    return short or (by_own_name[near] if near else [whole] if whole else [])


def _initials(name: str) -> str:
    return "".join(word[:1] for word in name.split("_"))


def _unknown_preset(name: str) -> str:
    near = nearest_name(name.lower().replace("-", "_"), preset_names())
    with suppress(OSError):  # the name may be too long for a file
        if (Path(name) / "config.yaml").exists():
            near = str(Path(name) / "config.yaml")
    hint = f"; did you mean {near}?" if near else ""
    return f"--config: got {name}; expected a path or one of {', '.join(preset_names())}{hint}"


def read_preset_file(path: Path) -> tuple[str, str]:
    """Return the text of a preset file and "", or "" and the problem."""
    if path.is_dir():
        inside = path / "config.yaml"
        instead = inside if inside.exists() else "a .yaml file"
        return "", f"expected a file, not a folder; give {instead}"
    if path.is_fifo() and not path.is_relative_to("/dev"):
        return "", "expected a file, not a pipe, which could block forever"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PRESET_BYTES + 1)
        if len(data) > MAX_PRESET_BYTES:
            return "", f"expected at most {MAX_PRESET_BYTES} bytes: is it a preset?"
        return data.decode("utf-8"), ""
    except FileNotFoundError:
        files = [*map(str, path.parent.glob("*.y*ml")), *preset_names()]
        near = nearest_name(str(path), files) or nearest_name(path.stem, preset_names())
        hint = f"; did you mean {near}?" if near else f"; presets are {', '.join(preset_names())}"
        return "", f"file not found{hint}"
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 (byte {error.start}); save it as UTF-8 text"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return "", f"the file cannot be read ({error})"


def compose(text: str, label: str) -> tuple[yaml.MappingNode | None, list[str]]:
    """Parse YAML into the node of its mapping, None if there is none, and the mistakes in it."""
    # Compose nodes instead of loading objects: nodes have line numbers, show repeated keys, and
    # keep text such as 6e-4 and `on`, which PyYAML would convert. Nothing is constructed from them.
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        return None, [
            f"{label}:{line}: not YAML ({error.problem}): write `section:`, then `  name: value`"
        ]
    except (yaml.YAMLError, RecursionError) as error:
        return None, [f"{label}: not YAML ({str(error).splitlines()[0]}): save it as plain text"]
    if root is None:
        return None, []
    if not isinstance(root, yaml.MappingNode) or root.tag not in _PLAIN_TAGS:
        return None, [f"{label}:1: expected sections, such as `model:`, with `  name: value` below"]
    return root, []


def _read_values(text: str, label: str) -> tuple[dict[str, RawValue], list[str]]:
    """Parse YAML into values by dotted name, and the mistakes in it."""
    root, problems = compose(text, label)
    return ({}, problems) if root is None else values_of(root, label)


def values_of(root: yaml.MappingNode, label: str) -> tuple[dict[str, RawValue], list[str]]:
    """Return the values of a mapping by dotted name, and the mistakes in it."""
    values: dict[str, RawValue] = {}
    problems: list[str] = []
    entries = list(_entries(root, "", label, problems))
    if missing := _not_imported(entries, label):
        return {}, missing  # keys of a model family that is not registered yet look unknown
    for name, node in entries:
        where = f"{label}:{node.start_mark.line + 1}: {name}"
        if len(problems) >= MAX_PROBLEMS:
            problems.append(f"{where}: and more; fix these first")
            break
        if node.tag not in _PLAIN_TAGS:
            problems.append(
                f"{where}: got the tag {node.tag[:60]}; expected a plain value; remove the tag"
            )
        elif name in values:
            problems.append(f"{where}: given twice; keep one")
        elif name not in leaves():
            problems.append(f"{where}: unknown key{_key_hint(name)}")
        elif isinstance(node, yaml.ScalarNode):
            is_null = node.tag == "tag:yaml.org,2002:null"
            values[name] = RawValue(None if is_null else node.value, where)
        elif isinstance(node, yaml.SequenceNode) and all(
            isinstance(item, yaml.ScalarNode) and item.tag in _PLAIN_TAGS for item in node.value
        ):
            values[name] = RawValue([item.value for item in node.value], where)
        else:
            problems.append(f"{where}: expected one value, not a section or nested lists")
    if any(key.value == PROVENANCE_KEYS[0] for key, _ in root.value):  # a run's config.yaml
        values = {**_legacy_values(values, label), **values}
    return values, problems


def _not_imported(entries: Iterable[tuple[str, yaml.Node]], label: str) -> list[str]:
    """Return the problem of a file that names extensions that are not imported, or nothing."""
    found: dict[str, str] = {}
    for name, node in entries:
        if name in extensions.FIELDS and not isinstance(node, yaml.MappingNode):
            value = node.value
            raw = [item.value for item in value] if isinstance(value, list) else value
            found |= {each: f"{name} {each}" for each in extensions.not_imported(raw)}
    if not found:
        return []
    return [
        f"{label}: got {', '.join(found.values())}; expected modules that are already imported, as "
        "a file causes no import; set the environment variable "
        f"{extensions.VARIABLE}={','.join(found)}"
    ]


def _legacy_values(values: Mapping[str, RawValue], label: str) -> dict[str, RawValue]:
    """Return the values that a config.yaml of an older version implies."""

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
    """Yield the values of a section and its subsections by dotted name."""
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
            problems.append(f"{label}:{line}: {name}: got the tag {value.tag[:60]}; remove it")
        elif isinstance(value, yaml.MappingNode):
            yield from _entries(value, f"{name}.", label, problems)
        elif value.value != "":  # a section with all lines commented out is empty
            problems.append(f"{label}:{line}: {name} is a section; write `  name: value` below it")


def section_names() -> list[str]:
    """Return the dotted names of all sections."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in leaves() if "." in name))


def _key_hint(name: str) -> str:
    nearest = None if "." in name else nearest_name(name, section_names())
    near = [nearest] if nearest else suggest_names(name)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    section = name.rpartition(".")[0]
    inside = [leaf.rpartition(".")[2] for leaf in leaves() if leaf.rpartition(".")[0] == section]
    return f"; {section or 'the top'} has {', '.join(inside)}"
