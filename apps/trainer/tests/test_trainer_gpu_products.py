"""Matrix products of a block compiled for NVIDIA GPUs: epilogues and FP8 calls."""

import re

import gpu_step
import pytest

_CALL = re.compile(r".* custom-call\(.*custom_call_target=\"__cublas.*")


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_products_of_a_block(precision: str) -> None:
    program = gpu_step.compile_elsewhere(precision)
    types = dict(re.findall(r"%?([\w.\-]+) = \(?(\w+)\[", program))
    calls = _CALL.findall(program)
    operands = [re.findall(r"%?([\w.\-]+)", each.split("custom-call(")[1])[:2] for each in calls]
    kinds = [sorted(types.get(name, "") for name in pair) for pair in operands]
    epilogues = re.findall(r'"epilogue":"(\w+)"', "\n".join(calls))
    if precision == "bf16":
        # The MLP's first product; query, key, value, output and the MLP's second have a bias.
        assert (epilogues.count("BIAS_GELU_AUX"), epilogues.count("BIAS")) == (1, 5)
        assert "__cublas$lt$matmul$f8" not in program
        return
    # Six products of a block, each with two of its gradients.
    assert sum("__cublas$lt$matmul$f8" in each for each in calls) == 18
    assert kinds.count(["f8e4m3fn", "f8e4m3fn"]) == 6
    assert kinds.count(["f8e4m3fn", "f8e5m2"]) == 12
    assert epilogues.count("BIAS") == 6
