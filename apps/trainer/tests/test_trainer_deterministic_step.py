"""Determinism of the training step on GPUs: no scatter with atomics before or after XLA."""

import re
from pathlib import Path

import gpu_step
import pytest

# A scatter of StableHLO: its attributes end with ">", and its reduction follows in braces.
_SCATTER = re.compile(r'"stablehlo\.scatter"\(.*?\}\) :', re.DOTALL)


@pytest.mark.parametrize("family", gpu_step.FAMILIES)
def test_every_scatter_of_the_step_for_gpus_has_unique_indices(family: str) -> None:
    """XLA:GPU compiles others to atomics, also where their indices are sorted."""
    text = gpu_step.stablehlo(family)
    assert "dot_general" in text
    assert "select_and_scatter" not in text
    scatters = _SCATTER.findall(text)
    assert len(scatters) == text.count('"stablehlo.scatter"')
    for scatter in scatters:
        assert "unique_indices = true" in scatter, scatter


def test_the_compiled_step_has_no_atomics(tmp_path: Path) -> None:
    gpu_step.compile_elsewhere(flags=f"--xla_dump_to={tmp_path} --xla_dump_emitter_re=.*")
    files = list(tmp_path.glob("*.ptx"))
    assert len(files) > 100
    found = {
        (file.name, atomic)
        for file in files
        for atomic in re.findall(r"\b(?:atom|red)\.\S+", file.read_text())
    }
    assert not found
