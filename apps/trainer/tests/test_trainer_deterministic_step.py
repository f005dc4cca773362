"""The training step sums in one order on GPUs: no scatter with atomics before XLA, none after."""

import os
import re
import subprocess
import sys
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
    cuda = gpu_step.folder_of_ptxas()
    if cuda is None:
        pytest.skip("needs the CUDA plugin of JAX and ptxas: tools/locks/compile.txt")
    flags = f"--xla_gpu_cuda_data_dir={cuda} --xla_dump_to={tmp_path} --xla_dump_emitter_re=.*"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, gpu_step.__file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    files = list(tmp_path.glob("*.ptx"))
    assert len(files) > 100
    found = {
        (file.name, atomic)
        for file in files
        for atomic in re.findall(r"\b(?:atom|red)\.\S+", file.read_text())
    }
    assert not found
