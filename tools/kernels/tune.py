"""Tune kernel block sizes on the local device and print rows for the block-size table.

    PYTHONPATH=packages/tjx-kernels/src python tools/kernels/tune.py --implementation triton

The rows belong in `tjx_kernels/attention/block_sizes.py`. Each candidate is compiled, checked
against the backend "xla" in float32, and timed: on a GPU by the driver's time of its kernel,
elsewhere by the host's time of the whole program. Candidates that fail to compile or give wrong
results are counted and skipped; `--output` stores the reasons. `--interpret` runs everything in
Pallas' interpreter, to test the tuner.
"""

import argparse
import itertools
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from tjx_kernels import flash_attention
from tjx_kernels.attention import block_sizes
from tjx_kernels.attention.block_sizes import BlockSizes, Pass, Row

PASSES: tuple[Pass, ...] = ("forward", "dq", "dkv")
# Names of a pass's kernels; some compute dk and dv apart.
KERNELS = {
    "forward": re.compile("attention_forward"),
    "dq": re.compile("attention_dq(?![a-z])"),
    "dkv": re.compile("attention_(dq?kv?|dv)(?![a-z])"),
}
type Grid = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]
# Candidates besides the table's own row: rows of q, rows of k, stages, warps (or warpgroups).
GRIDS: dict[str, dict[Pass, Grid]] = {
    "triton": dict.fromkeys(PASSES, ((32, 64, 128), (32, 64, 128), (1, 2, 3), (4, 8))),
    "mosaic_gpu": {
        "forward": ((64,), (64, 96, 128, 192, 256), (2, 3, 4), (2, 3)),
        "dq": ((64,), (32, 64, 96, 128), (3, 4), (2, 3)),
        "dkv": ((32, 64, 96, 128), (64,), (3, 4), (2, 3)),
    },
    "tpu": dict.fromkeys(PASSES, ((128, 256, 512, 1024), (128, 256, 512, 1024, 2048), (2,), (0,))),
}
INTERPRETED: Grid = ((32, 64), (32, 64), (2,), (2,))
TOLERANCE = {"bfloat16": 3e-2, "float16": 1e-2, "float32": 1e-4}


# Placeholder if reading the table's own sizes failed.
_UNKNOWN = BlockSizes(0, 0, 0, 0)


@dataclass
class Outcome:
    """Result of a candidate: its time, or the reason for failure."""

    sizes: BlockSizes
    milliseconds: float | None = None
    problem: str | None = None


class _Substitute(dict[Row, BlockSizes]):
    """The block-size table with the sizes of one pass replaced for every row."""

    def __init__(self, which: Pass, sizes: BlockSizes | None) -> None:
        super().__init__(block_sizes.TABLE)
        self.which, self.sizes = which, sizes
        self.requested: Row | None = None

    def __getitem__(self, row: Row) -> BlockSizes:
        found = super().__getitem__(row)
        if row.which != self.which:
            return found
        self.requested = row
        return self.sizes or found


@contextmanager
def substituted(which: Pass, sizes: BlockSizes | None) -> Iterator[_Substitute]:
    """Replace the block sizes of one pass; None keeps the table."""
    table, before = _Substitute(which, sizes), block_sizes.TABLE
    block_sizes.TABLE = table
    # Cached traces have the previous sizes.
    jax.clear_caches()  # type: ignore[no-untyped-call]  # as jax is
    try:
        yield table
    finally:
        block_sizes.TABLE = before


class Problem:
    """Attention call with its inputs and reference results."""

    def __init__(self, arguments: argparse.Namespace, head_dim: int, *, causal: bool) -> None:
        self.head_dim, self.causal = head_dim, causal
        self.implementation = arguments.implementation
        self.interpret = arguments.interpret
        self.tolerance = TOLERANCE[arguments.dtype]
        heads = arguments.heads or max(1, 2048 // head_dim)
        self.shape = (arguments.batch, arguments.length, heads, head_dim)
        rng = np.random.default_rng(0)
        self.inputs = [
            jax.device_put(rng.standard_normal(self.shape, np.float32).astype(arguments.dtype))
            for _ in range(4)
        ]
        exact = [x.astype("float32") for x in self.inputs]
        self.wanted = {
            which: jax.device_get(self.program(which, "xla")(*exact)) for which in ("forward", "dq")
        }

    def program(self, which: Pass, implementation: str | None = None) -> Any:
        """Return the jitted forward pass, or both passes, of a backend."""

        def attend(q: Any, k: Any, v: Any) -> Any:
            return flash_attention(
                q,
                k,
                v,
                causal=self.causal,
                implementation=implementation or self.implementation,
                interpret=self.interpret and implementation is None,
            )

        def forward(q: Any, k: Any, v: Any, _dout: Any) -> Any:
            return (attend(q, k, v),)

        def both(q: Any, k: Any, v: Any, dout: Any) -> Any:
            out, pull = jax.vjp(attend, q, k, v)
            return (out, *pull(dout))

        return jax.jit(forward if which == "forward" else both)

    def operations(self, which: Pass) -> float:
        """Return the FLOPs of a pass: 2 products forward, 3 for dq, 4 for dk and dv."""
        batch, length, heads, head_dim = self.shape
        products = {"forward": 2, "dq": 3, "dkv": 4}[which]
        whole: float = products * 2 * batch * heads * length**2 * head_dim
        return whole / 2 if self.causal else whole

    def wrong(self, which: Pass, found: Any) -> str | None:
        """Compare with the reference, relative to the maximum of each array."""
        wanted = self.wanted["forward" if which == "forward" else "dq"]
        for name, a, b in zip(
            ("out", "dq", "dk", "dv"), jax.device_get(found), wanted, strict=False
        ):
            error = np.max(np.abs(a.astype(np.float32) - b)) / np.max(np.abs(b))
            if not error <= self.tolerance:
                return f"{name} is wrong by {error:.2g}"
        return None


def try_candidate(
    problem: Problem, which: Pass, sizes: BlockSizes | None, iterations: int
) -> tuple[Outcome, Row | None]:
    """Compile, check and time one candidate; a failure becomes part of the outcome."""
    with substituted(which, sizes) as table:
        try:
            program = problem.program(which).lower(*problem.inputs).compile()
            if table.requested is None:
                raise RuntimeError(f"the kernel took no block sizes for the pass {which!r}")
            outcome = Outcome(table[table.requested])
            if wrong := problem.wrong(which, program(*problem.inputs)):
                outcome.problem = wrong
            else:
                outcome.milliseconds = duration(program, problem.inputs, which, iterations)
        except Exception as error:  # compilers and the driver raise arbitrary exceptions
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            outcome = Outcome(sizes or _UNKNOWN, problem=line[:200])
        return outcome, table.requested


def duration(program: Any, inputs: list[Any], which: Pass, iterations: int) -> float:
    """Return the median time of a pass in milliseconds."""
    if jax.default_backend() == "gpu":
        measure = profiler.measure(program, aggregate=False, iterations=max(2, iterations))
        rounds = measure(*inputs)[1] or [[]]
        times = [
            sum(ms for name, ms in kernels if KERNELS[which].search(name)) for kernels in rounds
        ]
        if not all(times):
            raise RuntimeError(f"no kernel is named for {which!r}: {rounds[0]}")
    else:
        times = []
        for _ in range(iterations):
            start = time.perf_counter()
            jax.block_until_ready(program(*inputs))  # type: ignore[no-untyped-call]  # as jax is
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def candidates(arguments: argparse.Namespace, which: Pass, table: BlockSizes) -> list[BlockSizes]:
    """Return the candidates besides the table's sizes, the most similar first."""
    if arguments.candidates:
        chosen = [tuple(int(n) for n in x.split(",")) for x in arguments.candidates.split(";")]
        return [BlockSizes(*x) for x in chosen]
    grid = INTERPRETED if arguments.interpret else GRIDS[arguments.implementation][which]

    def distance(sizes: BlockSizes) -> float:
        pairs = zip(sizes, table, strict=True)
        return sum(abs(math.log2((a + 1) / (b + 1))) for a, b in pairs)

    every = (BlockSizes(*x) for x in itertools.product(*grid))
    return sorted((x for x in every if x != table), key=distance)


def tune_row(problem: Problem, which: Pass, arguments: argparse.Namespace) -> dict[str, Any]:
    """Try all candidates for one row of the table and print the best."""
    until = time.monotonic() + 60 * arguments.minutes_a_row
    first, row = try_candidate(problem, which, None, arguments.iterations)
    outcomes = [first]
    for sizes in candidates(arguments, which, first.sizes):
        if time.monotonic() > until:
            print(f"    # out of time after {len(outcomes)} candidates")
            break
        outcome, asked = try_candidate(problem, which, sizes, arguments.iterations)
        outcomes.append(outcome)
        row = asked or row
    good = sorted(
        (x for x in outcomes if x.milliseconds is not None), key=lambda x: x.milliseconds or 0
    )
    own = row or Row(arguments.implementation, "?", problem.head_dim, problem.causal, which)
    own = own._replace(head_dim=problem.head_dim)
    text = f"Row({', '.join(json.dumps(x) if isinstance(x, str) else repr(x) for x in own)})"
    print(f"    # {text}: {len(good)} candidates ran, {len(outcomes) - len(good)} failed")
    for place, outcome in enumerate(good[: arguments.show]):
        teraflops = problem.operations(which) / (outcome.milliseconds or 1) / 1e9
        note = f"# {outcome.milliseconds:.4f} ms, {teraflops:.1f} TFLOP/s"
        if outcome is outcomes[0]:
            note += ", the table's"
        sizes_text = f"BlockSizes{tuple(outcome.sizes)}"
        print(f"    {'# ' if place else ''}{text}: {sizes_text},  {note}", flush=True)
    if not good:
        for problem_text in dict.fromkeys(str(outcome.problem) for outcome in outcomes):
            print(f"    # {problem_text}")
    found = [{**asdict(x), "sizes": x.sizes._asdict()} for x in outcomes]
    return {"row": own._asdict(), "outcomes": found}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--implementation", choices=sorted(GRIDS), required=True)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--causal", choices=("yes", "no", "both"), default="both")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="bfloat16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, help="default: 2048 / head_dim")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--candidates", help="q,k,stages,warps;... in place of the whole grid")
    parser.add_argument("--minutes-a-row", type=float, default=5.0)
    parser.add_argument("--show", type=int, default=3, help="how many of the best to print")
    parser.add_argument("--interpret", action="store_true", help="in Pallas' interpreter")
    parser.add_argument("--output", type=Path, help="JSON with all that was tried")
    arguments = parser.parse_args()
    causal = {"yes": [True], "no": [False], "both": [True, False]}[arguments.causal]
    device = jax.devices()[0]
    print(f"    # {device.device_kind}, jax {jax.__version__}")
    found = []
    for head_dim, is_causal in itertools.product(arguments.head_dims, causal):
        problem = Problem(arguments, head_dim, causal=is_causal)
        for which in arguments.passes:
            if which == "dq" and arguments.implementation == "mosaic_gpu" and head_dim <= 64:
                continue  # the kernel of dk and dv computes it
            found.append(tune_row(problem, which, arguments))
            if arguments.output:  # after each row, in case the run is interrupted
                text = json.dumps({"device": device.device_kind, "rows": found}, indent=1)
                arguments.output.write_text(text + "\n")
    if not all(any(x["milliseconds"] for x in row["outcomes"]) for row in found):
        sys.exit("no candidate ran for some rows")


if __name__ == "__main__":
    main()
