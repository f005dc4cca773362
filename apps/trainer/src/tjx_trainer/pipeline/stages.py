"""Stages of a pipeline: a YAML list of training runs, each of which starts from the one before."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import yaml

from tjx_core import ConfigError, Problem, nearest_name
from tjx_trainer.cli.arguments import parse_args, resolve
from tjx_trainer.config.config_tree import flatten
from tjx_trainer.config.presets import (
    RawValue,
    compose,
    is_preset_path,
    read_preset_file,
    values_of,
)
from tjx_trainer.config.run_config import Config
from tjx_trainer.sweep.grid import Grid, SweepRun

COMMON, STAGES = "common", "stages"
_STAGE_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
# These are the pipeline's own.
_REFUSED = ("run_dir", "train.init_from")
# Settings of the model that a stage may change.
_FREE_MODEL_FIELDS = ("dropout", "remat", "scan_layers", "check_ids", "attention_implementation")


@dataclass(frozen=True)
class Stage:
    """A stage as written.

    Attributes
    ----------
    name : str
        Its name.
    settings : Mapping[str, str]
        Its flags by dotted name, with the flags that all stages have in common, and ``config``.
    """

    name: str
    settings: Mapping[str, str]


def pipeline_names() -> list[str]:
    """Return the names of the shipped pipelines."""
    files = _shipped().iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def _shipped() -> resources.abc.Traversable:
    return resources.files("tjx_trainer") / "configs" / "pipelines"


def read_pipeline(name_or_path: str, flags: Sequence[str], folder: Path | None) -> Grid:
    """Read the stages of a pipeline, and validate the run of each.

    Parameters
    ----------
    name_or_path : str
        A name of `pipeline_names`, or a YAML file with the keys ``common`` (values that all stages
        share) and ``stages`` (a list; each has a ``name``, optionally a preset as ``config``, and
        the sections of a preset).
    flags : sequence of str
        Flags for every stage, which override the file.
    folder : Path or None
        Folder of the pipeline; None is runs/pipeline-NAME.

    Returns
    -------
    Grid
        Without axes: the stages are its runs. All but the first have ``train.init_from``.

    Raises
    ------
    ConfigError
        With all mistakes, each with its stage.
    """
    words = parse_args(flags)
    problems: list[Problem | str] = list(words.problems)
    problems += [
        f"--{name}: every stage has its own; leave it out"
        for name in ("name", *_REFUSED)
        if name in words.values
    ]
    problems += [
        f"--{name}: got true; a pipeline trains; give it to the run of one stage"
        for name in ("dry_run", "eval_only")
        if getattr(words, name)
    ]
    program_flags = ["--supervise"] if words.supervise else []
    given = {name: _written(value) for name, value in words.values.items()}
    stages, mistakes = _read_stages(name_or_path)
    if problems := [*problems, *mistakes]:
        raise ConfigError(problems)
    place = folder or Path("runs") / f"pipeline-{Path(name_or_path).stem}"
    runs, before = [], None
    for stage in stages:
        settings = {**stage.settings, **given}
        flags_of_run = {**settings, "name": stage.name}
        if before is not None:
            flags_of_run["train.init_from"] = str(place / before)
        runs.append(SweepRun(stage.name, settings, (*_words(flags_of_run), *program_flags)))
        before = stage.name
    configs = _resolve(runs)
    return Grid({}, tuple(runs), replace(configs[0], name=Path(name_or_path).stem))


def _words(settings: Mapping[str, str]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def _written(value: RawValue) -> str:
    """Return a value as a flag has it."""
    if value.raw is None:
        return "none"
    return value.raw if isinstance(value.raw, str) else ",".join(value.raw)


def _read_stages(name_or_path: str) -> tuple[list[Stage], list[str]]:
    """Return the stages of a file, and its mistakes."""
    if is_preset_path(name_or_path):
        text, problem = read_preset_file(Path(name_or_path))
        label = name_or_path
        if problem:
            return [], [f"--config: got {name_or_path}; {problem}"]
    elif name_or_path in pipeline_names():
        label = f"{name_or_path}.yaml"
        text = (_shipped() / label).read_text(encoding="utf-8")
    else:
        near = nearest_name(name_or_path, pipeline_names())
        hint = f"; did you mean {near}?" if near else ""
        known = ", ".join(pipeline_names())
        return [], [f"--config: got {name_or_path}; expected a path or one of {known}{hint}"]
    root, problems = compose(text, label)
    if problems:
        return [], problems
    entries = {} if root is None else {key.value: node for key, node in root.value}
    if unknown := [name for name in entries if name not in (COMMON, STAGES)]:
        return [], [f"{label}: got {', '.join(unknown)}; expected the keys {COMMON} and {STAGES}"]
    listed = entries.get(STAGES)
    if not isinstance(listed, yaml.SequenceNode) or not listed.value:
        return [], [
            f"{label}: got no {STAGES}; expected a list with a `- name: NAME` for each stage"
        ]
    common: dict[str, str] = {}
    if COMMON in entries:
        common, problems = _settings(entries[COMMON], f"{label} ({COMMON})")
    stages = []
    for number, node in enumerate(listed.value, 1):
        own, mistakes = _settings(node, f"{label} (stage {number})")
        problems += mistakes
        stages.append(Stage(own.pop("name", ""), {**common, **own}))
        if not mistakes and not _STAGE_NAME.fullmatch(stages[-1].name):
            problems.append(
                f"{label} (stage {number}): name: got {stages[-1].name!r}; expected the name of a "
                "folder; give one such as `- name: pretrain`"
            )
    names = [stage.name for stage in stages]
    problems += [
        f"{label}: got {names.count(name)} stages {name}; expected different names; rename one"
        for name in dict.fromkeys(names)
        if name and names.count(name) > 1
    ]
    return stages, problems


def _settings(node: yaml.Node, label: str) -> tuple[dict[str, str], list[str]]:
    """Return the flags of a mapping of sections, and its mistakes."""
    if not isinstance(node, yaml.MappingNode):
        return {}, [f"{label}: expected sections, such as `model:`, with `  name: value` below"]
    preset = {key.value: each.value for key, each in node.value if key.value == "config"}
    rest = yaml.MappingNode(
        node.tag, [pair for pair in node.value if pair[0].value != "config"], node.start_mark
    )
    values, problems = values_of(rest, label)
    problems += [
        f"{label}: got {name}; expected none, since each stage has its own; leave it out"
        for name in _REFUSED
        if name in values
    ]
    return {**preset, **{name: _written(value) for name, value in values.items()}}, problems


def _resolve(runs: Sequence[SweepRun]) -> list[Config]:
    """Return the configuration of each stage.

    Raises
    ------
    ConfigError
        With the mistakes of all stages, and the values of the model that differ between stages.
    """
    configs: list[Config] = []
    problems: list[str] = []
    for run in runs:
        try:
            configs.append(resolve(run.words))
        except ConfigError as error:
            problems += [f"stage {run.name}: {problem}" for problem in error.problems]
    if not problems:
        first = _model_of(configs[0])
        for run, config in zip(runs[1:], configs[1:], strict=True):
            problems += [
                f"stage {run.name}: {name}: got {value}; expected {first.get(name)}, that of stage "
                f"{runs[0].name}; give it under `{COMMON}`"
                for name, value in _model_of(config).items()
                if value != first.get(name)
            ]
    if problems:
        raise ConfigError(problems)
    return configs


def _model_of(config: Config) -> dict[str, object]:
    """Return the values of the model that a stage inherits from the one before."""
    return {
        name: value
        for name, value in flatten(config).items()
        if name.startswith("model.") and not name.endswith(_FREE_MODEL_FIELDS)
    }
