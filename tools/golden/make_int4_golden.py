"""Write the golden file of GPTQ and AWQ layers: packed by AutoGPTQ and AutoAWQ, and dequantized.

Both are archived packages that do not import beside a current transformers. The script imports the
few modules that pack and dequantize, from unpacked archives (see README.md):

    python make_int4_golden.py auto_gptq-0.7.1 autoawq-0.2.9 ../../packages/tjx-nn/tests/golden
"""

import argparse
import pathlib
import sys
import types
from typing import Any

import numpy as np
import torch

INPUTS, OUTPUTS, GROUP = 64, 32, 16
GROUPS = INPUTS // GROUP


def without_init(name: str, folder: pathlib.Path | None = None) -> None:
    """Register a package without running its __init__, which imports other packages."""
    module = types.ModuleType(name)
    module.__path__ = [] if folder is None else [str(folder)]
    sys.modules[name] = module


def random_layer(rng: np.random.Generator, bits: int, groups: np.ndarray) -> tuple[Any, Any, Any]:
    """Return a linear layer on the grid of its scales, the scales and the zero points [O, G]."""
    values = rng.integers(0, 2**bits, (OUTPUTS, INPUTS))
    zeros = rng.integers(1, 2**bits, (OUTPUTS, GROUPS))
    scales = rng.uniform(0.01, 0.1, (OUTPUTS, GROUPS)).astype(np.float16).astype(np.float32)
    layer = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
    weight = (values - zeros[:, groups]) * scales[:, groups]
    layer.weight.data = torch.from_numpy(weight.astype(np.float32))
    return layer, torch.from_numpy(scales), torch.from_numpy(zeros)


def main() -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("auto_gptq", type=pathlib.Path)
    parser.add_argument("autoawq", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    arguments = parser.parse_args()
    gptq, awq = arguments.auto_gptq / "auto_gptq", arguments.autoawq / "awq"
    for root, path in ((gptq, "nn_modules/qlinear"), (awq, "modules/linear")):
        for folder in (root, (root / path).parent, root / path):
            without_init(".".join(folder.relative_to(root.parent).parts), folder)
    from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear

    without_init("accelerate")  # after transformers, which looks for it
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    rng, found = np.random.default_rng(0), {}
    in_order = np.arange(INPUTS) // GROUP
    for name, bits, groups in (
        ("gptq", 4, in_order),
        ("gptq_order", 4, rng.permutation(in_order)),
        ("gptq_8bit", 8, in_order),
    ):
        linear, scales, zeros = random_layer(rng, bits, groups)
        packed = QuantLinear(bits, GROUP, INPUTS, OUTPUTS, bias=False, weight_dtype=torch.float32)
        packed.pack(linear, scales, zeros.float(), torch.from_numpy(groups.astype(np.int32)))
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            found[f"{name}.{part}"] = getattr(packed, part).numpy()
        found[f"{name}.weight"] = packed(torch.eye(INPUTS)).numpy().T
        assert np.allclose(found[f"{name}.weight"], linear.weight.detach().numpy())
    linear, scales, zeros = random_layer(rng, 4, in_order)
    layer = WQLinear_GEMM.from_linear(linear, 4, GROUP, scales=scales.T, zeros=zeros.T)
    for part in ("qweight", "qzeros", "scales"):
        found[f"awq.{part}"] = getattr(layer, part).numpy()
    weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, GROUP)
    found["awq.weight"] = weight.numpy().T
    assert np.allclose(found["awq.weight"], linear.weight.detach().numpy())
    np.savez_compressed(arguments.output / "int4_groups.npz", **found)


if __name__ == "__main__":
    main()
