"""`doctor`: whether a Hugging Face Transformers model is supported, and what memory it needs."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tjx_core import CommandParser
from tjx_eval.commands.arguments import positive

if TYPE_CHECKING:
    from tjx_nn.config import TransformerConfig
    from tjx_nn.hf import Inspection

_DTYPES: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
# Float32 parameters, gradients and both moments of AdamW.
_TRAINING_BYTES = 16
# Of float32 logits, as a share of their standard deviation.
_MAX_LOGIT_DIFFERENCE = 1e-3


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of `doctor`."""
    add = parser.add_argument
    add("model", help="a Hugging Face Transformers model directory, or a name on the hub")
    add("--context", type=positive, help="tokens of a sequence (default: the longest supported)")
    add("--memory", type=float, metavar="GB", help="memory of a device: also print what fits it")
    add(
        "--transformers",
        metavar="PYTHON",
        help="also compare the logits with those of Transformers: a Python that has transformers "
        "and torch",
    )
    add("--json", metavar="FILE", help="also write the results to this file")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; return 1 if the model is not supported."""
    from tjx_eval.commands.tables import print_metrics
    from tjx_eval.errors import EvalError
    from tjx_nn import hf

    if arguments.memory is not None and not arguments.memory > 0:
        raise EvalError(f"--memory: got {arguments.memory}; expected a number above 0")
    try:
        found = hf.inspect(arguments.model)
    except ValueError as error:
        raise EvalError(str(error)) from error
    results = report(found, context=arguments.context, memory=arguments.memory)
    problems = results.pop("problems")
    if arguments.transformers is not None and not problems:
        results["logits"], logit_problems = _compare_logits(arguments.model, arguments.transformers)
        problems += logit_problems
    print_metrics(results)
    sys.stdout.write("".join(f"{problem}\n" for problem in problems))
    if arguments.json:
        Path(arguments.json).write_text(
            json.dumps({**results, "problems": problems}, indent=2) + "\n"
        )
    return 1 if problems else 0


def report(
    found: "Inspection", *, context: int | None = None, memory: float | None = None
) -> dict[str, Any]:
    """Return the lines of the report by name.

    Parameters
    ----------
    found : Inspection
        The model.
    context : int, optional
        Tokens of a sequence; by default the longest that the model supports.
    memory : float, optional
        Memory of a device [GB].
    """
    lines: dict[str, Any] = {
        "model": f"{found.architecture} ({found.model_type})",
        "supported": "no" if found.problems else "yes",
        "files": _size(found.stored_bytes) if found.stored_bytes else "none: weights not compared",
    }
    if found.config is not None:
        lines |= _sizes(found.config, context, memory)
    return {**lines, "problems": list(found.problems)}


def _sizes(
    config: "TransformerConfig", context: int | None, memory: float | None
) -> dict[str, Any]:
    import tjx_nn

    count = tjx_nn.count_params(config)
    weights = {"float32": 4 * count, "bfloat16": 2 * count}
    lines: dict[str, Any] = {
        "parameters": count,
        **{f"weights, {dtype}": _size(size) for dtype, size in weights.items()},
        "training": f"{_size(_TRAINING_BYTES * count)} of parameters, gradients and AdamW's "
        "moments, without activations",
    }
    if memory is not None:
        lines["training fits"] = "yes" if _TRAINING_BYTES * count < memory * 1e9 else "no"
    if not isinstance(config, tjx_nn.GPTConfig):
        return lines
    tokens = min(context or config.max_seq_len, config.max_seq_len)
    lines["context"] = f"{tokens:,} of {config.max_seq_len:,} tokens"
    for dtype in _DTYPES:
        narrow = dataclasses.replace(config, dtype=dtype)
        size = tjx_nn.cache_bytes(narrow, tokens)
        lines[f"KV cache, {dtype}"] = f"{_size(size)} a sequence"
        if memory is not None:
            fit = int((memory * 1e9 - weights[dtype]) // size)
            lines[f"sequences that fit, {dtype}"] = max(fit, 0)
    return lines


def _compare_logits(model: str, python: str) -> tuple[str, list[str]]:
    """Return a line of the report, and a problem if the logits differ."""
    from tjx_eval.scoring.transformers_logits import compare_logits
    from tjx_nn import hf
    from tjx_nn.hf.hub import find

    found = compare_logits(find(model, None), *hf.load(model), python)
    line = f"{found.difference:.2g} from Transformers {found.version} (std {found.std:.2g})"
    if found.difference <= _MAX_LOGIT_DIFFERENCE * found.std:  # not if one is NaN
        return line, []
    expected = f"expected at most {_MAX_LOGIT_DIFFERENCE * found.std:.2g}"
    return line, [f"logits: got {line}; {expected}; report it with config.json"]


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
