"""The run directory: where everything of a run lies, and whether it may be gone on with.

Layout::

    config.yaml      the resolved configuration; versions of the packages; git revision
    metrics.jsonl    one object a line
    tokenizer.json   the tokenizer of the run
    data.json        where the data lie, and what decides the batches made of them
    checkpoints/     what to go on from
    plots/           pictures
    profile/         traces of single steps
"""

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import tjx_ckpt
from tjx_ckpt.store.temporary_files import flush, make_folder
from tjx_data.bounded_io import read_json_object
from tjx_trainer.cli.command_line import resolve
from tjx_trainer.config.config_compat import incompatible_changes
from tjx_trainer.config.config_tree import flatten
from tjx_trainer.config.run_config import Config, ConfigError

RUNS_FOLDER = Path("runs")

# What a kill leaves of a file that was being written beside its place: a dot, its name, a suffix.
_LEFTOVER = re.compile(r"\.(config\.yaml|[a-z.-]+[0-9]*\.jsonl?|loss\.png)\..+")

_MOST_BYTES = 16 << 20  # of a JSON file in a run directory
RECORDED_PACKAGES = (
    *(
        f"tjx-{part}"
        for part in ("core", "kernels", "nn", "optim", "parallel", "data", "ckpt", "metrics")
    ),
    *("tjx-trainer", "jax", "jaxlib", "numpy", "flax", "optax"),
)


class DataPointer(NamedTuple):
    """Where the data of a run lie, and what decides the batches; see `RunDirectory`."""

    folders: dict[str, Path]
    identity: dict[str, str]


@dataclass(frozen=True)
class RunDirectory:
    """The places of a run.

    Attributes
    ----------
    path : Path
        The directory itself.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """The metrics, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of the run."""
        return self.path / "tokenizer.json"

    @property
    def data(self) -> Path:
        """Where the data lie; see `point_to_data`."""
        return self.path / "data.json"

    @property
    def checkpoints(self) -> Path:
        """The directory of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def plots(self) -> Path:
        """The directory of the pictures."""
        return self.path / "plots"

    @property
    def profile(self) -> Path:
        """The directory of traces."""
        return self.path / "profile"

    def remove_temporary_files(self) -> None:
        """Delete what killed processes left half written; only for who trains here, alone."""
        for folder in (self.path, self.plots):
            for path in folder.glob(".*"):
                if _LEFTOVER.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def checkpoint_location(self, config: Config) -> str | Path:
        """Return where a run saves: `checkpoints`, unless its configuration says otherwise."""
        return config.checkpoint.directory or self.checkpoints

    def write_config(self, config: Config) -> None:
        """Write the resolved configuration, with versions and git revision, atomically.

        The run directory itself is not written: it is where the file lies, so a run can be moved,
        and ``--config RUN_DIR/config.yaml`` starts another run alike.
        """
        write_atomically(self.config, to_yaml(config))

    def read_config(self) -> Config:
        """Read the configuration back.

        Raises
        ------
        ConfigError
            If the file is not a configuration of this version; every reason is named.
        """
        config = resolve(["--config", str(self.config)])
        return replace(config, run_dir=str(self.path))

    def write_data_pointer(
        self, folders: Mapping[str, Path], *, identity: Mapping[str, str]
    ) -> None:
        """Record where the run's data lie, which runs may share.

        Parameters
        ----------
        folders : Mapping[str, Path]
            Folders of the data, by corpus.
        identity : Mapping[str, str]
            All that decides the batches, by name.
        """
        places = {name: str(folder.resolve()) for name, folder in folders.items()}
        entry = {"folders": places, "identity": dict(identity)}
        write_atomically(self.data, json.dumps(entry, indent=2) + "\n")

    def read_data_pointer(self) -> DataPointer | None:
        """Return what `point_to_data` recorded; None before it did.

        Raises
        ------
        ConfigError
            If the file is damaged or no regular file.
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
                f"({type(error).__name__}: {error}); bring it back from a copy, or give another "
                "--run_dir"
            ]) from None  # fmt: skip


def check_run(config: Config) -> None:
    """Refuse what `open_run` would refuse, and a directory in use; writes nothing.

    Raises
    ------
    ConfigError
        If ``run_dir`` holds another run, one that goes on at this moment, or files of a run
        without its config.yaml; or the checkpoints' directory those of another run.
    """
    if config.run_dir is not None:
        run = RunDirectory(Path(config.run_dir))
        for place in {run.checkpoints, run.checkpoint_location(config)}:
            if holder := tjx_ckpt.find_writer(place):
                raise ConfigError([
                    f"--run_dir {run.path}: {holder} trains in it; end it, or give another "
                    "--run_dir"
                ])  # fmt: skip
    _check_content(config)


def _check_content(config: Config) -> None:
    """Refuse a run directory that holds another run, or files without a configuration."""
    run = None if config.run_dir is None else RunDirectory(Path(config.run_dir))
    if run is not None and run.config.exists():
        check_resumable(run, config)
        return
    if run is not None:
        _refuse_foreign_files(run)
    place = config.checkpoint.directory
    if place is not None and (steps := tjx_ckpt.list_steps(place)):
        raise ConfigError([
            f"--checkpoint.directory {place}: holds step {steps[-1]} of another run; give another "
            "directory, or that run's --run_dir to resume it"
        ])  # fmt: skip


def make_run_dir(config: Config, *, now: datetime | None = None) -> RunDirectory:
    """Make the run directory of a configuration where it is missing; writes nothing into it.

    Parameters
    ----------
    config : Config
        With ``run_dir`` None a new directory is made, as `open_run` says.
    now : datetime, optional
        For the new directory's name; local time by default.

    Raises
    ------
    ConfigError
        If it cannot be made.
    """
    if config.run_dir is None:
        return make_new(config.name, now or datetime.now().astimezone())
    run = RunDirectory(Path(config.run_dir))
    _make(run.path, exist_ok=True)
    return run


def open_run(config: Config, *, now: datetime | None = None) -> RunDirectory:
    """Make the run directory of a configuration, or take the one that holds this very run.

    Writes config.yaml, so that from here on the directory belongs to this configuration. Claim the
    directory before: two runs that start in it at once would both write.

    Parameters
    ----------
    config : Config
        Resolved: the vocabulary has its final size. With ``run_dir`` None a new directory
        ``runs/NAME-YYYYmmdd-HHMMSS`` is made, never an existing one taken.
    now : datetime, optional
        For the new directory's name; local time by default.

    Raises
    ------
    ConfigError
        If the directory holds another run (each value that differs is named), or files of a run
        without its config.yaml, or cannot be made.
    """
    if config.run_dir is not None:
        _check_content(config)
    run = make_run_dir(config, now=now)
    run.write_config(config)
    return run


def check_resumable(run: RunDirectory, config: Config) -> Config:
    """Return the configuration that a run directory holds, if the given one may go on with it.

    Raises
    ------
    ConfigError
        Naming each value that differs and may not; see `resuming.MAY_CHANGE`.
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
            f"--run_dir {run.path} holds another run; give the same values to resume it, "
            "or another --run_dir:"
        )
        raise ConfigError(["\n".join([head, *differing])])
    return saved


def _refuse_foreign_files(run: RunDirectory) -> None:
    if run.path.exists() and not run.path.is_dir():
        raise ConfigError([f"--run_dir {run.path}: this is a file; give a folder"])
    ours = (run.metrics, run.tokenizer, run.data, run.plots)
    found = [path.name for path in ours if path.exists()]
    if run.checkpoints.is_dir() and {path.name for path in run.checkpoints.iterdir()} - {".writer"}:
        found.append(run.checkpoints.name)  # the lock alone is what a claim leaves
    if found:
        raise ConfigError([
            f"--run_dir {run.path}: holds {', '.join(found)} but no config.yaml, so it cannot be "
            "resumed; nothing is written over: give another --run_dir"
        ])  # fmt: skip


def make_new(name: str, now: datetime) -> RunDirectory:
    """Make runs/NAME-YYYYmmdd-HHMMSS, also when several runs start in the same second.

    Raises
    ------
    ConfigError
        If it cannot be made.
    """
    stem = f"{name}-{now:%Y%m%d-%H%M%S}"
    for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
        path = RUNS_FOLDER / f"{stem}{suffix}"
        try:
            _make(path, exist_ok=False)
        except FileExistsError:
            continue
        return RunDirectory(path)
    raise ConfigError([f"{RUNS_FOLDER / stem} exists a thousand times: give --run_dir"])


def _make(path: Path, *, exist_ok: bool) -> None:
    try:
        make_folder(path.parent)
        path.mkdir(exist_ok=exist_ok)
        flush(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise ConfigError([
            f"--run_dir {path}: cannot be made ({error.strerror}); give another --run_dir"
        ]) from None  # fmt: skip


def to_yaml(config: Config) -> str:
    """Write a configuration as YAML, after the versions and the git revision that it ran with."""
    tree: dict[str, Any] = {"versions": versions(), "git": git_revision()}
    for name, value in flatten(config).items():
        *sections, leaf = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = list(value) if isinstance(value, tuple) else value
    del tree["run_dir"]
    head = "# The resolved configuration of this run, written by tjx.\n"
    body: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return head + body


def _represent_text(dumper: Any, text: str) -> Any:
    """Write a text so that it reads back as it was."""
    # What YAML takes for ends of lines, PyYAML escapes only between double quotes.
    style = '"' if set(text) & set("\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper: Any = type("_Dumper", (yaml.SafeDumper,), {})  # as a class it would need PyYAML's types
_Dumper.add_representer(str, _represent_text)


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide what a run computes."""
    return {name: _version(name) for name in RECORDED_PACKAGES}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # our own packages, run from a checkout
        return str(import_module(name.replace("-", "_")).__version__)


def git_revision() -> Mapping[str, str | bool] | None:
    """Return where the code stands in git, or None where there is no repository or no git.

    The working directory is asked first, as built runs leave their checkout but start in it.

    Returns
    -------
    mapping or None
        ``repository``, ``revision`` and ``dirty``: whether a tracked file was changed.
    """
    for folder in (Path.cwd(), Path(__file__).parent):
        if not folder.is_dir():
            continue
        place = _git(folder, "rev-parse", "--show-toplevel", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
        if place is not None and changes is not None:
            repository, revision = place.splitlines()
            return {"repository": repository, "revision": revision, "dirty": bool(changes)}
    return None


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that after a crash it is there whole or as it was before."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
