"""What goes with a checkpoint: all that decided the run, and what it was computed with."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax

from tjx_trainer.config.config_tree import flatten
from tjx_trainer.config.run_config import Config
from tjx_trainer.runtime.run_dir import git_revision, versions
from tjx_trainer.tasks.task import data_identity
from tjx_trainer.training.build import Job

_OF_A_PROCESS = ("distributed.process_id", "distributed.bind_address")


def run_metadata(job: Job) -> dict[str, Any]:
    """Return what is saved with each state of a run, as JSON.

    Returns
    -------
    dict
        ``config`` by dotted name; ``config_sha256`` of it, which does not change with the run
        directory; ``data``: all that decides the batches; ``versions`` of the packages; ``git``
        revision or None; ``devices``: how many of which kind and in how many processes.
    """
    config = flatten(replace(job.config, run_dir=None))
    return {
        "config": config,
        "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "data": data_identity(job.task),
        "versions": versions(),
        "git": git_revision(),
        "devices": f"{job.mesh.size} {job.mesh.devices.flat[0].device_kind} in "
        f"{jax.process_count()} processes, mesh {format_mesh(job)}",
    }


def shared_settings(config: Config) -> dict[str, Any]:
    """Return what must be the same in all processes: configuration and versions, by dotted name.

    Where the data lie may differ between machines; what they are is compared with
    `data_identity` once they are open.
    """
    values = flatten(config)
    for name in ("data.cache_dir", "data.path", *_OF_A_PROCESS):
        values.pop(name, None)
    return {**values, **{f"version of {name}": text for name, text in versions().items()}}


def format_mesh(job: Job) -> str:
    """Write the sizes of a mesh: ``data 2 x fsdp 4``."""
    sizes = [f"{axis} {size}" for axis, size in job.mesh.shape.items() if size > 1]
    return " x ".join(sizes) or "of 1"


def describe_version_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Say in a line what computes otherwise than when a checkpoint was saved; None if nothing does.

    Parameters
    ----------
    saved, now : mapping
        As `describe_run` gives them; what is missing in `saved` is not compared.
    """
    before, here = saved.get("versions", {}), now["versions"]
    changed = [
        f"{name} {before[name]} there, {here[name]} here"
        for name in sorted(before.keys() & here.keys())
        if name.startswith(("jax", "tjx-")) and before[name] != here[name]
    ]
    if saved.get("devices", now["devices"]) != now["devices"]:
        changed.append(f"{saved['devices']} there, {now['devices']} here")
    return f"{'; '.join(changed)}: bits may differ" if changed else None
