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
FLOPS_MARGIN, FLOPS_STEP = 1.2, 2.0  # of a dial of FLOPs: below the ratio, and between small runs
SPAN = 1000.0  # of the FLOPs of the small runs, if that leaves enough depths
TOKENS_STEP = 4.0  # between the two numbers of tokens per parameter of a law of both


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


def read_small_runs(
    argv: Sequence[str], count: int, *, vary_tokens: bool = False
) -> tuple[Grid, SweepRun]:
    """Return the small runs, and the large one, which the command line describes.

    With ``--scale.depth`` the small runs have the largest depths with at most a tenth of the FLOPs,
    and other seeds of the smallest ones if there are fewer depths than runs; with
    ``--scale.flops``, a twelfth of the FLOPs, a 24th, a 48th and so on.

    Parameters
    ----------
    argv : sequence of str
        The flags of the large run.
    count : int
        Number of small runs.
    vary_tokens : bool
        Whether half of the runs have a quarter of the tokens per parameter instead, which a law of
        parameters and tokens needs.

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
    problems += [
        f"--{flag}: got true; expected it without predict; leave it out"
        for flag in ("supervise", "eval_only")
        if getattr(words, flag)
    ]
    if vary_tokens and config.scale.flops is not None:
        problems.append(
            f"--predict.law: got parametric with --scale.flops {config.scale.flops:g}, which "
            "leaves no choice of the tokens; expected compute, or --scale.depth"
        )
    if problems:
        raise ConfigError(problems)
    name = "scale.depth" if config.scale.flops is None else "scale.flops"
    largest = size_of(config).flops / RATIO
    settings: list[dict[str, str]] = []
    if config.scale.flops is not None:
        first = config.scale.flops / RATIO / FLOPS_MARGIN
        settings = [{name: f"{first / FLOPS_STEP**k:.6g}"} for k in reversed(range(count))]
    else:
        settings = _depths(words.argv, config, largest, count, vary_tokens=vary_tokens)
    runs = [_run(words.argv(**each), each) for each in settings]
    own = [size_of(resolve(each.words)) for each in runs]
    if len(set(own)) < MIN_SIZES or max(size.flops for size in own) > largest:
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


def _depths(
    make_words: Any, config: Config, largest: float, count: int, *, vary_tokens: bool
) -> list[dict[str, str]]:
    """Return the settings of the small runs, by their depth."""
    assert config.scale.depth is not None
    most = -(-count // 2) if vary_tokens else count
    flops: dict[int, float] = {}  # by depth, descending
    for depth in range(config.scale.depth - 1, 0, -1):
        size = size_of(resolve(make_words(**{"scale.depth": str(depth)})))
        tiny = len(flops) >= MIN_SIZES and size.flops < max(flops.values()) / SPAN
        if size.flops <= largest and len(flops) < most and not tiny:
            flops[depth] = size.flops
    depths = sorted(flops)
    if vary_tokens:
        ratio = config.scale.tokens_per_parameter
        name, values = "scale.tokens_per_parameter", [ratio, ratio / TOKENS_STEP]
    else:
        name, values = "seed", [config.seed + k for k in range(count)]
    runs = [(depth, value) for value in values for depth in depths][:count]
    return [{"scale.depth": str(depth), name: f"{value:g}"} for depth, value in sorted(runs)]


def _run(words: Sequence[str], settings: dict[str, str]) -> SweepRun:
    name = ",".join(f"{n.rpartition('.')[2]}={value}" for n, value in settings.items())
    return SweepRun(name, settings, tuple(words))
