"""Weights of GPTQ and AWQ checkpoints: groups of inputs share a scale and an integer zero point.

In place of the matrix `weight` [outputs, inputs] of a linear layer there are `qweight` and
`qzeros`, unsigned integers packed into int32, `scales` [groups, outputs], and for GPTQ `g_idx`
[inputs], the group of each input, which need not ascend (activation order). An int32 holds the
integers of

- GPTQ: successive inputs in `qweight` [inputs / n, outputs], and successive outputs in `qzeros`
  [groups, outputs / n], from the lowest bits on; format "gptq" stores zero points minus 1.
- AWQ (version "gemm"): outputs 0, 2, 4, 6, 1, 3, 5, 7 of successive eights, from the lowest bits
  on, in `qweight` [inputs, outputs / 8] and `qzeros` [groups, outputs / 8].

Frantar et al. 2022, "GPTQ"; Lin et al. 2023, "AWQ"; the layouts are those of the packages AutoGPTQ
and AutoAWQ.

Axes in names: I inputs, G groups, O outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tjx_nn.problems import raise_problems
from tjx_nn.quantization.int4 import Int4Kernel, pack

DTYPE = "I32"
# Suffixes of the tensors of a linear layer; only the last one is optional.
SUFFIXES = QWEIGHT, QZEROS, SCALES, GROUP_INDEX = ".qweight", ".qzeros", ".scales", ".g_idx"
_BITS_OF_INT = 32
# Place of each output of an AWQ int32, counted from the lowest bits.
_AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
# Entries that describe how the integers were found or what computes with them.
_IGNORED = {
    "quant_method", "desc_act", "sym", "damp_percent", "true_sequential", "static_groups",
    "dataset", "tokenizer", "model_seqlen", "block_name_to_quantize", "batch_size", "pad_token_id",
    "module_name_preceding_first_block", "modules_in_block_to_quantize", "use_cuda_fp16",
    "use_exllama", "max_input_length", "exllama_config", "cache_block_outputs", "act_group_aware",
    "meta", "backend", "model_name_or_path", "model_file_base_name", "modules_to_not_convert",
    "do_fuse", "fuse_max_seq_len", "modules_to_fuse",
}  # fmt: skip
_FORMATS = ("format", "checkpoint_format", "version")


@dataclass(frozen=True)
class IntGroups:
    """Quantization of a checkpoint.

    Attributes
    ----------
    method
        "gptq" or "awq".
    bits
        Bits of an integer.
    group_size
        Inputs of a group; None is all of them.
    zero_offset
        Added to stored zero points, modulo 2 ** bits.
    """

    method: str
    bits: int
    group_size: int | None
    zero_offset: int = 0


class Matrix(NamedTuple):
    """Unpacked matrix: (values - zeros[groups]) * scales[groups], transposed.

    Attributes
    ----------
    values
        Integers, [inputs, outputs].
    scales, zeros
        Scales and zero points, [groups, outputs].
    groups
        Group of each input, [inputs].
    """

    values: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    groups: np.ndarray

    def fields(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return values, scales and zero points of each weight, float32 [outputs, inputs]."""
        of_inputs = (self.values, self.scales[self.groups], self.zeros[self.groups])
        values, scales, zeros = (x.T.astype(np.float32) for x in of_inputs)
        return values, scales, zeros

    def dequantized(self) -> np.ndarray:
        """Return the matrix, float32 [outputs, inputs]."""
        values, scales, zeros = self.fields()
        product: np.ndarray = (values - zeros) * scales
        return product


def read_entry(method: str, entry: Mapping[str, Any]) -> IntGroups:
    """Return the quantization that the entry of config.json describes.

    Parameters
    ----------
    method
        "gptq" or "awq".
    entry
        The entry.

    Raises
    ------
    ValueError
        With a line for each key that is unknown, or has another value than supported ones.
    """
    of_methods: dict[str, dict[str, tuple[Any, ...]]] = {
        "gptq": {
            "bits": (4, 8), "checkpoint_format": (None, "gptq", "gptq_v2"),
            "format": (None, "gptq", "gptq_v2"), "lm_head": (None, False), "dynamic": (None, {}),
            "is_marlin_format": (None, False),
        },
        "awq": {
            "bits": (4,), "version": (None, "gemm", "GEMM"), "format": (None, "gemm"),
            "zero_point": (None, True), "checkpoint_format": (None, "gemm"),
        },
    }  # fmt: skip
    supported = of_methods[method]
    problems = [
        f"quantization_config.{key}: got {entry.get(key)!r}; expected one of {list(values)}"
        for key, values in supported.items()
        if entry.get(key) not in values
    ]
    size = entry.get("group_size", 128)
    if not (size == -1 or (isinstance(size, int) and size > 0)):
        problems.append(
            f"quantization_config.group_size: got {size!r}; expected -1, or a positive number"
        )
    formats = {str(entry[key]).lower() for key in _FORMATS if entry.get(key) is not None}
    if len(formats) > 1:
        problems.append(f"quantization_config.format: got {sorted(formats)}; expected one of them")
    problems += [
        f"quantization_config.{key}: got {str(entry[key])[:60]}; expected no such key, which tjx "
        "does not know; delete it if it does not change the weights"
        for key in sorted(entry.keys() - supported.keys() - _IGNORED - {"group_size"})
    ]
    raise_problems(problems)
    offset = int(method == "gptq" and "gptq_v2" not in formats)
    return IntGroups(method, entry["bits"], None if size == -1 else size, offset)


def matrix_shape(
    quantization: IntGroups, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, int] | None:
    """Return the shape of a matrix, [outputs, inputs], or None if its tensors do not fit.

    Parameters
    ----------
    quantization
        Quantization of the checkpoint.
    shapes
        Shapes of the tensors of a linear layer by suffix.
    """
    per_int = _BITS_OF_INT // quantization.bits
    if len(shapes.get(QWEIGHT, ())) != 2:
        return None
    rows, columns = shapes[QWEIGHT]
    if quantization.method == "gptq":
        inputs, outputs = rows * per_int, columns
    else:
        inputs, outputs = rows, columns * per_int
    groups = -(-inputs // (quantization.group_size or inputs))
    expected: dict[str, tuple[int, ...]] = {
        QWEIGHT: (rows, columns), QZEROS: (groups, outputs // per_int), SCALES: (groups, outputs),
    }  # fmt: skip
    if GROUP_INDEX in shapes:
        expected[GROUP_INDEX] = (inputs,)
    return (outputs, inputs) if shapes == expected and outputs % per_int == 0 else None


def replace_parts(
    quantization: IntGroups, shapes: dict[str, tuple[int, ...]], parts: set[str]
) -> tuple[set[str], list[str]]:
    """Replace the parts of matrices by the matrices in the shapes of all tensors.

    Parameters
    ----------
    quantization
        Quantization of the checkpoint.
    shapes
        Shape of every tensor by name, which changes.
    parts
        Names of the int32 tensors.

    Returns
    -------
    matrices
        Names of the matrices.
    problems
        A line for each layer whose parts do not fit, and for each other int32 tensor.
    """
    matrices, problems, others = set(), [], set(parts)
    for layer in sorted(x.removesuffix(QWEIGHT) for x in parts if x.endswith(QWEIGHT)):
        names = {suffix: f"{layer}{suffix}" for suffix in SUFFIXES}
        found = {suffix: shapes.pop(name) for suffix, name in names.items() if name in shapes}
        others -= set(names.values())
        shape, matrix = matrix_shape(quantization, found), f"{layer}.weight"
        if shape is None or matrix in shapes:
            problems.append(
                f"tensor {layer}{QWEIGHT}: got shapes {found} of the parts of {layer}; expected "
                f"those of {quantization}, and no tensor {matrix}"
            )
        else:
            matrices.add(matrix)
            shapes[matrix] = shape
    problems += [
        f"tensor {name}: got {DTYPE}; expected it only beside a tensor *{QWEIGHT}"
        for name in sorted(others)
    ]
    return matrices, problems


def unpack(quantization: IntGroups, tensors: Mapping[str, np.ndarray]) -> Matrix:
    """Unpack the tensors of a linear layer, by suffix.

    Raises
    ------
    ValueError
        If an input has a group that does not exist.
    """
    bits, scales_GO = quantization.bits, tensors[SCALES].astype(np.float32)
    packed = tensors[QWEIGHT]
    if quantization.method == "gptq":
        values_IO = _integers(packed.T, bits).T
        zeros_GO = _integers(tensors[QZEROS], bits)
    else:
        values_IO, zeros_GO = (
            x.reshape(len(x), -1, len(_AWQ_PLACES))[..., _AWQ_PLACES].reshape(len(x), -1)
            for x in (_integers(packed, bits), _integers(tensors[QZEROS], bits))
        )
    inputs = len(values_IO)
    groups_I = np.arange(inputs) // (quantization.group_size or inputs)
    groups_I = np.asarray(tensors.get(GROUP_INDEX, groups_I))
    if groups_I.min(initial=0) < 0 or groups_I.max(initial=0) >= len(scales_GO):
        raise ValueError(
            f"{GROUP_INDEX[1:]}: got groups from {groups_I.min()} to {groups_I.max()}; expected 0 "
            f"to {len(scales_GO) - 1}"
        )
    zeros_GO = (zeros_GO + quantization.zero_offset) % 2**bits
    return Matrix(values_IO, scales_GO, zeros_GO, groups_I)


def int4_kernel(
    quantization: IntGroups, values: np.ndarray, scales: np.ndarray, zeros: np.ndarray
) -> Int4Kernel:
    """Make an int4 kernel from the `Matrix.fields` of its weights, [*layers, inputs, outputs].

    Raises
    ------
    ValueError
        If the inputs of a group do not follow each other, or the groups are not even.
    """
    *layers, inputs, outputs = values.shape
    size = quantization.group_size or inputs
    if quantization.bits == 4 and size % 2 == 0 and inputs % size == 0:
        shape = (*layers, inputs // size, size, outputs)
        values, scales, zeros = (x.reshape(shape) for x in (values, scales, zeros))
        first = [x[..., 0, :] for x in (scales, zeros)]
        if all((x == x[..., :1, :]).all() for x in (scales, zeros)):
            packed = np.asarray(pack(values.astype(np.uint8)))
            halves = packed.reshape(*layers, inputs // 2, outputs)
            return Int4Kernel(halves, first[0], first[1].astype(np.uint8))
    raise ValueError(
        f"dequantize: got False for {quantization.bits} bits, {inputs} inputs and groups of "
        f"{size}; expected 4 bits and even groups of inputs that follow each other, without "
        "activation order; omit it"
    )


def _integers(packed: np.ndarray, bits: int) -> np.ndarray:
    """Return the integers in the last axis of an int32 array, from the lowest bits on."""
    shifts = np.arange(0, _BITS_OF_INT, bits, dtype=np.uint32)
    found = packed.view(np.uint32)[..., None] >> shifts & np.uint32(2**bits - 1)
    integers: np.ndarray = found.astype(np.int32).reshape(*packed.shape[:-1], -1)
    return integers
