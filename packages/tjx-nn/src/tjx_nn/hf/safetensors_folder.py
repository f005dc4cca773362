"""Checkpoint folder of transformers: config.json and one or several safetensors files."""

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import jax.numpy as jnp
import numpy as np

from tjx_nn.hf import block_fp8, int_groups, mxfp4
from tjx_nn.hf.int_groups import IntGroups
from tjx_nn.hf.quantization import Quantization
from tjx_nn.problems import raise_problems

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Safetensors dtypes that are read, and NumPy dtypes that are written.
READABLE = ("F32", "F16", "BF16")
WRITABLE: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": jnp.bfloat16,
}
LARGEST_JSON = 16 << 20  # bytes; the index of a model of 91,000 tensors has 9 MB
LARGEST_HEADER = 16 << 20
MAX_REASON = 300  # characters; safetensors quotes a whole invalid value
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

_FILE_NAME = re.compile(r"[^/\\\0]+\.safetensors")

Shapes = dict[str, tuple[int, ...]]


class Tensors:
    """Lazy reader of the tensors of a folder; a context manager.

    Parameters
    ----------
    folder
        Checkpoint folder.
    file_name
        File to read; None is model.safetensors, or the files that its index lists.
    quantization
        Quantization of the checkpoint; None allows only unquantized tensors.

    Attributes
    ----------
    shapes
        Shape of every tensor by name, quantized ones as dequantized, without their scales.
    int_groups
        Names of the matrices in the groups of GPTQ and AWQ.

    Raises
    ------
    ValueError
        If there is no safetensors file, a file is missing or damaged, a tensor has an unsupported
        dtype, or a quantized matrix has no scales.
    """

    def __init__(
        self,
        folder: Path,
        file_name: str | None = None,
        *,
        quantization: Quantization | None = None,
    ) -> None:
        self._files, self._quantization = ExitStack(), quantization
        self._opened: dict[str, Any] = {}
        self._fp8: dict[str, Path] = {}
        self._mxfp4: set[str] = set()
        self.int_groups: set[str] = set()
        self.shapes: Shapes = {}
        foreign: list[str] = []
        parts: set[str] = set()
        for path in _files(folder) if file_name is None else [folder / file_name]:
            file = self._open(path)
            for name in file.keys():  # noqa: SIM118  not a dict
                if name in self._opened:
                    self._files.close()
                    raise ValueError(
                        f"{path}: got tensor {name}, which another file also has; expected it once"
                    )
                view = file.get_slice(name)
                self._opened[name], self.shapes[name] = file, tuple(view.get_shape())
                dtype = view.get_dtype()
                if dtype == block_fp8.DTYPE and isinstance(quantization, tuple):
                    self._fp8[name] = path
                elif (quantization == "mxfp4" and mxfp4.is_part(name, dtype)) or (
                    isinstance(quantization, IntGroups) and dtype == int_groups.DTYPE
                ):
                    parts.add(name)
                elif dtype not in READABLE:
                    foreign.append(f"{name} ({dtype})")
        if foreign:
            self._files.close()
            raise ValueError(
                f"{folder}: got tensors of unsupported dtypes {', '.join(foreign)}; expected "
                f"{', '.join(READABLE)}; use a model that is not quantized"
            )
        problems = [*self._fp8_problems(), *self._mxfp4_problems(parts)]
        if isinstance(quantization, IntGroups):
            self.int_groups, of_groups = int_groups.replace_parts(quantization, self.shapes, parts)
            problems += of_groups
        if problems:
            self._files.close()
            raise_problems([f"{folder}: {problem}" for problem in problems])

    def _fp8_problems(self) -> list[str]:
        """Remove the scales of FP8 matrices from the shapes; return an error for each wrong one."""
        problems = []
        for name in self._fp8:
            assert isinstance(self._quantization, tuple)
            scales = self.shapes.pop(f"{name}{block_fp8.SCALE_SUFFIX}", None)
            expected = block_fp8.scales_shape(self.shapes[name], self._quantization)
            if len(self.shapes[name]) != len(expected) or scales != expected:
                problems.append(
                    f"tensor {name}{block_fp8.SCALE_SUFFIX}: got shape {scales}; expected "
                    f"{expected} for an FP8 matrix {self.shapes[name]} in blocks of "
                    f"{self._quantization}"
                )
        return problems

    def _mxfp4_problems(self, parts: set[str]) -> list[str]:
        """Replace blocks and scales by their matrices; return an error for those without."""
        problems = []
        for blocks in (name for name in sorted(parts) if name.endswith(mxfp4.BLOCKS_SUFFIX)):
            name = blocks.removesuffix(mxfp4.BLOCKS_SUFFIX)
            scales = f"{name}{mxfp4.SCALES_SUFFIX}"
            shape = self.shapes.pop(blocks)
            of_scales = self.shapes.pop(scales) if scales in parts else None
            if not mxfp4.fits(shape, of_scales) or name in self.shapes:
                problems.append(
                    f"tensor {blocks}: got shape {shape}, and {of_scales} of {scales} (U8); "
                    "expected [experts, outputs, blocks, 16] and its first three axes, and no "
                    f"tensor {name}"
                )
                continue
            self._mxfp4.add(name)
            self.shapes[name] = mxfp4.matrices_shape(shape)
        return problems

    def int_matrix(self, name: str) -> int_groups.Matrix:
        """Read a matrix of `int_groups`, which is not dequantized."""
        assert isinstance(self._quantization, IntGroups)
        layer = name.removesuffix(".weight")
        found = {s: f"{layer}{s}" for s in int_groups.SUFFIXES if f"{layer}{s}" in self._opened}
        return int_groups.unpack(
            self._quantization, {suffix: self._read(part) for suffix, part in found.items()}
        )

    def __getitem__(self, name: str) -> np.ndarray:
        """Read a tensor, converted to float32."""
        if name in self.int_groups:
            return self.int_matrix(name).dequantized()
        if name in self._fp8:
            assert isinstance(self._quantization, tuple)
            scales = self._read(f"{name}{block_fp8.SCALE_SUFFIX}").astype(np.float32)
            values = block_fp8.read_values(self._fp8[name], name)
            return block_fp8.dequantize(values, scales, self._quantization)
        if name in self._mxfp4:
            suffixes = (mxfp4.BLOCKS_SUFFIX, mxfp4.SCALES_SUFFIX)
            return mxfp4.dequantize(*(self._read(f"{name}{suffix}") for suffix in suffixes))
        return self._read(name).astype(np.float32, copy=False)

    def _read(self, name: str) -> np.ndarray:
        return np.asarray(self._opened[name].get_tensor(name))

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.close()

    def _open(self, path: Path) -> Any:
        safetensors = import_safetensors()
        try:
            _check_header(path)
            return self._files.enter_context(safetensors.safe_open(path, framework="np"))
        except (OSError, ValueError, MemoryError, safetensors.SafetensorError) as error:
            self._files.close()
            raise ValueError(
                f"{path}: missing or damaged ({str(error)[:MAX_REASON]}); download or copy it again"
            ) from error


def has_weights(folder: Path) -> bool:
    """Return whether a folder has weights in any format, or their index."""
    return any(any(folder.glob(glob)) for glob in ("*.safetensors", INDEX, *_PICKLES))


def import_safetensors() -> Any:
    """Import safetensors, a dependency of the extra `tjx-nn[hf]`."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ValueError(
            "transformers checkpoints require safetensors: pip install 'tjx-nn[hf]'"
        ) from error
    return safetensors


def _check_header(path: Path) -> None:
    """Check the size of the header before allocating it.

    Raises
    ------
    ValueError
        If the file is missing, or its header exceeds the file or the limit.
    """
    if not path.is_file():
        raise ValueError("no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        claimed = int.from_bytes(file.read(8), "little")
    if claimed > min(LARGEST_HEADER, size - 8):
        raise ValueError(
            f"got a header of {claimed} bytes in a file of {size}; expected at most "
            f"{LARGEST_HEADER}"
        )


def _files(folder: Path) -> list[Path]:
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    if (folder / INDEX).is_file():
        where = read_json(folder / INDEX).get("weight_map")
        listed = where.values() if isinstance(where, dict) else [where]
        names = {name for name in listed if isinstance(name, str) and _FILE_NAME.fullmatch(name)}
        if not names or len(names) < len({str(name) for name in listed}):
            foreign = sorted({str(name)[:60] for name in listed} - names)
            raise ValueError(
                f"{folder / INDEX}: got {foreign[:10]}; expected safetensors files of its folder"
            )
        return [folder / name for name in sorted(names)]
    if pickles := sorted(path.name for glob in _PICKLES for path in folder.glob(glob)):
        raise ValueError(
            f"{folder}: got {', '.join(pickles)}; expected {WHOLE}, as a pickle can execute code; "
            "convert it with from_pretrained and save_pretrained of transformers"
        )
    raise ValueError(
        f"{folder}: found neither {WHOLE} nor {INDEX}; expected a transformers checkpoint"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object without duplicate keys.

    Raises
    ------
    ValueError
        If the file is missing, larger than `LARGEST_JSON`, or not such an object.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent}: found no {path.name}; expected a transformers checkpoint")
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise ValueError(f"{path}: got {size} bytes; expected at most {LARGEST_JSON}")
    try:
        content = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: got invalid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got a {type(content).__name__}; expected an object")
    return content


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("got a duplicate key; expected each key once")
    return found


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Shapes,
    tensor: Callable[[str], np.ndarray],
    *,
    dtype: str,
    max_shard_bytes: int,
) -> None:
    """Write config.json and the tensors, in shards of at most `max_shard_bytes`.

    Memory holds the tensors of one shard at a time. config.json is written last, so that an
    interrupted save leaves no loadable folder.

    Parameters
    ----------
    folder
        Folder to create; an existing folder must not contain a model.
    config
        Content of config.json.
    shapes
        Shape of each tensor by name.
    tensor
        Computes a tensor by name.
    dtype
        A key of `WRITABLE`.
    max_shard_bytes
        Maximum size of a file; a single tensor is never split.

    Raises
    ------
    ValueError
        If the folder contains a model, or a value overflows float16.
    OSError
        If a file cannot be written.
    """
    existing = sorted(
        path.name
        for path in folder.glob("*")
        if path.name == CONFIG or re.fullmatch(r"model.*\.safetensors(\.index\.json)?", path.name)
    )
    if existing:
        raise ValueError(
            f"{folder}: got a folder with a model ({', '.join(existing)}); expected an empty one; "
            "delete "
            "the model or use another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    kind = np.dtype(WRITABLE[dtype])
    sizes = {name: int(np.prod(shape)) * kind.itemsize for name, shape in shapes.items()}
    shards = _shards(sizes, max_shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = [WHOLE] if len(shards) == 1 else names
    for file, shard in zip(names, shards, strict=True):
        # The library ignores strides: make transposed arrays contiguous.
        arrays = {name: _contiguous(name, tensor(name), kind) for name in shard}
        save_tensors(folder / file, arrays)
    if len(shards) > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        _write_json(folder / INDEX, index)
    _write_json(folder / CONFIG, config)


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write contiguous arrays as a safetensors file that transformers and PEFT read.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    safetensors = import_safetensors()
    try:
        safetensors.numpy.save_file(dict(tensors), path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        # The library reports an error of the operating system in its text only.
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def _contiguous(name: str, array: np.ndarray, kind: np.dtype[Any]) -> np.ndarray:
    try:
        with np.errstate(over="raise"):
            return np.ascontiguousarray(array, kind)
    except FloatingPointError as error:
        raise ValueError(
            f"tensor {name}: got values up to {np.abs(array).max():.3g}, which overflow {kind}; "
            "save "
            "as bfloat16 or float32"
        ) from error


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
