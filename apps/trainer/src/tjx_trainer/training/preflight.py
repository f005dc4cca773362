"""Checks before a run starts: devices, data, libraries, host memory, and the saved run."""

import os
from pathlib import Path

import jax

import tjx_ckpt
import tjx_data
import tjx_metrics
from tjx_core import ConfigError, Problem
from tjx_trainer.config.config_compat import with_legacy_values
from tjx_trainer.config.config_tree import phase_configs
from tjx_trainer.config.run_config import Config, reads_text
from tjx_trainer.runtime.run_dir import RunDirectory
from tjx_trainer.runtime.run_logging import log_info
from tjx_trainer.tasks.task import data_identity
from tjx_trainer.training.build import Job

# Host memory per token: its id and its label, in the batches being read, queued and transferred.
BYTES_PER_TOKEN = 8
BATCHES_IN_FLIGHT = 3


def find_backend() -> str:
    """Return the platform that JAX uses.

    Raises
    ------
    ConfigError
        If JAX_PLATFORMS names a platform without devices.
    """
    try:
        return jax.default_backend()
    except RuntimeError as error:
        requested = os.environ.get("JAX_PLATFORMS", "")
        if not requested:
            raise
        raise ConfigError([
            f"JAX_PLATFORMS: got {requested}; expected platforms with devices on this machine "
            f"({' '.join(str(error).split())[:300]}); unset it, or set JAX_PLATFORMS=cpu"
        ]) from None  # fmt: skip


def check_requirements(config: Config) -> None:
    """Raise ConfigError if data or libraries that the run needs are missing."""
    found = tjx_data.find_problems(config.data) if reads_text(config) else []
    problems: list[Problem | str] = [
        problem.within("data") if problem.path else problem for problem in found
    ]
    on_cpu = jax.default_backend() == "cpu"
    for each in (config, *phase_configs(config).values()):
        problems += check_host_memory(each, host_memory(), on_cpu=on_cpu)
    if config.checkpoint.directory is not None:
        try:
            tjx_ckpt.list_steps(config.checkpoint.directory)
        except (ImportError, ValueError) as error:
            problems.append(f"--checkpoint.directory {config.checkpoint.directory}: {error}")
    try:
        tjx_metrics.check_trackers(config.log.trackers)
    except ValueError as error:
        problems += [f"--log.{error}"]
    if problems:
        raise ConfigError(problems)


def check_host_memory(config: Config, memory: int, *, on_cpu: bool = False) -> list[str]:
    """Return a problem if a batch does not fit into the host's memory.

    Parameters
    ----------
    config : Config
        The configuration of a run.
    memory : int
        Memory of the host [bytes].
    on_cpu : bool
        Whether the host computes the training step, so that its memory holds the activations too.
        Counted are the inputs of each block, which the backward pass needs with every setting.
    """
    if not reads_text(config):
        return []
    train, model = config.train, config.model
    rows, row_bytes = train.batch_size, config.data.seq_len * BYTES_PER_TOKEN * BATCHES_IN_FLIGHT
    held, remedy = "batches", ""
    needed = rows // jax.process_count() * row_bytes
    if needed <= memory and on_cpu:
        item_bytes = 4 if train.precision == "fp32" else 2
        row_bytes = config.data.seq_len * model.d_model * model.n_layer * item_bytes
        rows //= train.accumulation or 1
        if train.device_batch_size:
            rows = min(rows, train.device_batch_size * jax.device_count())
        held, remedy = "activations", ", or a larger --train.accumulation"
        needed = rows // jax.process_count() * row_bytes
    if needed <= memory:
        return []
    most = memory // row_bytes * jax.process_count()
    return [
        f"train.batch_size: got {train.batch_size:,}, whose {held} (rows of {config.data.seq_len} "
        f"tokens) need {needed / 2**30:,.1f} GiB of memory in each process; expected less than the "
        f"{memory / 2**30:,.1f} GiB of this machine; give at most {most:,}{remedy}"
    ]


def host_memory() -> int:
    """Return the physical memory of this machine [bytes]."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def apply_legacy_values(config: Config) -> Config:
    """Return the configuration with the values that an older version's run implies."""
    run = None if config.run_dir is None else RunDirectory(Path(config.run_dir))
    if run is None or not run.config.exists():
        return config
    try:
        saved = run.read_config()
    except ConfigError:
        return config  # `check_run` reports the problems
    config, lines = with_legacy_values(config, saved)
    for line in lines:
        log_info(f"note           {line}")
    return config


def check_data_unchanged(job: Job) -> None:
    """Raise if the data of a resumed run changed: files, tokenizer or batch order.

    Raises
    ------
    ConfigError
        Naming each part of the data identity that differs.
    """
    run = None if job.config.run_dir is None else RunDirectory(Path(job.config.run_dir))
    before = None if run is None else run.read_data_pointer()
    if before is None:
        return
    was, now = before.identity, data_identity(job.task)
    changed = [
        f"{name} was {was.get(name, 'absent')} and is {now.get(name, 'absent')}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    ]
    if changed:
        raise ConfigError([
            f"--run_dir {job.config.run_dir}: the data changed since this run was started "
            f"({'; '.join(changed)}): restore it, or give another --run_dir"
        ])  # fmt: skip
