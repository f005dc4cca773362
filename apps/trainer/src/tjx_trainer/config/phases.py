"""Phases of a run: other batch sizes, lengths, windows and logit caps from given steps on.

Nothing here imports JAX.
"""

from tjx_core import ConfigError, Problem, did_you_mean, problems_of
from tjx_trainer.cli.values import convert
from tjx_trainer.config.config_tree import assemble, flatten, leaves
from tjx_trainer.config.presets import RawValue
from tjx_trainer.config.run_config import Config
from tjx_trainer.config.task_checks import RL_TASKS

PHASE_FIELDS = (
    "train.batch_size", "train.device_batch_size", "train.accumulation", "data.seq_len",
    "model.window", "model.logit_soft_cap", "model.attention_soft_cap",
)  # fmt: skip
"""Values that may differ between phases: the parameters and the optimizer do not depend on them."""

_EXAMPLE = "0:data.seq_len=256,model.window=128;4000:data.seq_len=512"


def parse_phases(phases: str) -> tuple[dict[int, dict[str, str]], list[Problem]]:
    """Return the values of each phase by its first step, and a problem for each invalid entry.

    Parameters
    ----------
    phases : str
        Entries STEP:NAME=VALUE,NAME=VALUE, separated by semicolons, in the order of the steps.

    Examples
    --------
    >>> parse_phases("0:data.seq_len=256; 400:data.seq_len=512,train.batch_size=8")[0]
    {0: {'data.seq_len': '256'}, 400: {'data.seq_len': '512', 'train.batch_size': '8'}}
    """
    found: dict[int, dict[str, str]] = {}
    problems = []
    for entry in phases.split(";"):
        step, _, settings = entry.partition(":")
        pairs = [setting.partition("=") for setting in settings.split(",")]
        values = {name.strip(): value.strip() for name, _, value in pairs}
        if not step.strip().isdecimal() or not all(values.values()) or len(values) < len(pairs):
            message = f"got {entry!r}; expected STEP:NAME=VALUE,..., such as {_EXAMPLE!r}"
            problems.append(Problem("train.phases", message))
            continue
        problems += [
            Problem(
                "train.phases",
                f"got {name}; expected one of {', '.join(PHASE_FIELDS)}"
                f"{did_you_mean(name, PHASE_FIELDS)}",
            )
            for name in values
            if name not in PHASE_FIELDS
        ]
        if int(step) <= max(found, default=-1):
            message = f"got step {int(step)} after {max(found)}; expected ascending steps"
            problems.append(Problem("train.phases", message))
        found[int(step)] = values
    return found, problems


def phase_configs(config: Config) -> dict[int, Config]:
    """Return the configuration of each phase of a run by its first step.

    Parameters
    ----------
    config : Config
        The configuration of the run, which holds before the first phase. Values that a phase does
        not name are those of the run, not of the phase before.

    Raises
    ------
    ConfigError
        With all problems of all phases.
    """
    if config.train.phases is None:
        return {}
    found, problems = parse_phases(config.train.phases)
    late = [step for step in found if step >= config.train.max_steps]
    if late:
        message = f"got step {late[0]}; expected less than max_steps={config.train.max_steps}"
        problems.append(Problem("train.phases", message, ("train.max_steps",)))
    refused = {
        f"task {config.task}": config.task in RL_TASKS,
        "the dial (--scale)": config.scale.is_set,
        "distill.teacher, which each phase would load": bool(config.distill.teacher),
        "data.curriculum, whose steps count batches of one size": bool(config.data.curriculum),
    }
    problems += [
        Problem("train.phases", f"got {config.train.phases} with {other}; expected one of the two")
        for other, is_given in refused.items()
        if is_given
    ]
    if problems:
        raise ConfigError(problems)
    configs = {}
    base = {**flatten(config), "train.phases": None}
    for step, values in found.items():
        try:
            configs[step] = assemble(base | {
                name: convert(leaves()[name], RawValue(value, name))
                for name, value in values.items()
            })  # fmt: skip
        except ValueError as error:
            problems += [
                Problem("train.phases", f"from step {step}: {problem}")
                for problem in problems_of(error)
            ]
    if problems:
        raise ConfigError(problems)
    return configs
