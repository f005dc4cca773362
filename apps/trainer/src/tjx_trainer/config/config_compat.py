"""Compatibility of a resumed run's configuration with the saved one."""

import numpy as np

import tjx_optim
from tjx_trainer.cli.values import format_value
from tjx_trainer.config.config_tree import assemble, flatten, leaves
from tjx_trainer.config.presets import FIELDS_WITH_CHANGED_DEFAULTS
from tjx_trainer.config.run_config import Config

# Fields that may differ when a run is resumed: first fields without effect on the result (names,
# logging, retention), then fields that change how the same computation is done, whose results may
# differ in the last digits.
CHANGEABLE_FIELDS = frozenset({
    "run_dir",
    "name",
    "data.cache_dir",
    "train.eval_every",
    "train.eval_tokens",
    "train.sample_tokens",
    "train.sample_prompt",
    "train.sample_temperature",
    "train.sample_top_k",
    "train.accumulation",
    "train.deterministic",
    "guard.max_skipped",
    "train.device_batch_size",
    "model.remat",
    "model.scan_layers",
    "model.remat_every",
    "model.attention_implementation",
    "model.check_ids",
})  # fmt: skip
CHANGEABLE_SECTIONS = (
    "log.", "profile.", "checkpoint.", "mesh.", "distributed.", "watchdog.",
    "scale.",  # the values that it sets are compared
)  # fmt: skip
# A different directory has no checkpoints, so the run would silently start again.
FIXED_FIELDS = frozenset({"checkpoint.directory"})


def with_legacy_values(wanted: Config, saved: Config) -> tuple[Config, list[str]]:
    """Keep the saved values of fields whose defaults have changed since the run was started.

    Parameters
    ----------
    wanted : Config
        From the command line. Of `presets.FIELDS_WITH_CHANGED_DEFAULTS`, those at their defaults
        are replaced.
    saved : Config
        The saved configuration of the run.

    Returns
    -------
    tuple
        The configuration to resume with, and a line for each value that was kept.
    """
    before, now = flatten(saved), flatten(wanted)
    kept = {
        name: before[name]
        for name in FIELDS_WITH_CHANGED_DEFAULTS
        if name in before and name in now
        and before[name] != now[name] and now[name] == leaves()[name].default
    }  # fmt: skip
    lines = [f"{name} stays {format_value(value)}, as in the saved run"
             for name, value in kept.items()]  # fmt: skip
    return (assemble({**now, **kept}) if kept else wanted), lines


def incompatible_changes(saved: Config, wanted: Config, *, steps_done: int) -> list[str]:
    """Return the changes that make a configuration another run, a line each.

    Parameters
    ----------
    saved, wanted : Config
        The saved configuration, and the one to resume with.
    steps_done : int
        Completed steps, whose learning rates are fixed; 0 without a checkpoint.

    Returns
    -------
    list of str
        Empty if the run can be resumed.
    """
    # The special tokens of an encoder-decoder come from its data, whose task checks them.
    ignored = {
        *CHANGEABLE_FIELDS,
        "train.max_steps",
        "model.pad_id",
        "model.start_id",
        "model.stop_id",
    }
    if saved.train.vocab_from_tokenizer and wanted.train.vocab_from_tokenizer:
        ignored.add("model.vocab_size")  # the tokenizer's, which is in the run directory
    if wanted.distill.teacher_sha256 is None and wanted.distill.teacher is not None:
        ignored.add("distill.teacher_sha256")  # not computed yet
    before, now = flatten(saved), flatten(wanted)
    lines = {
        name: f"{name}: got {format_value(now[name])}; expected {format_value(before[name])}"
        for name in before
        if name in now
        and before[name] != now[name]
        and name not in ignored
        and (name in FIXED_FIELDS or not name.startswith(CHANGEABLE_SECTIONS))
    }
    of_schedule = [lines.pop(name) for name in [*lines] if name.startswith("schedule.")]
    return [*lines.values(), *_schedule_changes(saved, wanted, of_schedule, steps_done)]


def _schedule_changes(
    saved: Config, wanted: Config, values: list[str], steps_done: int
) -> list[str]:
    """Return how the learning rates of completed steps would change.

    Later steps may change: a run can be extended at its final rate, and the cool-down of wsd can
    start later or from any checkpoint.
    """
    lengths = saved.train.max_steps, wanted.train.max_steps
    if not values and lengths[0] == lengths[1]:
        return []
    steps = np.arange(steps_done or max(lengths))
    before, now = (
        tjx_optim.learning_rates(
            config.schedule, learning_rate=1.0, max_steps=config.train.max_steps, steps=steps
        )
        for config in (saved, wanted)
    )
    # Schedules of different lengths differ in rounding.
    (other,) = np.nonzero(~np.isclose(before, now, rtol=1e-6, atol=0))
    if not other.size:
        return []
    first = other[0]
    line = (
        f"learning rate of step {first + 1}: got {now[first]:.6g} of the peak; expected "
        f"{before[first]:.6g}, as in the saved run of {lengths[0]} steps"
    )
    if lengths[0] != lengths[1]:
        line += f"; train.max_steps is {lengths[1]} now"
    end = saved.schedule.in_steps(lengths[0]).end
    if end is not None and lengths[1] > lengths[0]:
        line += f"; give --schedule.decay_steps {end} to continue at its final rate"
    return [*values, line]
