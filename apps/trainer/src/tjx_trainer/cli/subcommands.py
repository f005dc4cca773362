"""What the trainer's program can be asked beside to train: names and a line each."""

from collections.abc import Mapping

COMMANDS: Mapping[str, str] = {
    "plan": "what a run needs of each device and costs, before there is one",
    "parameters": "every parameter of a model, and how it lies on the devices",
    "sweep": "the same run with several values of some flags, compared at the end",
}
