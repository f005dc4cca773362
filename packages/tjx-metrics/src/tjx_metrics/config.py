"""What configures logging. Standard library only: it is read without JAX or matplotlib."""

import difflib
from dataclasses import dataclass

# Beside the console and metrics.jsonl, which every run has.
TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run writes down, and how often.

    Attributes
    ----------
    every
        Steps between two records of training metrics.
    trackers
        Where records go beside metrics.jsonl and the console: tensorboard, wandb, trackio.
    project
        Project that wandb and trackio file the run under.
    layer_norms_every
        Steps between two records of the norms of each layer's gradients, parameters and updates.
    histograms_every
        Steps between two records of how each layer's parameters are spread.
    samples_every
        Steps between two texts that the model writes into the log; none: only at the end.
    accuracies
        Whether evaluations of text count top-1, 5 and 10 accuracy; this computes all logits.

    Raises
    ------
    ValueError
        When values are out of their range, a line each.
    """

    every: int = 10
    trackers: tuple[str, ...] = ()
    project: str = "tjx"
    layer_norms_every: int | None = None
    histograms_every: int | None = None
    samples_every: int | None = None
    accuracies: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.every < 1:
            problems.append(f"every={self.every}: must be at least 1; 1 records each step")
        problems += [
            f"{name}={value}: must be at least 1, or none for never"
            for name in ("layer_norms_every", "histograms_every", "samples_every")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        problems += [_unknown(name) for name in self.trackers if name not in TRACKERS]
        if len(set(self.trackers)) < len(self.trackers):
            problems.append(f"trackers={','.join(self.trackers)}: name each once")
        if not self.project:
            problems.append("project='': give a name, such as tjx")
        if problems:
            raise ValueError("\n".join(problems))


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, TRACKERS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"trackers={name}: there is no such tracker; {hint}(there are {', '.join(TRACKERS)})"
