"""Model FLOPs utilisation that can be audited: no figure rather than a wrong one.

Conventions (PaLM, appendix B): a multiply-add is two operations; forward and backward together are
three times the forward; recomputation is not counted; attention is counted in full, also where a
causal mask skips half of it. Peaks are the makers' figures for dense (not sparse) matrix products
at the highest clock, so a real product never reaches them. Which type counts is that in which the
model multiplies, not that of its parameters.
"""

from tjx_metrics.performance.peak_rates import PEAK_RATES, PeakRates


def peak_flops(device_kind: str, dtype: str = "bfloat16") -> float | None:
    """Look up the peak rate of a device for matrix products.

    Parameters
    ----------
    device_kind : str
        ``jax.devices()[0].device_kind``.
    dtype : str
        Type of what is multiplied: "bfloat16", "float16", "float32" (as JAX multiplies it by
        default: in TF32 where the GPU can, in bfloat16 on TPUs) or "float8".

    Returns
    -------
    float or None
        Operations a second of one device, dense, with float32 sums; None for a device that is not
        in the table of `tjx_metrics.performance.peak_rates`, or has no figure for this type.

    Raises
    ------
    ValueError
        If the table knows no such type.

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
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(PeakRates._fields)}")
    rate: float | None = getattr(PEAK_RATES.get(device_kind), dtype, None)
    return rate


def transformer_flops_per_token(
    *, n_params: int, n_layer: int, d_attention: int, seq_len: int
) -> float:
    """Count the operations of a training step for a token of a dense transformer.

    Parameters
    ----------
    n_params : int
        Parameters that enter a matrix product for each token; for GPT-2 all of them, by the
        convention of PaLM and nanoGPT.
    n_layer : int
        Layers with attention.
    d_attention : int
        Heads times head dimension of the queries; the model's width in GPT-2.
    seq_len : int
        Tokens that a query attends to, the mask not counted.

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
    """Compute the share of the devices' peak rate that the model's own operations use.

    Parameters
    ----------
    tokens_per_sec : float
        Tokens a second over all devices.
    flops_per_token : float
        Operations of a training step a token.
    peak_flops : float or None
        Peak of one device, as `peak_flops` gives it.
    n_devices : int
        Devices that share the work.

    Returns
    -------
    float or None
        Share in [0, 1]; None where the peak is unknown.

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
