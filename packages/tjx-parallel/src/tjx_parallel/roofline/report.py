"""Text and JSON reports of an estimate: regions, costliest operations, assumptions."""

from typing import Any

from tjx_parallel.roofline.estimate import Estimate, Kernel, Total
from tjx_parallel.roofline.regions import COLLECTIVES

_COSTLIEST = 10


def report(found: Estimate) -> list[str]:
    """Return the report of an estimate as lines of text."""
    total = found.total()
    return [
        f"{'Region':<24}{'pass':<10}{'kernels':>8}{'GB':>9}{'TFLOP':>9}{'ms':>9}",
        *(
            _row(region.name, "" if region.name == COLLECTIVES else region.phase, sums)
            for region, sums in found.by_region().items()
        ),
        _row("all but collectives", "", total),
        "",
        "Costliest operations:",
        f"{'ms':>8}  {'runs':>5}  {'bound':<9}{'kind':<18}operation",
        *(_operation(*each) for each in found.costliest(_COSTLIEST)),
        "",
        "Assumptions:",
        *(f"  {line}" for line in found.assumptions.lines(found.chip)),
        *(f"  {note}" for note in found.notes),
    ]


def to_json(found: Estimate) -> dict[str, Any]:
    """Return an estimate as JSON; times in milliseconds."""
    return {
        "total": _numbers(found.total()),
        "regions": [
            {"region": region.name, "pass": region.phase, **_numbers(sums)}
            for region, sums in found.by_region().items()
        ],
        "costliest": [
            {
                "operation": short_name(kernel), "kind": kernel.kind, "bound": kernel.bound,
                **_numbers(sums),
            }
            for kernel, sums in found.costliest(_COSTLIEST)
        ],
        "assumptions": [*found.assumptions.lines(found.chip), *found.notes],
    }  # fmt: skip


def short_name(kernel: Kernel) -> str:
    """Return region, pass and the last scopes of the op_name, without JAX's loops."""
    parts = [
        part
        for part in kernel.op_name.split("/")
        if part not in ("while", "body", "eval_jaxpr", "closed_call", "cond")
        and not part.startswith(("jit(", "jvp(", "transpose("))
    ]
    tail = "/".join(parts[-2:]) or kernel.name
    return f"{kernel.region.name} {kernel.region.phase}: {tail}"


def _row(name: str, phase: str, sums: Total) -> str:
    return (
        f"{name:<24}{phase:<10}{sums.kernels:>8,}{sums.bytes / 1e9:>9.2f}"
        f"{sums.flops / 1e12:>9.3f}{sums.seconds * 1e3:>9.2f}"
    )


def _operation(kernel: Kernel, sums: Total) -> str:
    return (
        f"{sums.seconds * 1e3:8.2f}  {sums.kernels:5,}  {kernel.bound:<9}{kernel.kind:<18}"
        f"{short_name(kernel)}"
    )


def _numbers(sums: Total) -> dict[str, float | int]:
    return {
        "kernels": sums.kernels,
        "gigabytes": round(sums.bytes / 1e9, 3),
        "teraflops": round(sums.flops / 1e12, 4),
        "milliseconds": round(sums.seconds * 1e3, 3),
    }
