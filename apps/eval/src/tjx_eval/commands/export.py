"""`export`: the model as a transformers folder or an ONNX file, for other programs."""

import argparse
import sys
from pathlib import Path

from tjx_ckpt.store.temporary_files import new_folder
from tjx_eval.commands.parser import Parser, add_model, positive
from tjx_eval.errors import EvalError

_DEFAULT_LENGTH = 128
FORMATS = ("hf", "onnx")
DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: Parser) -> None:
    """Add what `export` can be told."""
    add = parser.add_argument
    add_model(parser)
    add("out", metavar="OUT", help="a folder that is new or empty")
    add("--format", choices=FORMATS, default="hf", help="default hf")
    add("--dtype", choices=DTYPES, help="of the tensors in hf; default float32")
    add("--batch", type=positive, help="rows that the ONNX model takes; default 1")
    add("--length", type=positive, help="tokens of a row in ONNX; default 128, or the model's")


def run(arguments: argparse.Namespace) -> int:
    """Write the folder aside, flush it, and give it its name."""
    out = Path(arguments.out)
    _check(arguments, out)
    from tjx_eval.load_model import load_model

    model = load_model(
        arguments.model,
        step=arguments.step,
        tokenizer=arguments.tokenizer,
        families=("gpt", "bert", "vit", "encoder_decoder"),
    )
    if arguments.format == "hf":
        from tjx_eval.export.hf import export_transformers

        with new_folder(out) as folder:
            files = export_transformers(model, folder, dtype=arguments.dtype or "float32")
        sys.stdout.write(f"{model.name} -> {out}: {', '.join(files)}\n")
        return 0
    from tjx_eval.export.onnx import FILE, export_onnx

    longest = getattr(model.architecture, "max_seq_len", _DEFAULT_LENGTH)
    length = arguments.length or min(_DEFAULT_LENGTH, longest)
    if length > longest:
        raise EvalError(f"--length {length}: the model's longest sequence is {longest}")
    with new_folder(out) as folder:
        difference = export_onnx(model, folder, batch=arguments.batch or 1, length=length)
    size = (out / FILE).stat().st_size
    sys.stdout.write(
        f"{model.name} -> {out / FILE}: {size:,} bytes; ONNX Runtime's logits differ from the "
        f"model's by {difference:.1e}\n"
    )
    return 0


def _check(arguments: argparse.Namespace, out: Path) -> None:
    foreign = ("dtype",) if arguments.format == "onnx" else ("batch", "length")
    problems = [
        f"--{name} has no meaning with --format {arguments.format}: leave it out"
        for name in foreign
        if getattr(arguments, name) is not None
    ]
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        problems.append(f"{out} is there already: give a folder that is new or empty")
    if problems:
        raise EvalError("\n".join(problems))
