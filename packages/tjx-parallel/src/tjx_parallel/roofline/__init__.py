"""Estimate the time of a compiled step from its optimized HLO, kernel by kernel. No JAX."""

from tjx_parallel.roofline.assumptions import Assumptions as Assumptions
from tjx_parallel.roofline.assumptions import assumptions_for as assumptions_for
from tjx_parallel.roofline.estimate import Estimate as Estimate
from tjx_parallel.roofline.estimate import Kernel as Kernel
from tjx_parallel.roofline.estimate import estimate as estimate
from tjx_parallel.roofline.report import report as report
from tjx_parallel.roofline.report import to_json as to_json
