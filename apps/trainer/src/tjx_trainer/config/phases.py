"""Phases of a run: other batch sizes, lengths, windows and logit caps from given steps on.

Nothing here imports JAX.
"""

from collections.abc import Mapping

from tjx_core import Problem, did_you_mean

PHASE_FIELDS: Mapping[str, type[int] | type[float]] = {
    "train.batch_size": int,
    "train.device_batch_size": int,
    "train.accumulation": int,
    "data.seq_len": int,
    "model.window": int,
    "model.logit_soft_cap": float,
    "model.attention_soft_cap": float,
}
"""Values that may differ between phases: the parameters and the optimizer do not depend on them."""

_REQUIRED = ("train.batch_size", "data.seq_len")
_EXAMPLE = "0:data.seq_len=256,model.window=128;4000:data.seq_len=512"

PhaseValues = dict[str, int | float | None]


def parse_phases(phases: str) -> tuple[dict[int, PhaseValues], list[Problem]]:
    """Return the values of each phase by its first step, and a problem for each mistake.

    Parameters
    ----------
    phases : str
        Entries STEP:NAME=VALUE,NAME=VALUE, separated by semicolons, in the order of the steps.

    Examples
    --------
    >>> parse_phases("0:data.seq_len=256; 400:data.seq_len=512,model.window=none")[0]
    {0: {'data.seq_len': 256}, 400: {'data.seq_len': 512, 'model.window': None}}
    """
    found: dict[int, PhaseValues] = {}
    problems = []
    for entry in phases.split(";"):
        step, _, settings = entry.partition(":")
        pairs = [[part.strip() for part in each.split("=", 1)] for each in settings.split(",")]
        names = {pair[0] for pair in pairs}
        if not step.strip().isdecimal() or {*map(len, pairs)} != {2} or len(names) < len(pairs):
            message = f"got {entry!r}; expected STEP:NAME=VALUE,..., such as {_EXAMPLE!r}"
            problems.append(Problem("phases", message))
            continue
        if int(step) <= max(found, default=-1):
            message = f"got step {int(step)} after {max(found)}; expected ascending steps"
            problems.append(Problem("phases", message))
        found[int(step)] = values = {}
        for name, text in pairs:
            none_allowed = name not in _REQUIRED
            try:
                kind = PHASE_FIELDS[name]
                values[name] = None if text == "none" and none_allowed else kind(text)
            except KeyError:
                allowed, hint = ", ".join(PHASE_FIELDS), did_you_mean(name, PHASE_FIELDS)
                problems.append(Problem("phases", f"got {name}; expected one of {allowed}{hint}"))
            except ValueError:
                rule = "a whole number" if kind is int else "a number"
                rule += ", or none" if none_allowed else ""
                problems.append(Problem("phases", f"got {name}={text}; expected {rule}"))
    return found, problems
