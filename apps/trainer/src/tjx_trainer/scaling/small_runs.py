"""The small runs of a prediction: the dial of the large run, turned down."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tjx_core import ConfigError
from tjx_trainer.cli.arguments import parse_args, resolve
from tjx_trainer.config.config_tree import flatten
from tjx_trainer.config.run_config import Config
from tjx_trainer.scaling.dial import block_params
from tjx_trainer.sweep.grid import Grid, SweepRun

MIN_RUNS, MAX_RUNS = 5, 8
MIN_SIZES = 4  # one more than the parameters of a law over FLOPs
RATIO = 10.0  # of the FLOPs of the large run to those of the largest small run, at least
FLOPS_STEP = 2.0  # between small runs of a dial of FLOPs


@dataclass(frozen=True)
class Size:
    """Size of a run.

    Attributes
    ----------
    params : int
        Parameters of the blocks.
    tokens : int
        Training tokens.
    """

    params: int
    tokens: int

    @property
    def flops(self) -> float:
        """Training FLOPs, 6 x parameters x tokens."""
        return 6.0 * self.params * self.tokens


def size_of(config: Config) -> Size:
    """Return the size of a run.

    Examples
    --------
    >>> size_of(resolve(["--scale.depth=2", "--train.batch_size=8", "--train.max_steps=10"]))
    Size(params=393216, tokens=10240)
    """
    values = flatten(config)
    steps, batch = values["train.max_steps"], values["train.batch_size"]
    return Size(block_params(values), steps * batch * values["data.seq_len"])


def read_small_runs(argv: Sequence[str], count: int) -> tuple[Grid, SweepRun]:
    """Return the small runs, and the large one, which the command line describes.

    With ``--scale.depth`` the small runs have the largest depths with at most a tenth of the FLOPs,
    and other seeds of the smallest ones if there are fewer depths than runs; with
    ``--scale.flops``, a tenth of the FLOPs, a 20th, a 40th and so on.

    Parameters
    ----------
    argv : sequence of str
        The flags of the large run.
    count : int
        Number of small runs.

    Raises
    ------
    ConfigError
        If the command line is wrong, has no dial, or leaves too few small runs.
    """
    config = resolve(argv)
    words = parse_args(argv)
    problems = []
    if not config.scale.is_set:
        problems.append(
            "--scale.depth: got none; expected the size of the run to predict; give --scale.depth "
            "8 or --scale.flops 1e15"
        )
    if "run_dir" in words.values:
        problems.append("--run_dir: every run has its own; give --predict.dir instead")
    if problems:
        raise ConfigError(problems)
    name = "scale.depth" if config.scale.flops is None else "scale.flops"
    largest = size_of(config).flops / RATIO
    settings: list[dict[str, str]] = []
    if config.scale.flops is not None:
        sizes = [f"{config.scale.flops / RATIO / FLOPS_STEP**k:.6g}" for k in range(count)]
        settings = [{name: size} for size in reversed(sizes)]
    else:
        settings = _depths(words.argv, config, largest, count)
    runs = [_run(words.argv(**each), each) for each in settings]
    own = [size_of(resolve(each.words)) for each in runs]
    if len(set(own)) < MIN_SIZES or max(size.flops for size in own) > 1.1 * largest:
        raise ConfigError([
            f"--{name}: got {_written(config)} with small runs of {len(set(own))} sizes and up to "
            f"{max((size.flops for size in own), default=0):.3g} FLOPs; expected at least "
            f"{MIN_SIZES} sizes, of at most a tenth of its FLOPs each; give a larger --{name}, and "
            "no flags that fix size and length"
        ])  # fmt: skip
    axes = {axis: tuple(dict.fromkeys(each[axis] for each in settings)) for axis in settings[0]}
    large = _run(words.argv(), {name: _written(config)})
    return Grid(axes, tuple(runs), config), large


def _written(config: Config) -> str:
    scale = config.scale
    return f"{scale.flops:.6g}" if scale.flops is not None else str(scale.depth)


def _depths(make_words: Any, config: Config, largest: float, count: int) -> list[dict[str, str]]:
    """Return depths and seeds of the small runs, by their size."""
    assert config.scale.depth is not None
    depths: list[int] = []
    for depth in range(config.scale.depth - 1, 0, -1):
        small = resolve(make_words(**{"scale.depth": str(depth)}))
        if len(depths) < count and size_of(small).flops <= largest:
            depths.insert(0, depth)
    seeds = range(-(-count // len(depths)) if depths else 0)
    runs = [(depth, config.seed + seed) for seed in seeds for depth in depths]
    return [{"scale.depth": str(depth), "seed": str(seed)} for depth, seed in sorted(runs[:count])]


def _run(words: Sequence[str], settings: dict[str, str]) -> SweepRun:
    name = ",".join(f"{n.rpartition('.')[2]}={value}" for n, value in settings.items())
    return SweepRun(name, settings, tuple(words))
