"""Print the devices of JAX and the available tjx implementations as JSON.

    python -m gpu_slices.probe

Runs in a separate process, so that the slice runner never imports JAX.
"""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp

import tjx_metrics
from tjx_kernels import implementations_for
from tjx_kernels.attention.call import describe_call
from tjx_trainer.config.config_tree import leaves


def implementations() -> dict[str, str | None]:
    """Return the attention implementations for GPUs; the value is why training fails, or None.

    Describe a causal call of the shape of GPT-2 for a Hopper GPU and for the present device.
    "reference" is excluded, as it stores all scores.
    """
    x = jax.ShapeDtypeStruct((2, 1024, 12, 64), jnp.bfloat16)  # type: ignore[no-untyped-call]  # as jax is
    call = describe_call(q=x, k=x, v=x, causal=True)
    here = implementations_for(call)
    hopper = implementations_for(replace(call, platform="gpu", architecture="sm_90"))
    return {name: here[name] for name in here if hopper[name] is None and name != "reference"}


def main() -> None:
    """Print the JSON as the last line."""
    device = jax.devices()[0]
    found = {
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "implementations": implementations(),
        "peak_flops": tjx_metrics.peak_flops(device.device_kind, "bfloat16"),
        "trainer_flags": list(leaves()),
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
