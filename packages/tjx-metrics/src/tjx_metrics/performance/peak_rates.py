"""Peak matrix-product rates of accelerators, from vendor datasheets.

Imports the standard library only. All rates are dense, of one JAX device at the highest clock;
rates that vendors print with sparsity are halved. A rate without a published figure is None. Keys
are values of ``jax.devices()[0].device_kind`` and match exactly, because variants of a chip differ.
A TPU device is one chip, except on v3 and 7x, where it is one of two cores.

float32 is JAX's default matmul precision (docs.jax.dev, "Matmul precision"): TF32 on GPUs since the
A100, one bfloat16 pass on TPUs. V100 and T4 have neither and use float32 cores. The peak is lower
if you set a higher ``jax_default_matmul_precision``.

The rates of A10, RTX 3090, V100, T4, H100 PCIe and NVL, and GH200 have not been checked against
their datasheets: check them before you quote an MFU of these devices.
"""

from collections.abc import Mapping
from typing import NamedTuple


class PeakRates(NamedTuple):
    """FLOP/s of one device by the dtype of the multiplied values; None if unknown.

    Attributes
    ----------
    bfloat16, float16 : float or None
        With float32 accumulation.
    float32 : float or None
        At JAX's default matmul precision; see the module docstring.
    float8 : float or None
        E4M3 or E5M2, with float32 accumulation.
    """

    bfloat16: float | None = None
    float16: float | None = None
    float32: float | None = None
    float8: float | None = None


def _tera(*rates: float | int | None) -> PeakRates:
    return PeakRates(*(None if rate is None else rate * 1e12 for rate in rates))


# NVIDIA A100 datasheet: dense figures, equal for all form factors.
_A100 = _tera(312, 312, 156)
# NVIDIA H100 datasheet, with sparsity: SXM BFLOAT16 1,979, TF32 989, FP8 3,958; PCIe 1,513, 756
# and 3,026; NVL 1,671, 835 and 3,341.
_H100_SXM = _tera(1979 / 2, 1979 / 2, 989 / 2, 3958 / 2)
_H100_PCIE = _tera(1513 / 2, 1513 / 2, 756 / 2, 3026 / 2)
_H100_NVL = _tera(1671 / 2, 1671 / 2, 835 / 2, 3341 / 2)
# NVIDIA V100 datasheet: SXM2 125 TFLOPS of tensor cores and 15.7 in single precision; PCIe 112, 14.
_V100_SXM = _tera(None, 125, 15.7)
_V100_PCIE = _tera(None, 112, 14)
# Google Cloud's page of each TPU, peak compute per chip: v3 123, v4 275, v5e 197, v5p 459, v6e 918
# TFLOPS in bf16; the page of TPU7x: 2307 in bf16 and 4614 in fp8, and for fp8 of v5p and v6e 459
# and 918. Sources disagree on v2, so it is omitted.
_V5E, _V5P, _V6E = (_tera(rate, None, rate, fp8) for rate, fp8 in
                    ((197, None), (459, 459), (918, 918)))  # fmt: skip

PEAK_RATES: Mapping[str, PeakRates] = {
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA H100 80GB HBM3": _H100_SXM,
    "NVIDIA H100 PCIe": _H100_PCIE,
    "NVIDIA H100 NVL": _H100_NVL,
    # NVIDIA H200 datasheet: SXM as H100 SXM, NVL as H100 NVL.
    "NVIDIA H200": _H100_SXM,
    "NVIDIA H200 NVL": _H100_NVL,
    # NVIDIA GH200 datasheet: as H100 SXM.
    "NVIDIA GH200 120GB": _H100_SXM,
    "NVIDIA GH200 480GB": _H100_SXM,
    "NVIDIA GH200 144G HBM3e": _H100_SXM,
    # NVIDIA Blackwell datasheet, a GPU of HGX B200, with sparsity: BFLOAT16 4.5, TF32 2.2 and
    # FP8 9 PFLOPS.
    "NVIDIA B200": _tera(2250, 2250, 1100, 4500),
    # NVIDIA L4 datasheet, with sparsity: BFLOAT16 242, TF32 120, FP8 485.
    "NVIDIA L4": _tera(242 / 2, 242 / 2, 120 / 2, 485 / 2),
    # NVIDIA L40S datasheet: dense figures.
    "NVIDIA L40S": _tera(362.05, 362.05, 183, 733),
    # NVIDIA A10 datasheet: dense figures.
    "NVIDIA A10": _tera(125, 125, 62.5),
    # NVIDIA Ada and GA102 architecture whitepapers, appendix A: dense, sums in FP32.
    "NVIDIA GeForce RTX 4090": _tera(165.2, 165.2, 82.6, 330.3),
    "NVIDIA GeForce RTX 3090": _tera(71, 71, 35.6),
    "Tesla V100-SXM2-16GB": _V100_SXM,
    "Tesla V100-SXM2-32GB": _V100_SXM,
    "Tesla V100-PCIE-16GB": _V100_PCIE,
    "Tesla V100-PCIE-32GB": _V100_PCIE,
    # NVIDIA T4 datasheet: 65 TFLOPS of tensor cores, 8.1 in single precision.
    "Tesla T4": _tera(None, 65, 8.1),
    "TPU v3": _tera(123 / 2, None, 123 / 2),
    "TPU v4": _tera(275, None, 275),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": _tera(2307 / 2, None, 2307 / 2, 4614 / 2),
}
"""Peak rates by `device_kind`."""
