"""Fuzzing of presets and command lines."""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import yaml
from campaigns.fuzz_kind import Kind
from campaigns.fuzz_mutations import hostile, mutate_bytes, mutate_tree, spoil_file

from tjx_core import ConfigError
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.cli.values import convert, format_value
from tjx_trainer.config.config_tree import flatten, leaves
from tjx_trainer.config.presets import RawValue, preset_names
from tjx_trainer.config.run_config import Config

_LAUGHS = "".join(
    f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9 if n else ['ha'] * 9)}]\n" for n in range(12)
)
_EVIL_LINES = [
    "seed: !!python/object/apply:os.system ['true']",
    "seed: !!python/name:os.system 5",
    "seed: !!python/object/new:subprocess.Popen [['true']]",
    "model: !!python/module:os",
    "seed: !!binary aGk=",
    "seed: !!int '0x10'",
    "seed: !evil 3",
    "seed: !!set {1, 2}",
    _LAUGHS + "seed: *x11",
    "model: &m {n_layer: 2, rope: *m}",
    "model: &m\n  n_layer: *m",
    "<<: {seed: 5}",
    "seed: 1\nseed: 2",
    "? [a, b]\n: 3",
    "--- \nseed: 1\n---\nseed: 2",
    "%YAML 9.9\n---\nseed: 1",
    "model: " + "[" * 2000,
    "model: " + "{a: " * 2000,
    "seed: " + "9" * 5000,
    "train: {max_steps: 1e3}",
    "seed: 0x1F",
    "seed: 1_000",
    "seed: 010",
    "seed: 1:30",
    "\tseed: 1",
    "seed: |\n  5",
    "seed: '5\\x00'",
    "name: ../../etc",
    "data: {corpus: python-docs, path: /etc/passwd}",
]


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *sections, leaf = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = list(value) if isinstance(value, tuple) else value
    return tree


def _check_round_trip(config: Config, folder: Path) -> None:
    """Check that an accepted configuration survives writing and reading."""
    again = folder / "again.yaml"
    # Lone surrogates are possible on a command line, but not in a file.
    text = yaml.safe_dump(_nest(flatten(config)), allow_unicode=True)
    again.write_text(text, encoding="utf-8", errors="surrogateescape")
    try:
        found = flatten(resolve(["--config", str(again)]))
    except ConfigError as error:
        raise AssertionError(f"accepted, and rejected when written: {error}") from error
    wanted = flatten(config)
    differing = [name for name in wanted if repr(found.get(name)) != repr(wanted[name])]
    assert not differing, f"{differing[0]}: {wanted[differing[0]]!r} {found.get(differing[0])!r}"


class ConfigFile(Kind):
    """Fuzz kind: a preset file."""

    name = "config_file"
    errors: ClassVar[tuple[type[BaseException], ...]] = (ConfigError,)
    names_file: ClassVar[bool] = False  # contradictions are reported by field name

    def prepare(self, scratch: Path) -> None:
        """Read and resolve all presets."""
        del scratch
        self._flat = [dict(flatten(resolve(["--config", preset]))) for preset in preset_names()]

    def build(self, steps: Sequence[Random], folder: Path) -> None:
        """Write a preset and mutate its tree, lines or bytes."""
        file = folder / "preset.yaml"
        tree = _nest(self._flat[0])
        if steps:
            tree = _nest(steps[0].choice(self._flat))
        texts: list[Random] = []
        for step in steps:
            if step.random() < 0.6:
                tree = mutate_tree(tree, step)
            else:
                texts.append(step)
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        data = text.encode("utf-8", "surrogatepass")
        for step in texts:
            if step.random() < 0.02:
                spoil_file(file, step)
                return
            data = _change_text(data, step)
        file.write_bytes(data)

    def check(self, folder: Path) -> None:
        """Resolve the preset; an accepted one must equal PyYAML's result."""
        file = folder / "preset.yaml"
        config = resolve(["--config", str(file)])
        _check_round_trip(config, folder)
        try:
            yaml.safe_load(file.read_bytes())
        except yaml.YAMLError as error:
            raise AssertionError(f"accepted, and PyYAML rejects it: {error}") from error
        found = flatten(config)
        # As text: the command line decides the type of 6e-4 or 010.
        tree = yaml.load(file.read_bytes(), Loader=yaml.BaseLoader)  # noqa: S506  makes only texts
        for name, value in _flatten(tree or {}):
            if name in found and not isinstance(value, dict) and value not in ("null", "", "~"):
                wanted = convert(leaves()[name], RawValue(value, name))
                assert repr(wanted) == repr(found[name]), f"{name}: {wanted!r} {found[name]!r}"


def _flatten(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        found.append((f"{prefix}{key}", value))
        if isinstance(value, dict):
            found += _flatten(value, f"{prefix}{key}.")
    return found


def _change_text(data: bytes, random: Random) -> bytes:
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    kind = random.randrange(5)
    if kind == 0:
        return mutate_bytes(data, random)
    if kind == 1:
        return random.choice(_EVIL_LINES).encode()
    if kind == 2:
        lines.insert(random.choice([0, at, len(lines)]), random.choice(_EVIL_LINES).encode())
    elif kind == 3:
        lines[at] = random.choice([b" " + lines[at], lines[at].lstrip(), lines[at] * 2, b"- a"])
    else:
        name, colon, _ = lines[at].partition(b":")
        value = json.dumps(hostile(random))[:2000]
        lines[at] = name + colon + b" " + value.encode()
    return b"\n".join(lines)


class CommandLine(Kind):
    """Fuzz kind: the command-line arguments."""

    name = "command_line"
    errors: ClassVar[tuple[type[BaseException], ...]] = (ConfigError,)
    names_file: ClassVar[bool] = False

    def prepare(self, scratch: Path) -> None:
        """List the names of all flags."""
        del scratch
        self._names = list(leaves())
        self._defaults = flatten(resolve([]))

    def build(self, steps: Sequence[Random], folder: Path) -> None:
        """Write some flags with values and mutate some."""
        words: list[str] = []
        for step in steps:
            for _ in range(step.randint(1, 4)):
                words += self._flag(step)
            kind = step.randrange(6)
            at = step.randrange(len(words))
            if kind == 0:
                del words[at]
            elif kind == 1:
                words.insert(at, str(hostile(step))[:2000])
            elif kind == 2:
                words[at] = words[at][: step.randrange(len(words[at]) + 1)]
            elif kind == 3:
                words += words[at : at + 2]
        text = json.dumps(words)
        (folder / "words.json").write_text(text)

    def _flag(self, random: Random) -> list[str]:
        name = random.choice(self._names)
        if random.random() < 0.1:
            return ["--config", random.choice([*preset_names(), "nothing", "", "/etc/passwd", "."])]
        value = format_value(self._defaults.get(name))
        if random.random() < 0.5:
            value = str(hostile(random))[:2000]
        elif random.random() < 0.4:
            value = str(
                random.choice([0, 1, 2, 3, 4, 8, 64, 2**31, 10**12, 10**30, -1, 0.5, 1e300])
            )
        return [f"--{name}={value}"] if random.random() < 0.5 else [f"--{name}", value]

    def check(self, folder: Path) -> None:
        """Resolve the command line."""
        config = resolve(json.loads((folder / "words.json").read_text()))
        texts = [value for value in flatten(config).values() if isinstance(value, str)]
        if all(text.isprintable() for text in texts):
            _check_round_trip(config, folder)
