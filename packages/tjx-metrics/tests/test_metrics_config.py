"""Configuration: error messages, import cost, and the examples of all modules."""

import doctest
import importlib
import subprocess
import sys
from dataclasses import fields

import docstring_parser
import pytest

from tjx_core import ConfigError
from tjx_metrics import LogConfig


def test_all_problems_are_reported_with_their_fields() -> None:
    with pytest.raises(ConfigError) as caught:
        LogConfig(every=0, samples_every=0, trackers=("wandb", "wandb", "wandbb"), project="")
    assert [problem.path for problem in caught.value.problems] == [
        "every", "samples_every", "trackers", "trackers", "project",
    ]  # fmt: skip
    assert "every: got 0; expected at least 1" in str(caught.value)
    assert "did you mean wandb?" in str(caught.value)


def test_each_field_has_one_line_for_the_help() -> None:
    params = docstring_parser.parse(LogConfig.__doc__ or "").params
    assert {p.arg_name for p in params} == {field.name for field in fields(LogConfig)}
    assert all(p.description and "\n" not in p.description for p in params)


def test_config_has_no_heavy_imports() -> None:
    code = (
        "import sys, tjx_metrics; tjx_metrics.LogConfig(); "
        "sys.exit(any(m in sys.modules for m in ('jax', 'matplotlib', 'rich', 'numpy')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "module",
    [
        "metrics.accumulators",
        "metrics.cross_entropy",
        "metrics.per_document",
        "metrics.perplexity",
        "metrics.top_k",
        "metrics.weight_histograms",
        "performance.compilation",
        "performance.flops",
        "performance.phase_timer",
        "performance.throughput",
        "plotting.attention",
        "plotting.histograms",
        "plotting.layer_norms",
        "plotting.smoothing",
        "plotting.style",
        "profiling.profiler",
        "report.comparison",
        "report.summary",
        "trackers.availability",
        "trackers.base",
        "trackers.jsonl",
        "metrics.registration",
        "trackers.registration",
        "trackers.status_line",
    ],
)
def test_the_examples_of_a_module_run(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"tjx_metrics.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
