"""Registry of transformers families; each module of the folders describes one or a few."""

from tjx_nn.hf.families.decoders.cohere import COHERE, COHERE2
from tjx_nn.hf.families.decoders.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from tjx_nn.hf.families.decoders.gemma import GEMMA, GEMMA2, GEMMA3
from tjx_nn.hf.families.decoders.gpt2 import GPT2
from tjx_nn.hf.families.decoders.gpt_neox import GPT_NEOX
from tjx_nn.hf.families.decoders.gpt_oss import GPT_OSS
from tjx_nn.hf.families.decoders.granite import GRANITE
from tjx_nn.hf.families.decoders.llama import LLAMA, MISTRAL
from tjx_nn.hf.families.decoders.llama4 import LLAMA4
from tjx_nn.hf.families.decoders.mixtral import MIXTRAL
from tjx_nn.hf.families.decoders.olmo import OLMO2, OLMO3
from tjx_nn.hf.families.decoders.phi3 import PHI3
from tjx_nn.hf.families.decoders.qwen import QWEN2, QWEN3, QWEN3_MOE
from tjx_nn.hf.families.decoders.smollm3 import SMOLLM3
from tjx_nn.hf.families.decoders.starcoder2 import STARCODER2
from tjx_nn.hf.families.encoder_decoders.bart import BART
from tjx_nn.hf.families.encoder_decoders.t5 import MT5, T5
from tjx_nn.hf.families.encoders.bert import BERT, ROBERTA
from tjx_nn.hf.families.encoders.dinov2 import (
    DINOV2,
    DINOV2_BACKBONE,
    DINOV2_REGISTERS,
    DINOV2_REGISTERS_BACKBONE,
)
from tjx_nn.hf.families.encoders.modernbert import MODERNBERT
from tjx_nn.hf.families.encoders.siglip import SIGLIP, SIGLIP_VISION
from tjx_nn.hf.families.encoders.vit import VIT
from tjx_nn.hf.family import ModelFamily

# Families of this package; `save` uses the first one that can represent a model.
BUILT_IN = (
    GPT2, LLAMA, MISTRAL, QWEN3, QWEN2, GEMMA, GEMMA2, GEMMA3, OLMO2, PHI3, MIXTRAL, QWEN3_MOE,
    GPT_NEOX, STARCODER2, DEEPSEEK_V2, DEEPSEEK_V3, SMOLLM3, GRANITE, COHERE, COHERE2, OLMO3,
    GPT_OSS, LLAMA4, BERT, ROBERTA, MODERNBERT, VIT, BART, T5, MT5,
    DINOV2, DINOV2_BACKBONE, DINOV2_REGISTERS, DINOV2_REGISTERS_BACKBONE, SIGLIP, SIGLIP_VISION,
)  # fmt: skip
_REGISTERED: list[ModelFamily] = []


def register(family: ModelFamily) -> ModelFamily:
    """Register a family of another package for `load` and `save`, and return it.

    Parameters
    ----------
    family
        Description of the family. `save` tries registered families after the built-in ones.

    Raises
    ------
    ValueError
        If another family has the same model_type and architecture.
    """
    for known in all_families():
        same = (known.model_type, known.architecture) == (family.model_type, family.architecture)
        if same and known is not family:
            raise ValueError(
                f"family: got {family.model_type} ({family.architecture}), which is registered; "
                "expected another model_type or architecture"
            )
    if family not in all_families():
        _REGISTERED.append(family)
    return family


def all_families() -> tuple[ModelFamily, ...]:
    """Return the built-in and the registered families."""
    return (*BUILT_IN, *_REGISTERED)
