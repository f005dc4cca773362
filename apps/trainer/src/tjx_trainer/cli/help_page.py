"""``--help``: every flag by section, with its line, its value under a preset and its unit."""

import difflib
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, Literal, get_args, get_origin

from tjx_trainer.cli.command_line import format_value, parse_args, resolve, union_members
from tjx_trainer.cli.subcommands import COMMANDS
from tjx_trainer.cli.units import UNITS
from tjx_trainer.config.config_tree import Leaf, flatten, leaves
from tjx_trainer.config.presets import DEFAULT_PRESET, load_preset, preset_names, section_names
from tjx_trainer.config.run_config import Config, ConfigError

ASKS_FOR_HELP = frozenset({"--help", "-h"})

_USAGE = """\
usage: trainer [--config NAME_OR_PATH] [--section.name VALUE] ...
       trainer COMMAND ...
       trainer --nanogpt [config/FILE.py] [--batch_size=32] ...
       trainer --help [SECTION | presets] [--config NAME_OR_PATH]
       trainer --version
"""

_OWN_FLAGS = {
    "--supervise": "Start again after a crash; give up after 3 lives without a newer checkpoint. "
    "[false]",
    "--dry_run": "Prepare the data, compile the step, say what the run would be; train nothing. "
    "[false]",
    "--eval_only": "Evaluate the parameters that the run would begin with (--train.init_from); "
    "train and write nothing. [false]",
    "--nanogpt": "Take the flags and config files of nanoGPT's train.py; `--nanogpt --help` lists "
    "them. [false]",
}


def help_text(argv: Sequence[str] = ()) -> str:
    """Describe the flags, with their values under the preset that the command line names.

    Parameters
    ----------
    argv : sequence of str
        The words. One right after ``--help`` names a section, whose flags alone are then told, or
        ``presets``.

    Raises
    ------
    ConfigError
        If there is no section of that name.
    """
    topic, words = _topic(argv)
    name, values = _values(words)
    if topic == "presets":
        return _text(_presets(whole=True))
    if topic:
        return _text(_flags(values, topic, name))
    sections = [each for each in section_names() if "." not in each]
    about = {n: w for n, w in _lines_of(Config).items() if n in sections}
    lines = [*_USAGE.splitlines(), "", "Commands, each with a --help of its own:"]
    lines += [line for command in COMMANDS.items() for line in _item(*command)]
    lines += ["", "Presets (`--help presets` says more):", *_presets(whole=False)]
    lines += ["", "Sections (`--help SECTION` tells its flags alone):"]
    lines += [line for item in about.items() for line in _item(*item)]
    lines += ["", *_wrapped(f"Flags, in brackets the value with --config {name}, and its unit:")]
    lines += _item("--config", f"Preset, by name or path of a .yaml file. [{name}]")
    for flag, said in _OWN_FLAGS.items():
        lines += _item(flag, said)
    lines += _flags(values, "", name)
    lines += ["", *_wrapped(
        "A value is text, a number, true or false, none where that is said, or a comma list."
    )]  # fmt: skip
    return _text(lines)


def _text(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n"


def _topic(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Return the section that help is asked about, and the other words."""
    words, topic = list(argv), ""
    for at, word in enumerate(words[:-1]):
        if word in ASKS_FOR_HELP and not words[at + 1].startswith("-"):
            topic = words.pop(at + 1)
            break
    known = ["presets", *section_names()]
    if topic and topic not in known:
        near = difflib.get_close_matches(topic, [*known, *leaves()], n=1)
        hint = f"did you mean {near[0].partition('.')[0]}? " if near else ""
        few = [name for name in known if "." not in name]
        raise ConfigError([f"--help {topic}: no section has this name; {hint}({', '.join(few)})"])
    return topic, [word for word in words if word not in ASKS_FOR_HELP]


def _values(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    name = parse_args(words).config
    try:
        return name, flatten(resolve(["--config", name]))
    except ConfigError:  # a mistake is told when the run is started; help always helps
        return DEFAULT_PRESET, flatten(resolve(["--config", DEFAULT_PRESET]))


def _presets(*, whole: bool) -> Iterator[str]:
    for name in preset_names():
        preset = load_preset(name)
        about = preset.description if whole else preset.head.get("What", preset.description)
        yield from _item(name, about)


def _flags(values: dict[str, Any], topic: str, preset: str) -> Iterator[str]:
    """Yield the flags of a section and those in it, or of all, below a line for each section."""
    section = None
    for leaf in leaves().values():
        where = leaf.name.rpartition(".")[0]
        if topic and where != topic and not where.startswith(f"{topic}."):
            continue
        if (where, leaf.owner) != section:
            section = where, leaf.owner
            if where:
                yield ""
                yield from _wrapped(f"{where}: {_lines_of(leaf.owner)['']}")
        about = _lines_of(leaf.owner).get(leaf.name.rpartition(".")[2], "")
        value = values.get(leaf.name, leaf.default)
        yield from _item(
            f"--{leaf.name}", f"{about}{_choices_text(leaf)} [{_with_unit(leaf, value)}]"
        )
    if topic:
        yield ""
        yield from _wrapped(f"In brackets: the value with --config {preset}, and its unit.")


def _with_unit(leaf: Leaf, value: Any) -> str:
    written = format_value(value).encode("unicode_escape").decode()
    unit = UNITS.get(leaf.name)
    if unit is None:
        return written
    return f"{written}; {unit}" if value is None else f"{written} {unit}"


def _choices_text(leaf: Leaf) -> str:
    options = [format_value(o) for c in union_members(leaf.hint) for o in get_args(c)]
    return f" ({', '.join(options)})" if get_origin(union_members(leaf.hint)[0]) is Literal else ""


def _width() -> int:
    return max(40, min(shutil.get_terminal_size().columns, 120))


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _width(), break_on_hyphens=False)


def _item(name: str, about: str) -> Iterator[str]:
    width = _width()
    column = 32 if width >= 72 else 12
    head = f"  {name}"
    if len(head) + 2 > column:
        yield head
        head = ""
    gap = " " * column
    yield from textwrap.wrap(
        about,
        width,
        initial_indent=head.ljust(column),
        subsequent_indent=gap,
        break_on_hyphens=False,
    ) or [head]


@cache
def _lines_of(owner: type) -> dict[str, str]:
    """Return the one line of every field from its class's docstring; the summary under ''."""
    import docstring_parser  # only --help needs it

    about: dict[str, str] = {}
    for kind in reversed(owner.__mro__[:-1]):  # fields may be inherited
        parsed = docstring_parser.parse_from_object(kind)
        about |= {p.arg_name: " ".join((p.description or "").split()) for p in parsed.params}
        about[""] = parsed.short_description or ""
    return about
