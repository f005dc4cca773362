"""The entry of config.json that describes the quantization of a checkpoint."""

from typing import Literal

from tjx_nn.hf.block_fp8 import Block
from tjx_nn.hf.family import Json
from tjx_nn.hf.int_groups import IntGroups, read_entry

# Rows and columns of the blocks of FP8 matrices, MXFP4, or the groups of GPTQ and AWQ.
Quantization = Block | Literal["mxfp4"] | IntGroups

_KEY = "quantization_config"
# Entries that do not change the stored weights. The activations of transformers are rounded to FP8,
# those of tjx are not.
_IGNORED = {"dequantize", "modules_to_not_convert"}
_IGNORED_FP8 = {*_IGNORED, "activation_scheme", "fmt"}


def split_quantization(config_json: Json) -> tuple[Json, Quantization | None]:
    """Return config.json without a quantization that tjx reads, and the quantization, if any.

    Any other quantization stays in config.json, which no family accepts.

    Raises
    ------
    ValueError
        If GPTQ or AWQ have options that tjx does not support.
    """
    rest = {key: value for key, value in config_json.items() if key != _KEY}
    match config_json.get(_KEY):
        case {"quant_method": "mxfp4", **others} if not others.keys() - _IGNORED:
            return rest, "mxfp4"
        case {"quant_method": "gptq" | "awq" as method}:
            return rest, read_entry(method, config_json[_KEY])
        case {
            "quant_method": "fp8",
            "weight_block_size": [int(rows), int(columns)],
            **others,
        } if (
            min(rows, columns) > 0
            and others.get("fmt", "e4m3") == "e4m3"
            and not others.keys() - _IGNORED_FP8
        ):
            return rest, (rows, columns)
    return config_json, None
