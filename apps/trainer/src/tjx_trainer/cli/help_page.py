"""``--help``: flags by section, with descriptions, values under a preset, and units."""

import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Literal, get_args, get_origin

from tjx_core import ConfigError, nearest_name
from tjx_trainer.cli.arguments import COMMANDS, parse_args, resolve
from tjx_trainer.cli.nanogpt.flags import FLAGS
from tjx_trainer.cli.values import format_value, union_members
from tjx_trainer.config.config_tree import Leaf, flatten, leaves
from tjx_trainer.config.presets import DEFAULT_PRESET, load_preset, preset_names, section_names
from tjx_trainer.config.run_config import Config

HELP_FLAGS = frozenset({"--help", "-h"})

_USAGE = """\
usage: trainer [--config NAME_OR_PATH] [--section.name VALUE] ...
       trainer COMMAND ...
       trainer --nanogpt [config/FILE.py] [--batch_size=32] ...
       trainer --help [SECTION | presets] [--config NAME_OR_PATH]
       trainer --version
"""

_OWN_FLAGS = {
    "--supervise": "Restart after a crash; give up after 3 attempts without a newer checkpoint. "
    "[false]",
    "--dry_run": "Prepare the data, compile the step and report the run; train nothing. [false]",
    "--eval_only": "Evaluate the initial parameters (--train.init_from); train and write nothing. "
    "[false]",
    "--nanogpt": "Accept the flags and config files of nanoGPT's train.py; `--nanogpt --help` "
    "lists them. [false]",
}


def help_text(argv: Sequence[str] = ()) -> str:
    """Return the help page, with the values of the preset that the command line names.

    Parameters
    ----------
    argv : sequence of str
        The arguments. A word after ``--help`` selects a section, or ``presets``.

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
    lines = [*_USAGE.splitlines(), "", "Commands (each has its own --help):"]
    lines += [line for command in COMMANDS.items() for line in _item(*command)]
    lines += ["", "Presets (details: `--help presets`):", *_presets(whole=False)]
    lines += ["", "Sections (flags of one: `--help SECTION`):"]
    lines += [line for item in about.items() for line in _item(*item)]
    lines += ["", *_wrapped(f"Flags, with the value under --config {name} and its unit:")]
    lines += _item("--config", f"Preset, by name or path of a .yaml file. [{name}]")
    for flag, about_flag in _OWN_FLAGS.items():
        lines += _item(flag, about_flag)
    lines += _flags(values, "", name)
    lines += ["", *_wrapped(
        "Values are text, numbers, true or false, none where listed, or comma-separated lists."
    )]  # fmt: skip
    return _text(lines)


def nanogpt_help_text() -> str:
    """Return the help page of ``--nanogpt``: the flags of train.py and their defaults there."""
    lines = [
        "usage: trainer --nanogpt [config/FILE.py] [--batch_size=32] ... [--section.name VALUE]",
        "",
        *_wrapped("Flags of nanoGPT's train.py, with its defaults; flags of the trainer override."),
    ]
    for name, flag in FLAGS.items():
        lines += _item(f"--{name}", f"{flag.about} [{flag.default}]")
    return _text(lines)


def _text(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n"


def _topic(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Return the section after ``--help``, and the other arguments."""
    words, topic = list(argv), ""
    for at, word in enumerate(words[:-1]):
        if word in HELP_FLAGS and not words[at + 1].startswith("-"):
            topic = words.pop(at + 1)
            break
    known = ["presets", *section_names()]
    if topic and topic not in known:
        near = nearest_name(topic, [*known, *leaves()])
        hint = f"; did you mean {near.partition('.')[0]}?" if near else ""
        top = [name for name in known if "." not in name]
        raise ConfigError([f"--help: got {topic!r}; expected one of {', '.join(top)}{hint}"])
    return topic, [word for word in words if word not in HELP_FLAGS]


def _values(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    name = parse_args(words).config
    try:
        return name, flatten(resolve(["--config", name]))
    except ConfigError:  # help works with an invalid preset
        return DEFAULT_PRESET, flatten(resolve(["--config", DEFAULT_PRESET]))


def _presets(*, whole: bool) -> Iterator[str]:
    for name in preset_names():
        preset = load_preset(name)
        about = preset.description if whole else preset.head.get("What", preset.description)
        yield from _item(name, about)


def _flags(values: dict[str, Any], topic: str, preset: str) -> Iterator[str]:
    """Yield the flags of a section and its subsections, or of all, under a line per section."""
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
        yield from _wrapped(f"In brackets: the value under --config {preset} and its unit.")


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
    """Return the description of every field from its class's docstring; the summary under ''."""
    import docstring_parser  # imported for --help only

    about: dict[str, str] = {}
    for kind in reversed(owner.__mro__[:-1]):  # inherited fields
        parsed = docstring_parser.parse_from_object(kind)
        about |= {p.arg_name: " ".join((p.description or "").split()) for p in parsed.params}
        about[""] = parsed.short_description or ""
    return about


UNITS: Mapping[str, str] = {
    "scale.depth": "blocks",
    "scale.flops": "FLOPs",
    "scale.tokens_per_parameter": "tokens",
    "scale.width_per_layer": "features",
    "scale.head_size": "features",
    "model.n_layer": "blocks",
    "model.n_encoder_layer": "blocks",
    "model.n_head": "heads",
    "model.n_kv_head": "heads",
    "model.sparse.n_head": "heads",
    "model.d_model": "features",
    "model.d_head": "features",
    "model.d_ff": "features",
    "model.mup_base": "features",
    "model.mup_base_depth": "blocks",
    "model.rope.dim": "features",
    "model.latent.kv_dim": "features",
    "model.latent.q_dim": "features",
    "model.latent.rope_dim": "features",
    "model.latent.v_dim": "features",
    "model.sparse.head_dim": "features",
    "model.experts.d_ff": "features",
    "model.max_seq_len": "tokens",
    "model.window": "tokens",
    "model.rope.original_seq_len": "tokens",
    "model.relative_max_distance": "tokens",
    "model.sparse.top_k": "tokens",
    "model.attention_soft_cap": "nats",
    "model.logit_soft_cap": "nats",
    "model.global_every": "blocks",
    "model.nope_every": "blocks",
    "model.nope_temperature_length": "tokens",
    "model.remat_every": "blocks",
    "model.experts.first_layer": "blocks",
    "model.experts.every": "blocks",
    "model.experts.count": "experts",
    "model.experts.per_token": "experts",
    "model.experts.shared": "experts",
    "model.experts.group_top_k": "experts",
    "model.experts.groups_per_token": "groups",
    "model.vocab_size": "token ids",
    "model.source_vocab_size": "token ids",
    "model.tokenizer_size": "token ids",
    "model.vocab_multiple": "rows",
    "model.n_token_types": "segments",
    "model.n_classes": "classes",
    "model.image_size": "pixels",
    "model.patch_size": "pixels",
    "data.augment.crop": "pixels",
    "data.augment.erase": "share",
    "data.seq_len": "tokens",
    "data.vocab_size": "token ids",
    "data.holdout_fraction": "share",
    "train.max_steps": "steps",
    "train.batch_size": "sequences",
    "train.accumulation": "pieces",
    "train.device_batch_size": "sequences",
    "train.eval_every": "steps",
    "train.eval_tokens": "tokens",
    "train.sample_tokens": "tokens",
    "train.sample_top_k": "tokens",
    "optimizer.learning_rate": "a step",
    "optimizer.weight_decay": "a step",
    "schedule.warmup_steps": "steps",
    "schedule.warmup_fraction": "of the run",
    "schedule.decay_steps": "steps",
    "schedule.decay_fraction": "of the run",
    "schedule.cooldown_steps": "steps",
    "schedule.cooldown_fraction": "of the run",
    "schedule.final_fraction": "of the peak",
    "schedule.start_fraction": "of the peak",
    "guard.max_skipped": "steps",
    "guard.growth_interval": "steps",
    "mesh.stage": "devices",
    "mesh.data": "devices",
    "mesh.fsdp": "devices",
    "mesh.context": "devices",
    "mesh.expert": "devices",
    "mesh.tensor": "devices",
    "distributed.num_processes": "processes",
    "distributed.heartbeat_timeout": "seconds",
    "distributed.start_timeout": "seconds",
    "checkpoint.every": "steps",
    "checkpoint.keep": "checkpoints",
    "checkpoint.keep_every": "steps",
    "checkpoint.keep_best": "checkpoints",
    "log.every": "steps",
    "log.layer_norms_every": "steps",
    "log.histograms_every": "steps",
    "log.samples_every": "steps",
    "profile.steps": "steps",
    "watchdog.factor": "times",
    "watchdog.min_seconds": "seconds",
    "watchdog.heartbeat_seconds": "seconds",
}
"""Units in ``--help`` by dotted name; numbers without an entry are dimensionless."""
