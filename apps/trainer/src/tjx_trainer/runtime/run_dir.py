"""Run directory: file layout, creation, and checks before a run is resumed.

Layout::

    config.yaml      resolved configuration; versions of the packages; git revision
    metrics.jsonl    metrics, one JSON object per line
    tokenizer.json   tokenizer of the run
    data.json        folders and identity of the data
    checkpoints/     checkpoints
    plots/           plots
    profile/         profiler traces
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import tjx_ckpt
from tjx_ckpt.store.temporary_files import make_folder
from tjx_core import ConfigError, fsync_path, write_atomically
from tjx_data.bounded_io import read_json_object
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.config.config_compat import incompatible_changes
from tjx_trainer.config.config_tree import flatten
from tjx_trainer.config.run_config import Config
from tjx_trainer.runtime import provenance

RUNS_FOLDER = Path("runs")

# Temporary files that a killed process leaves: a dot, the file's name, a suffix.
_LEFTOVER = re.compile(r"\.(config\.yaml|[a-z.-]+[0-9]*\.jsonl?|loss\.png)\..+")

_MOST_BYTES = 16 << 20  # of a JSON file in a run directory


class DataPointer(NamedTuple):
    """Folders of the data of a run, by corpus, and the data identity; see `RunDirectory`."""

    folders: dict[str, Path]
    identity: dict[str, str]


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run's files.

    Attributes
    ----------
    path : Path
        The directory.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """The metrics, one JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of the run."""
        return self.path / "tokenizer.json"

    @property
    def data(self) -> Path:
        """Folders and identity of the data; see `write_data_pointer`."""
        return self.path / "data.json"

    @property
    def checkpoints(self) -> Path:
        """The default folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def plots(self) -> Path:
        """The folder of plots."""
        return self.path / "plots"

    @property
    def profile(self) -> Path:
        """The folder of profiler traces."""
        return self.path / "profile"

    def remove_temporary_files(self) -> None:
        """Delete temporary files of killed processes. The caller must hold the lock of the run."""
        for folder in (self.path, self.plots):
            for path in folder.glob(".*"):
                if _LEFTOVER.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def checkpoint_location(self, config: Config) -> str | Path:
        """Return ``checkpoint.directory`` if set, else `checkpoints`."""
        return config.checkpoint.directory or self.checkpoints

    def write_config(self, config: Config) -> None:
        """Write config.yaml atomically: configuration, versions and git revision.

        ``run_dir`` is omitted, so a run can be moved, and ``--config RUN_DIR/config.yaml`` starts
        another run with the same configuration.
        """
        write_atomically(self.config, to_yaml(config))

    def read_config(self) -> Config:
        """Read config.yaml.

        Raises
        ------
        ConfigError
            If the file is not a valid configuration; all problems are named.
        """
        config = resolve(["--config", str(self.config)])
        return replace(config, run_dir=str(self.path))

    def write_data_pointer(
        self, folders: Mapping[str, Path], *, identity: Mapping[str, str]
    ) -> None:
        """Write data.json: where the data are and their identity.

        Parameters
        ----------
        folders : Mapping[str, Path]
            Folders of the data, by corpus.
        identity : Mapping[str, str]
            The data identity, from `data_identity`.
        """
        places = {name: str(folder.resolve()) for name, folder in folders.items()}
        entry = {"folders": places, "identity": dict(identity)}
        write_atomically(self.data, json.dumps(entry, indent=2) + "\n")

    def read_data_pointer(self) -> DataPointer | None:
        """Read data.json; return None if it does not exist.

        Raises
        ------
        ConfigError
            If the file is damaged or not a regular file.
        """
        if not self.data.exists():
            return None
        try:
            entry = read_json_object(self.data, _MOST_BYTES)
            folders = {name: Path(folder) for name, folder in entry["folders"].items()}
            return DataPointer(folders, dict(entry["identity"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError([
                f"--run_dir {self.path}: its {self.data.name} cannot be read "
                f"({type(error).__name__}: {error}); restore it from a backup, or give another "
                "--run_dir"
            ]) from None  # fmt: skip


def check_run(config: Config) -> None:
    """Raise if the run directory cannot be used by this run. Writes nothing.

    Raises
    ------
    ConfigError
        If ``run_dir`` holds another run, is in use, or holds files of a run without config.yaml, or
        if ``checkpoint.directory`` holds checkpoints of another run.
    """
    if config.run_dir is not None:
        run = RunDirectory(Path(config.run_dir))
        for place in {run.checkpoints, run.checkpoint_location(config)}:
            if holder := tjx_ckpt.find_writer(place):
                raise ConfigError([
                    f"--run_dir {run.path}: {holder} trains in it; stop that run, or give another "
                    "--run_dir"
                ])  # fmt: skip
    _check_content(config)


def _check_content(config: Config) -> None:
    """Raise if the directory holds another run, or files of a run without config.yaml."""
    run = None if config.run_dir is None else RunDirectory(Path(config.run_dir))
    if run is not None and run.config.exists():
        check_resumable(run, config)
        return
    if run is not None:
        _check_foreign_files(run)
    place = config.checkpoint.directory
    if place is not None and (steps := tjx_ckpt.list_steps(place)):
        raise ConfigError([
            f"--checkpoint.directory {place}: holds step {steps[-1]} of another run; give another "
            "directory, or that run's --run_dir to resume it"
        ])  # fmt: skip


def make_run_dir(config: Config, *, now: datetime | None = None) -> RunDirectory:
    """Create the run directory if it does not exist. Writes nothing into it.

    Parameters
    ----------
    config : Config
        With ``run_dir`` None a new directory is created, as in `open_run`.
    now : datetime, optional
        Time in the name of a new directory; local time by default.

    Raises
    ------
    ConfigError
        If it cannot be created.
    """
    if config.run_dir is None:
        return make_new(config.name, now or datetime.now().astimezone())
    run = RunDirectory(Path(config.run_dir))
    _make(run.path, exist_ok=True)
    return run


def open_run(config: Config, *, now: datetime | None = None) -> RunDirectory:
    """Create or reuse the run directory and write config.yaml.

    The caller must have claimed the directory, because two runs that start at once would both
    write.

    Parameters
    ----------
    config : Config
        The resolved configuration. With ``run_dir`` None a new directory
        ``runs/NAME-YYYYmmdd-HHMMSS`` is created.
    now : datetime, optional
        Time in the name of a new directory; local time by default.

    Raises
    ------
    ConfigError
        If the directory holds another run (all differing values are named) or files of a run
        without config.yaml, or cannot be created.
    """
    if config.run_dir is not None:
        _check_content(config)
    run = make_run_dir(config, now=now)
    run.write_config(config)
    return run


def check_resumable(run: RunDirectory, config: Config) -> Config:
    """Return the saved configuration if `config` may resume its run.

    Raises
    ------
    ConfigError
        Naming each value that differs and may not; see `config_compat.CHANGEABLE_FIELDS`.
    """
    try:
        saved = run.read_config()
    except ConfigError as error:
        raise ConfigError([
            f"--run_dir {run.path}: its config.yaml cannot be read; give another --run_dir",
            *error.problems,
        ]) from None  # fmt: skip
    done = max(tjx_ckpt.list_steps(run.checkpoint_location(config)), default=0)
    differing = incompatible_changes(saved, config, steps_done=done)
    if differing:
        head = (
            f"--run_dir: {run.path} holds another run; give the saved values to resume it "
            f"(--config {run.config} gives all), or another --run_dir:"
        )
        raise ConfigError(["\n".join([head, *differing])])
    return saved


def _check_foreign_files(run: RunDirectory) -> None:
    if run.path.exists() and not run.path.is_dir():
        raise ConfigError([f"--run_dir {run.path}: this is a file; give a folder"])
    ours = (run.metrics, run.tokenizer, run.data, run.plots)
    found = [path.name for path in ours if path.exists()]
    if run.checkpoints.is_dir() and {path.name for path in run.checkpoints.iterdir()} - {".writer"}:
        found.append(run.checkpoints.name)  # a claim leaves only the lock
    if found:
        raise ConfigError([
            f"--run_dir {run.path}: holds {', '.join(found)} but no config.yaml, so it cannot be "
            "resumed; existing files are never overwritten; give another --run_dir"
        ])  # fmt: skip


def make_new(name: str, now: datetime) -> RunDirectory:
    """Create runs/NAME-YYYYmmdd-HHMMSS, with a suffix if several runs start in the same second.

    Raises
    ------
    ConfigError
        If it cannot be created.
    """
    stem = f"{name}-{now:%Y%m%d-%H%M%S}"
    for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
        path = RUNS_FOLDER / f"{stem}{suffix}"
        try:
            _make(path, exist_ok=False)
        except FileExistsError:
            continue
        return RunDirectory(path)
    raise ConfigError([f"{RUNS_FOLDER / stem} exists with 1000 suffixes: give --run_dir"])


def _make(path: Path, *, exist_ok: bool) -> None:
    try:
        make_folder(path.parent)
        path.mkdir(exist_ok=exist_ok)
        fsync_path(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise ConfigError([
            f"--run_dir {path}: cannot be created ({error.strerror}); give another --run_dir"
        ]) from None  # fmt: skip


def to_yaml(config: Config) -> str:
    """Format config.yaml: versions, git revision and configuration."""
    tree: dict[str, Any] = {"versions": provenance.versions(), "git": provenance.git_revision()}
    for name, value in flatten(config).items():
        *sections, leaf = name.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = list(value) if isinstance(value, tuple) else value
    del tree["run_dir"]
    head = "# The resolved configuration of this run, written by tjx.\n"
    body: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return head + body


def _represent_text(dumper: Any, text: str) -> Any:
    """Represent a string so that it reads back unchanged."""
    # YAML's other line breaks are escaped in double-quoted strings only.
    style = '"' if set(text) & set("\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper: Any = type("_Dumper", (yaml.SafeDumper,), {})  # PyYAML has no types to subclass
_Dumper.add_representer(str, _represent_text)
