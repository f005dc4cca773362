"""Command line: ``python -m tjx_parallel.roofline step.hlo.txt`` estimates the step time."""

import argparse
import sys
from pathlib import Path

from tjx_parallel.planning.chips import CHIPS, find_chip
from tjx_parallel.roofline import assumptions_for, estimate, report


def main() -> None:
    """Print the estimated step time of an HLO file."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tjx_parallel.roofline")
    parser.add_argument("hlo", type=Path, help="text of compiled.as_text()")
    parser.add_argument("--chip", default="h200", help=f"one of {', '.join(CHIPS)}")
    parser.add_argument("--attention_visible", type=float, default=0.5, help="1 without a mask")
    parser.add_argument("--mesh", default="", help="sizes of axes, outer to inner: data=2,fsdp=4")
    options = parser.parse_args()
    try:
        chip = find_chip(options.chip)
        sizes = [item.split("=") for item in options.mesh.split(",") if item]
        found = estimate(
            options.hlo.read_text(),
            chip,
            assumptions_for(chip, attention_visible=options.attention_visible),
            mesh_shape={name: int(size) for name, size in sizes} or None,
        )
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    sys.stdout.write("\n".join(report(found)) + "\n")


if __name__ == "__main__":
    main()
