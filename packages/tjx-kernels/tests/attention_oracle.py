"""Attention oracle in NumPy float64, independent of the code under test.

NumPy in float64, one head at a time, gradients by hand. Only which weights dropout keeps is asked
of the package, as that is a definition.
"""

from typing import Any

import jax
import numpy as np

from tjx_kernels.attention import dropout


def oracle(inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Return out, lse and the gradients of sum(out * dout) + sum(lse * dlse over live rows)."""
    q, k, v, dout, dlse = (
        np.asarray(inputs[name], np.float64) for name in ("q", "k", "v", "dout", "dlse")
    )
    batch, q_len, heads, head_dim = q.shape
    scale = options.get("scale") or head_dim**-0.5
    cap = options.get("soft_cap")
    kept = _kept(inputs, options)
    found = {
        "out": np.zeros_like(dout),
        "lse": np.full(dlse.shape, -np.inf),
        **{f"d{name}": np.zeros_like(x) for name, x in (("q", q), ("k", k), ("v", v))},
    }
    dbias = np.zeros((batch, heads, q_len, k.shape[1]))
    for b in range(batch):
        distance, sees = _seen(inputs, b, options)
        for n in range(heads):
            m = n // (heads // k.shape[2])
            raw = scale * q[b, :, n] @ k[b, :, m].T
            s = raw if cap is None else cap * np.tanh(raw / cap)
            s = s + _added(inputs, b, n, distance)
            s = np.where(sees & _allowed(inputs, b, n, options), s, -np.inf)
            live = np.isfinite(s).any(1)
            top = np.where(live, s.max(1, initial=-np.inf), 0)[:, None]
            weight = np.exp(s - top)
            total = np.where(live, weight.sum(1), 1)
            p = weight / total[:, None]
            dropped = p * kept[b, n]
            found["out"][b, :, n] = dropped @ v[b, :, m]
            found["lse"][b, n] = np.where(live, np.log(total) + top[:, 0], -np.inf)
            dp = (dout[b, :, n] @ v[b, :, m].T) * kept[b, n]
            ds = p * (dp - (p * dp).sum(1)[:, None] + dlse[b, n][:, None])
            dbias[b, n] = ds
            if cap is not None:
                ds = ds * (1 - np.tanh(raw / cap) ** 2)
            found["dq"][b, :, n] += scale * ds @ k[b, :, m]
            found["dk"][b, :, m] += scale * ds.T @ q[b, :, n]
            found["dv"][b, :, m] += dropped.T @ dout[b, :, n]
    if "bias" in inputs:
        shared = tuple(axis for axis in (0, 1) if inputs["bias"].shape[axis] == 1)
        found["dbias"] = dbias.sum(shared, keepdims=True)
    return found


def _seen(inputs: dict[str, Any], b: int, options: dict[str, Any]) -> tuple[Any, Any]:
    offsets = inputs.get("q_offset", options.get("q_offset", 0))
    offset = np.broadcast_to(offsets, inputs["q"].shape[:1])[b]
    position = offset + np.arange(inputs["q"].shape[1])[:, None]
    distance = position - np.arange(inputs["k"].shape[1])[None, :]
    sees = np.ones(distance.shape, bool)
    if options.get("causal"):
        sees &= distance >= 0
    if options.get("window") is not None:
        sees &= distance < options["window"]
        if options.get("symmetric_window"):
            sees &= distance > -options["window"]
    if "q_segment_ids" in inputs:
        sees &= np.equal.outer(inputs["q_segment_ids"][b], inputs["kv_segment_ids"][b])
    return distance, sees


def _allowed(inputs: dict[str, Any], b: int, n: int, options: dict[str, Any]) -> Any:
    if "mask" not in options:
        return True
    offsets = inputs.get("q_offset", options.get("q_offset", 0))
    position = np.broadcast_to(offsets, inputs["q"].shape[:1])[b] + np.arange(inputs["q"].shape[1])
    return [
        [bool(options["mask"](b, n, int(i), j)) for j in range(inputs["k"].shape[1])]
        for i in position
    ]


def _added(inputs: dict[str, Any], b: int, n: int, distance: Any) -> Any:
    added = 0
    if "alibi_slopes" in inputs:
        added = -np.float64(inputs["alibi_slopes"][n]) * np.abs(distance)
    if "bias" in inputs:
        bias = inputs["bias"].astype(np.float64)
        added = added + bias[b % bias.shape[0], n % bias.shape[1]]
    return added


def _kept(inputs: dict[str, Any], options: dict[str, Any]) -> Any:
    batch, q_len, heads, _ = inputs["q"].shape
    shape = (batch, heads, q_len, inputs["k"].shape[1])
    rate = options.get("dropout_rate", 0.0)
    if not rate:
        return np.ones(shape)
    with jax.transfer_guard("allow"):
        seed = dropout.seeds(inputs["dropout_key"], batch)[:, :, None, None, None]
        _, head, row, key = np.indices(shape, sparse=True)
        kept = dropout.keep((seed[:, 0], seed[:, 1]), head, row, key, rate)
        return np.asarray(kept) / (1 - rate)
