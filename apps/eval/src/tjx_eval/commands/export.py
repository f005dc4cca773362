"""`export`: write the model in Hugging Face Transformers, ONNX or GGUF format, or its adapters."""

import argparse
import sys
from pathlib import Path

from tjx_ckpt.store.temporary_files import new_file, new_folder
from tjx_core import CommandParser, ConfigError, Problem
from tjx_eval.commands.arguments import add_model, attention_options, positive
from tjx_eval.errors import EvalError

_DEFAULT_LENGTH = 128
# Formats, and the dtypes of formats with a choice.
FORMATS: dict[str, tuple[str, ...]] = {
    "hf": ("float32", "bfloat16", "float16"),
    "onnx": (),
    "peft": (),
    "gguf": ("f16", "q8_0", "f32"),
}
_SUFFIX = ".gguf"
# A size of the ONNX model that is not fixed, and the families whose length can be.
_ANY = "any"
_ANY_LENGTH = ("gpt", "bert")


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of `export`."""
    add = parser.add_argument
    add_model(parser, quantization=False)
    add("out", metavar="OUT", help="a new or empty directory; a new file of --format gguf")
    add(
        "--format",
        choices=FORMATS,
        default="hf",
        help="gguf: a file of llama.cpp; peft: the adapters of a run with --lora.rank; default hf",
    )
    add(
        "--dtype",
        choices=[dtype for dtypes in FORMATS.values() for dtype in dtypes],
        help="dtype of tensors of hf (default float32) and of matrices of gguf (f16, q8_0 or f32; "
        "default f16)",
    )
    add("--batch", type=_size, help="batch size of the ONNX model, or any; default 1")
    add("--length", type=_size, help="tokens per row in ONNX, or any; default 128 or max_seq_len")


def run(arguments: argparse.Namespace) -> int:
    """Write to a temporary directory, flush it and rename it."""
    out = Path(arguments.out)
    _check(arguments, out)
    from tjx_eval.load_model import load_model

    decoders = ("gpt",)
    model = load_model(
        arguments.model,
        step=arguments.step,
        average=arguments.average,
        tokenizer=arguments.tokenizer,
        families=decoders
        if arguments.format == "gguf"
        else (*decoders, "bert", "vit", "encoder_decoder"),
        attention=attention_options(arguments),
    )
    if arguments.format == "gguf":
        from tjx_eval.export.gguf import export_gguf

        with new_file(out) as file:
            name = export_gguf(model, file, dtype=arguments.dtype or "f16")
        size = out.stat().st_size
        sys.stdout.write(f"{model.name} -> {out}: {size:,} bytes, architecture {name}\n")
        return 0
    if arguments.format == "peft":
        from tjx_eval.export.peft import export_adapters

        with new_folder(out) as folder:
            files = export_adapters(model, folder)
        sys.stdout.write(f"{model.name} -> {out}: {', '.join(files)}\n")
        return 0
    if arguments.format == "hf":
        from tjx_eval.export.hf import export_transformers

        with new_folder(out) as folder:
            files = export_transformers(model, folder, dtype=arguments.dtype or "float32")
        sys.stdout.write(f"{model.name} -> {out}: {', '.join(files)}\n")
        return 0
    from tjx_eval.export.onnx import DATA_FILE, FILE, export_onnx

    batch = None if arguments.batch == _ANY else arguments.batch or 1
    length = None
    if arguments.length != _ANY:
        longest = getattr(model.architecture, "max_seq_len", _DEFAULT_LENGTH)
        length = arguments.length or min(_DEFAULT_LENGTH, longest)
        if length > longest:
            raise EvalError(f"--length: got {length}; expected at most max_seq_len, {longest}")
    elif model.architecture.family not in _ANY_LENGTH:
        raise EvalError(
            f"--length: got any with a model of family {model.architecture.family}; expected a "
            f"number (any is of {' and '.join(_ANY_LENGTH)})"
        )
    with new_folder(out) as folder:
        difference = export_onnx(model, folder, batch=batch, length=length)
    size = sum((out / name).stat().st_size for name in (FILE, DATA_FILE) if (out / name).exists())
    sys.stdout.write(
        f"{model.name} -> {out / FILE}: {size:,} bytes; ONNX Runtime's logits differ from the "
        f"model's by {difference:.1e}\n"
    )
    return 0


def _size(text: str) -> int | str:
    """Accept a positive number or any; for ``type=``."""
    return text if text == _ANY else positive(text)


def _check(arguments: argparse.Namespace, out: Path) -> None:
    shape = ("batch", "length")
    # Of the model, which adapters do not fit then.
    changes = ("use_mla", "sparse_top_k", "average")
    unused = {"hf": shape, "onnx": ("dtype",), "peft": ("dtype", *shape, *changes), "gguf": shape}
    problems = [
        Problem(f"--{name}", f"not used with --format {arguments.format}; leave it out")
        for name in unused[arguments.format]
        if getattr(arguments, name) is not None
    ]
    dtypes = FORMATS[arguments.format]
    if dtypes and arguments.dtype not in (None, *dtypes):
        problems.append(
            Problem(
                "--dtype",
                f"got {arguments.dtype} with --format {arguments.format}; expected one of "
                f"{', '.join(dtypes)}",
            )
        )
    if arguments.format == "gguf":
        expected = None if out.suffix == _SUFFIX and not out.exists() else f"a new {_SUFFIX} file"
    else:
        empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
        expected = None if empty else "a new or empty directory"
    if expected is not None:
        exists = ", which exists" if out.exists() else ""
        problems.append(Problem("OUT", f"got {out}{exists}; expected {expected}"))
    if problems:
        raise ConfigError(problems)
