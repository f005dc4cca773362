"""Model FLOPs utilization (MFU) and the peak FLOP rates that it is relative to.

Conventions of PaLM, appendix B: a multiply-add counts as two FLOPs; forward and backward together
are three times the forward pass; rematerialization is not counted; causal attention is counted as
full attention. Peaks are the vendors' rates of dense (not sparse) matrix products at the highest
clock, by the dtype of the multiplied values, not of the parameters.
"""

from tjx_metrics.performance.peak_rates import PEAK_RATES, PeakRates


def peak_flops(device_kind: str, dtype: str = "bfloat16") -> float | None:
    """Look up the peak matrix-product rate of a device.

    Parameters
    ----------
    device_kind : str
        ``jax.devices()[0].device_kind``.
    dtype : str
        Dtype of the multiplied values: "bfloat16", "float16", "float32" (JAX's default precision:
        TF32 on GPUs that have it, bfloat16 on TPUs) or "float8".

    Returns
    -------
    float or None
        Dense FLOP/s of one device with float32 accumulation; None if the table of
        `tjx_metrics.performance.peak_rates` lacks the device or a rate for this dtype.

    Raises
    ------
    ValueError
        If `dtype` is not in the table.

    Examples
    --------
    >>> peak_flops("NVIDIA H200")
    989500000000000.0
    >>> peak_flops("NVIDIA H200", "float8")
    1979000000000000.0
    >>> peak_flops("cpu") is None
    True
    """
    if dtype not in PeakRates._fields:
        raise ValueError(f"dtype: got {dtype!r}; expected one of {', '.join(PeakRates._fields)}")
    rate: float | None = getattr(PEAK_RATES.get(device_kind), dtype, None)
    return rate


def transformer_flops_per_token(
    *, n_params: int, n_layer: int, d_attention: int, seq_len: int
) -> float:
    """Compute the FLOPs per token of a training step of a dense transformer.

    Parameters
    ----------
    n_params : int
        Parameters used in a matrix product for each token; for GPT-2 all parameters, by the
        convention of PaLM and nanoGPT.
    n_layer : int
        Number of attention layers.
    d_attention : int
        Number of query heads times head dimension; `d_model` in GPT-2.
    seq_len : int
        Keys per query, ignoring the mask.

    Returns
    -------
    float
        ``6 * n_params + 12 * n_layer * d_attention * seq_len``, forward and backward.

    References
    ----------
    Chowdhery et al., "PaLM", 2022, appendix B.

    Examples
    --------
    >>> transformer_flops_per_token(
    ...     n_params=124_439_808, n_layer=12, d_attention=768, seq_len=1024
    ... )
    859885056.0
    """
    return 6.0 * n_params + 12.0 * n_layer * d_attention * seq_len


def mfu(
    tokens_per_sec: float, flops_per_token: float, peak_flops: float | None, n_devices: int = 1
) -> float | None:
    """Compute model FLOPs utilization: the fraction of the peak rate that the model achieves.

    Parameters
    ----------
    tokens_per_sec : float
        Tokens per second over all devices.
    flops_per_token : float
        FLOPs of a training step per token.
    peak_flops : float or None
        Peak FLOP/s of one device, from `peak_flops`.
    n_devices : int
        Number of devices.

    Returns
    -------
    float or None
        Fraction in [0, 1]; None if the peak is unknown.

    Examples
    --------
    >>> mfu(100_000.0, 1e9, 200e12)
    0.5
    >>> mfu(100_000.0, 1e9, None) is None
    True
    """
    if peak_flops is None:
        return None
    return tokens_per_sec * flops_per_token / (peak_flops * n_devices)
