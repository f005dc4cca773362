"""What XLA makes of the matrix products of a block for NVIDIA GPUs: epilogues, and FP8 calls."""

import os
import re
import subprocess
import sys

import gpu_step
import pytest

from tjx_trainer.xla_flags import set_flags

_CALL = re.compile(r".* custom-call\(.*custom_call_target=\"__cublas.*")


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_products_of_a_block(precision: str) -> None:
    cuda = gpu_step.folder_of_ptxas()
    if cuda is None:
        pytest.skip("needs the CUDA plugin of JAX and ptxas: tools/locks/compile.txt")
    flags = f"--xla_gpu_cuda_data_dir={cuda}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    set_flags("gpu", environment)  # as a run has them
    command = [sys.executable, gpu_step.__file__, precision]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    types = dict(re.findall(r"%?([\w.\-]+) = \(?(\w+)\[", done.stdout))
    calls = _CALL.findall(done.stdout)
    operands = [re.findall(r"%?([\w.\-]+)", each.split("custom-call(")[1])[:2] for each in calls]
    kinds = [sorted(types.get(name, "") for name in pair) for pair in operands]
    epilogues = re.findall(r'"epilogue":"(\w+)"', "\n".join(calls))
    if precision == "bf16":
        # The MLP's first product; query, key, value, output and the MLP's second have a bias.
        assert (epilogues.count("BIAS_GELU_AUX"), epilogues.count("BIAS")) == (1, 5)
        assert "__cublas$lt$matmul$f8" not in done.stdout
        return
    # Six products of a block, each with two of its gradients.
    assert sum("__cublas$lt$matmul$f8" in each for each in calls) == 18
    assert kinds.count(["f8e4m3fn", "f8e4m3fn"]) == 6
    assert kinds.count(["f8e4m3fn", "f8e5m2"]) == 12
    assert epilogues.count("BIAS") == 6
