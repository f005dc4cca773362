"""Mappings of mixtures of experts."""

from collections.abc import Callable, Sequence
from typing import Any

from tjx_nn.hf.decoder import LAYER, decoder_tensors
from tjx_nn.hf.family import TRANSPOSED, FieldMapping, TensorMapping, same, tensor

# transformers has no capacity and no router z-loss.
EXPERT_CONSTANTS: dict[str, Any] = {"experts.capacity_factor": None, "experts.z_loss": 0.0}


def expert_fields(*, count: int, per_token: int) -> list[FieldMapping]:
    """Map the number of experts and the weight of the balance loss, with a family's defaults."""
    return [
        same("experts.count", "num_local_experts", count),
        same("experts.per_token", "num_experts_per_tok", per_token),
        same("experts.balance_loss", "router_aux_loss_coef", 0.001),
    ]


def gated_experts(layer: str, *, gate: str, up: str, down: str) -> list[TensorMapping]:
    """Map gated experts and their router, a tensor for each matrix of each expert.

    Parameters
    ----------
    layer
        Name of the layer of experts in a block.
    gate, up, down
        Names of the matrices of an expert.
    """
    expert = f"{LAYER}.{layer}.experts.{{expert}}"
    return [
        *tensor("blocks.mlp.router.kernel", f"{LAYER}.{layer}.gate.weight", TRANSPOSED),
        *tensor("blocks.mlp.gate.kernel", f"{expert}.{gate}.weight", TRANSPOSED),
        *tensor("blocks.mlp.up.kernel", f"{expert}.{up}.weight", TRANSPOSED),
        *tensor("blocks.mlp.down.kernel", f"{expert}.{down}.weight", TRANSPOSED),
    ]


def expert_tensors(
    layer: str, *, gate: str, up: str, down: str
) -> Callable[[Any], Sequence[TensorMapping]]:
    """Return the tensor mappings of a decoder with `gated_experts` in each block."""
    tensors = decoder_tensors(mlp=gated_experts(layer, gate=gate, up=up, down=down))
    return lambda _: tensors
