"""The small runs of a prediction: the dial of the large run, turned down."""

from collections.abc import Sequence
from dataclasses import dataclass

from tjx_core import ConfigError
from tjx_trainer.cli.arguments import parse_args, resolve
from tjx_trainer.config.config_tree import flatten
from tjx_trainer.config.run_config import Config
from tjx_trainer.scaling.dial import block_params
from tjx_trainer.sweep.grid import Grid, SweepRun

MIN_RUNS, MAX_RUNS = 5, 8
RATIO = 10.0  # of the FLOPs of the large run to those of the largest small run, at least
MARGIN = 1.2  # of the largest small run below that ratio, as sizes and steps are whole numbers
STEP = 2.0  # between the FLOPs of small runs
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
    argv: Sequence[str], count: int, *, vary_tokens: bool = False, seeds: int = 1
) -> tuple[Grid, SweepRun]:
    """Return the small runs, and the large one, which the command line describes.

    The small runs have a twelfth of its FLOPs, a 24th, a 48th and so on.

    Parameters
    ----------
    argv : sequence of str
        The flags of the large run.
    count : int
        Number of sizes of small runs.
    vary_tokens : bool
        Whether half of the sizes have a quarter of the tokens per parameter instead, which a law of
        parameters and tokens needs.
    seeds : int
        Runs of each size: with the seed of the large run, the next one and so on.

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
    if problems:
        raise ConfigError(problems)
    target = size_of(config).flops
    first = target / RATIO / MARGIN
    sizes = [{"scale.flops": f"{first / STEP**k:.4g}"} for k in range(count)]
    if vary_tokens:
        full = config.scale.tokens_per_parameter
        ratios = (f"{full / TOKENS_STEP:g}", f"{full:g}")
        sizes = [{**size, "scale.tokens_per_parameter": r} for size in sizes for r in ratios]
    settings = [
        {**size, "seed": str(config.seed + k)} for size in sizes[:count] for k in range(seeds)
    ]
    settings.reverse()
    runs = [_run(words.argv(**{"scale.depth": "none"}, **each), each) for each in settings]
    own = [size_of(resolve(each.words)) for each in runs]
    if len(set(own)) < count or max(size.flops for size in own) > target / RATIO:
        raise ConfigError([
            f"--predict.runs: got {count} with {len(set(own))} different sizes of up to "
            f"{max(size.flops for size in own):.3g} FLOPs; expected {count}, of at most a tenth of "
            f"the {target:.3g} FLOPs of the run to predict; give a larger --scale.depth or "
            "--scale.flops, and no flags that fix size or length"
        ])  # fmt: skip
    axes = {axis: tuple(dict.fromkeys(each[axis] for each in settings)) for axis in settings[0]}
    scale = config.scale
    turned = f"flops={scale.flops:.4g}" if scale.flops is not None else f"depth={scale.depth}"
    return Grid(axes, tuple(runs), config), SweepRun(f"large,{turned}", {}, tuple(words.argv()))


def _run(words: Sequence[str], settings: dict[str, str]) -> SweepRun:
    name = ",".join(f"{n.rpartition('.')[2]}={value}" for n, value in settings.items())
    return SweepRun(name, settings, tuple(words))
