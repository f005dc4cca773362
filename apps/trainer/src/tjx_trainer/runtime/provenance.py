"""Provenance of a run: package versions, git revision and settings shared by all processes.

Nothing here imports JAX.
"""

import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tjx_trainer.config.config_tree import flatten
from tjx_trainer.config.run_config import Config

RECORDED_PACKAGES = (
    *(
        f"tjx-{part}"
        for part in ("core", "kernels", "nn", "optim", "parallel", "data", "ckpt", "metrics")
    ),
    *("tjx-trainer", "jax", "jaxlib", "numpy", "flax", "optax"),
)
_VERSION = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)
_PER_PROCESS = ("distributed.process_id", "distributed.bind_address")


def shared_settings(config: Config) -> dict[str, Any]:
    """Return the values that must be equal in all processes: configuration and versions.

    Data paths may differ between machines; `data_identity` compares the data once they are open.
    """
    values = flatten(config)
    for name in ("data.cache_dir", "data.path", *_PER_PROCESS):
        values.pop(name, None)
    return {**values, **{f"version of {name}": text for name, text in versions().items()}}


def describe_version_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Describe versions, code and devices that changed since a save; None if nothing changed.

    Parameters
    ----------
    saved, now : mapping
        From `run_metadata`; keys missing in `saved` are not compared.
    """
    before, here = saved.get("versions", {}), now["versions"]
    changed = [
        f"{name} {before[name]} -> {here[name]}"
        for name in sorted(before.keys() & here.keys())
        if name.startswith(("jax", "tjx-")) and before[name] != here[name]
    ]
    revisions = [str((each.get("git") or {}).get("revision", ""))[:8] for each in (saved, now)]
    if all(revisions) and revisions[0] != revisions[1]:
        changed.append(f"git revision {revisions[0]} -> {revisions[1]}")
    if _other_devices(saved, now):
        changed.append(f"{saved['devices']} -> {now['devices']}")
    return f"{'; '.join(changed)}: results may differ in bits" if changed else None


def _other_devices(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether the devices changed in a way that may change bits."""
    devices = [saved.get("devices", now["devices"]), now["devices"]]
    if now.get("config", {}).get("train.reproducible") == "mesh":
        # Of "8 KIND in 2 processes, mesh data 8" only the kind matters.
        devices = [text.partition(" ")[2].rpartition(" in ")[0] for text in devices]
    return bool(devices[0] != devices[1])


def versions() -> dict[str, str]:
    """Return the versions of the packages that determine the results of a run."""
    return {name: _version(name) for name in RECORDED_PACKAGES}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        # In a checkout the tjx packages are sources, not installed distributions. Importing them
        # would import JAX.
        source = find_spec(name.replace("-", "_"))
        assert source, f"no package {name}"
        found = _VERSION.search(Path(str(source.origin)).read_text("utf-8"))
        assert found, f"no __version__ in {source.origin}"
        return found[1]


def git_revision() -> Mapping[str, str | bool] | None:
    """Return the git revision of the code; None without a repository or without git.

    The working directory is tried first: a packaged program runs outside its checkout but is
    started in it.

    Returns
    -------
    mapping or None
        ``repository``, ``revision`` and ``dirty``: whether a tracked file was changed.
    """
    for folder in (Path.cwd(), Path(__file__).parent):
        if not folder.is_dir():
            continue
        head = _git(folder, "rev-parse", "--show-toplevel", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
        if head is not None and changes is not None:
            repository, revision = head.splitlines()
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
