"""The configuration says what is wrong, and reading it needs none of the heavy libraries."""

import doctest
import importlib
import subprocess
import sys
from dataclasses import fields

import docstring_parser
import pytest

from tjx_metrics import LogConfig


def test_a_cadence_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="every=0: must be at least 1"):
        LogConfig(every=0)


def test_each_field_has_one_line_for_the_help() -> None:
    params = docstring_parser.parse(LogConfig.__doc__ or "").params
    assert {p.arg_name for p in params} == {field.name for field in fields(LogConfig)}
    assert all(p.description and "\n" not in p.description for p in params)


def test_reading_the_configuration_imports_nothing_heavy() -> None:
    code = (
        "import sys, tjx_metrics; tjx_metrics.LogConfig(); "
        "sys.exit(any(m in sys.modules for m in ('jax', 'matplotlib', 'rich', 'numpy')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "module",
    [
        "performance.flops",
        "trackers.jsonl",
        "metrics.perplexity",
        "plotting.attention",
        "plotting.attention_distance",
        "plotting.histograms",
        "plotting.layer_norms",
        "plotting.smoothing",
        "plotting.style",
        "report.comparison",
        "report.summary",
        "trackers.status_line",
        "performance.throughput",
        "metrics.top_k",
        "trackers.base",
        "trackers.availability",
    ],
)
def test_the_examples_of_a_module_run(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"tjx_metrics.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
