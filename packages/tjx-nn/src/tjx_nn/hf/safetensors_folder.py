"""A transformers folder on disk: config.json, and tensors in one safetensors file or several."""

import json
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import jax.numpy as jnp
import numpy as np

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# What files call the types that we read, and the NumPy types of those that we write.
READABLE = ("F32", "F16", "BF16")
WRITABLE: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": jnp.bfloat16,
}
LARGEST_JSON = 16 << 20  # bytes; the index of a model of 91,000 tensors has 9 million
LARGEST_HEADER = 16 << 20
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

_FILE_NAME = re.compile(r"[^/\\\0]+\.safetensors")

Shapes = dict[str, tuple[int, ...]]


class Tensors:
    """The tensors of a folder, read one at a time; a context manager that closes the files.

    Parameters
    ----------
    folder
        Where the files are.

    Attributes
    ----------
    shapes
        Of every tensor by name.

    Raises
    ------
    ValueError
        If there is no safetensors file, or one is missing or damaged, or tensors are not
        floating-point numbers of 16 or 32 bits.
    """

    def __init__(self, folder: Path) -> None:
        self._files = ExitStack()
        self._opened: dict[str, Any] = {}
        self.shapes: Shapes = {}
        foreign = []
        for path in _files(folder):
            file = self._open(path)
            for name in file.keys():  # noqa: SIM118  not a dict
                if name in self._opened:
                    self._files.close()
                    raise ValueError(f"{path} holds tensor {name}, and so does another file")
                view = file.get_slice(name)
                self._opened[name], self.shapes[name] = file, tuple(view.get_shape())
                if view.get_dtype() not in READABLE:
                    foreign.append(f"{name} ({view.get_dtype()})")
        if foreign:
            self._files.close()
            raise ValueError(
                f"{folder}: tensors of types that cannot be read: {', '.join(foreign)}; "
                f"give a model that is not quantised, of {', '.join(READABLE)}"
            )

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a tensor in float32."""
        return np.asarray(self._opened[name].get_tensor(name)).astype(np.float32, copy=False)

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
                f"{path} is missing or damaged ({error}): fetch or copy it again"
            ) from error


def import_safetensors() -> Any:
    """Import safetensors, an extra of this package."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ValueError(
            "reading and writing transformers folders needs safetensors: pip install 'tjx-nn[hf]'"
        ) from error
    return safetensors


def _check_header(path: Path) -> None:
    """Refuse a header that claims more bytes than there are, before they are asked for."""
    if not path.is_file():
        raise ValueError("there is no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        claimed = int.from_bytes(file.read(8), "little")
    if claimed > min(LARGEST_HEADER, size - 8):
        raise ValueError(
            f"its header claims {claimed} bytes in a file of {size}; {LARGEST_HEADER} are allowed"
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
                f"{folder / INDEX} should list safetensors files of its own folder and lists "
                f"{foreign[:10]}"
            )
        return [folder / name for name in sorted(names)]
    if pickles := sorted(path.name for glob in _PICKLES for path in folder.glob(glob)):
        raise ValueError(
            f"{folder} has {', '.join(pickles)} and no {WHOLE}: a pickle can run any program, so "
            "it is not read. Convert it where PyTorch is installed: transformers' from_pretrained "
            "reads it, and save_pretrained writes safetensors"
        )
    raise ValueError(f"{folder} has neither {WHOLE} nor {INDEX}: give a folder of transformers")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object, with each key once."""
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}: give a folder of transformers")
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise ValueError(f"{path} has {size} bytes; such a file has {LARGEST_JSON} at most")
    try:
        content = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_each_once)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold an object and holds a {type(content).__name__}")
    return content


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice, and readers could take either")
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
    """Write config.json and the tensors, in files of at most so many bytes if one may be split.

    Tensors are asked for one after the other, and held one file at a time. config.json comes last:
    without it the folder is no model.

    Raises
    ------
    ValueError
        If the folder has a model already.
    """
    held = sorted(
        path.name
        for path in folder.glob("*")
        if path.name == CONFIG or re.fullmatch(r"model.*\.safetensors(\.index\.json)?", path.name)
    )
    if held:
        raise ValueError(
            f"{folder} has a model already ({', '.join(held)}): delete it or give another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    kind = np.dtype(WRITABLE[dtype])
    sizes = {name: int(np.prod(shape)) * kind.itemsize for name, shape in shapes.items()}
    shards = _shards(sizes, max_shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = [WHOLE] if len(shards) == 1 else names
    save_file = import_safetensors().numpy.save_file
    for file, shard in zip(names, shards, strict=True):
        # The library writes memory as it lies: a transposed array has to be laid out first.
        arrays = {name: _laid_out(name, tensor(name), kind) for name in shard}
        save_file(arrays, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        _write_json(folder / INDEX, index)
    _write_json(folder / CONFIG, config)


def _laid_out(name: str, array: np.ndarray, kind: np.dtype[Any]) -> np.ndarray:
    try:
        with np.errstate(over="raise"):
            return np.ascontiguousarray(array, kind)
    except FloatingPointError as error:
        raise ValueError(
            f"tensor {name} has values up to {np.abs(array).max():.3g}, too large for {kind}: "
            "write bfloat16 or float32"
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
