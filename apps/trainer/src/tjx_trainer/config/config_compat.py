"""Whether a run that is gone on with is still the same run."""

import numpy as np

import tjx_optim
from tjx_trainer.cli.command_line import format_value
from tjx_trainer.config.config_tree import assemble, flatten, leaves
from tjx_trainer.config.presets import FIELDS_WITH_CHANGED_DEFAULTS
from tjx_trainer.config.run_config import Config

# What may differ when a run is resumed. First what decides nothing that is learned: names, what is
# looked at, kept and written. Then how the same sums are computed: a run that is resumed with other
# values of these follows the same mathematics, but its figures may differ in their last digits.
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
CHANGEABLE_SECTIONS = ("log.", "profile.", "checkpoint.", "mesh.", "distributed.", "watchdog.")
# In another place there are no checkpoints: the run would begin anew and nobody would notice.
FIXED_FIELDS = frozenset({"checkpoint.directory"})


def with_legacy_values(wanted: Config, saved: Config) -> tuple[Config, list[str]]:
    """Keep what a run means by values that did not exist when it was started.

    Parameters
    ----------
    wanted : Config
        From the command line. Of `presets.KEPT_VALUES`, those left at their defaults change.
    saved : Config
        What the run was started with.

    Returns
    -------
    tuple
        The configuration to resume with, and a line for each value that was kept.
    """
    there, here = flatten(saved), flatten(wanted)
    kept = {
        name: there[name]
        for name in FIELDS_WITH_CHANGED_DEFAULTS
        if name in there and name in here
        and there[name] != here[name] and here[name] == leaves()[name].default
    }  # fmt: skip
    lines = [f"{name} stays {format_value(value)}, with which the run was started"
             for name, value in kept.items()]  # fmt: skip
    return (assemble({**here, **kept}) if kept else wanted), lines


def incompatible_changes(saved: Config, wanted: Config, *, steps_done: int) -> list[str]:
    """Name each value that makes another run of it, a line each.

    Parameters
    ----------
    saved, wanted : Config
        What the run was started with, and what it is to go on with.
    steps_done : int
        Steps that cannot be made otherwise any more; 0 where nothing was saved yet.

    Returns
    -------
    list of str
        Empty where it is the same run.
    """
    # An encoder-decoder's ids are those of its data, which refuse any other that is given.
    ignored = {
        *CHANGEABLE_FIELDS,
        "train.max_steps",
        "model.pad_id",
        "model.start_id",
        "model.stop_id",
    }
    if saved.train.vocab_from_tokenizer and wanted.train.vocab_from_tokenizer:
        ignored.add("model.vocab_size")  # the tokenizer's, which is in the run directory
    there, here = flatten(saved), flatten(wanted)
    lines = {
        name: f"{name} is {format_value(there[name])} there and {format_value(here[name])} here"
        for name in there
        if name in here
        and there[name] != here[name]
        and name not in ignored
        and (name in FIXED_FIELDS or not name.startswith(CHANGEABLE_SECTIONS))
    }
    of_schedule = [lines.pop(name) for name in [*lines] if name.startswith("schedule.")]
    return [*lines.values(), *_other_schedule(saved, wanted, of_schedule, steps_done)]


def _other_schedule(saved: Config, wanted: Config, values: list[str], steps_done: int) -> list[str]:
    """Say what makes another learning rate of steps that were made.

    What is still to come may change: a run is made longer at its final rate, and the cool-down of
    wsd begins later or from any checkpoint, as often as one likes.
    """
    lengths = saved.train.max_steps, wanted.train.max_steps
    if not values and lengths[0] == lengths[1]:
        return []
    steps = np.arange(steps_done or max(lengths))
    there, here = (
        tjx_optim.learning_rates(
            config.schedule, learning_rate=1.0, max_steps=config.train.max_steps, steps=steps
        )
        for config in (saved, wanted)
    )
    # Schedules of different lengths round the same rate differently.
    (other,) = np.nonzero(~np.isclose(there, here, rtol=1e-6, atol=0))
    if not other.size:
        return []
    first = other[0]
    line = (
        f"the learning rate of step {first + 1}, in a run of {lengths[0]} steps, was "
        f"{there[first]:.6g} of the peak, and is {here[first]:.6g} here"
    )
    if lengths[0] != lengths[1]:
        line += f", in one of {lengths[1]} (train.max_steps)"
    end = saved.schedule.in_steps(lengths[0]).end
    if end is not None and lengths[1] > lengths[0]:
        line += f"; add --schedule.decay_steps {end} to train on at its final rate"
    return [*values, line]
