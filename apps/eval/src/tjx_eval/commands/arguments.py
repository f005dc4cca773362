"""Command-line arguments that several commands share."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tjx_core import CommandParser, whole_number
from tjx_eval.resolve import resolve_model

if TYPE_CHECKING:
    from tjx_eval.convert_attention import AttentionOptions
    from tjx_eval.load_model import TrainedModel

positive = whole_number(1)


def model_directory(text: str) -> str:
    """Accept the path of a model directory; for ``type=``."""
    resolve_model(Path(text))
    return text


def plot_file(text: str) -> str:
    """Accept the path of a plot; for ``type=``."""
    if Path(text).suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"got {text!r}; expected a file name that ends in .png, .pdf or .svg")
    return text


def add_model(parser: CommandParser, *, quantization: bool = True) -> None:
    """Add the model directory and the arguments that change it, ``--quantization`` if wanted."""
    parser.add_argument(
        "model",
        type=model_directory,
        help="a run directory of the trainer, or a Hugging Face Transformers model directory",
    )
    parser.add_argument("--step", type=positive, help="checkpoint step (default: the newest)")
    parser.add_argument(
        "--average", type=whole_number(2), metavar="N",
        help="mean of the parameters of the last N checkpoints up to --step (LAWA, Kaddour 2022)",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="file, directory or hub name of the model's tokenizer"
    )
    parser.add_argument(
        "--use_mla", type=positive, metavar="RANK",
        help="convert a decoder's attention to latent attention (MLA) of this rank, by SVD",
    )  # fmt: skip
    parser.add_argument(
        "--mla_rope_heads", type=positive, metavar="N",
        help="of --use_mla: mixed key heads that keep rotary embeddings (default: all, exact)",
    )  # fmt: skip
    parser.add_argument(
        "--sparse_top_k", type=positive, metavar="K",
        help="attend to the K keys with the highest scores, of each query and head",
    )  # fmt: skip
    if quantization:
        parser.add_argument(
            "--quantization",
            choices=("int8", "int4"),
            help="round the weights of the blocks to int8 or int4",
        )


def attention_options(arguments: argparse.Namespace) -> "AttentionOptions":
    """Return the changes of attention among the arguments of `add_model`."""
    from tjx_eval.convert_attention import AttentionOptions

    return AttentionOptions(arguments.use_mla, arguments.mla_rope_heads, arguments.sparse_top_k)


def add_generator(parser: CommandParser) -> None:
    """Add the arguments of `add_model`, and ``--kv_cache``."""
    add_model(parser)
    parser.add_argument(
        "--kv_cache", choices=("model", "int8"), default="model",
        help="dtype of cached keys and values: the model's (default), or int8",
    )  # fmt: skip


def load(arguments: argparse.Namespace) -> "TrainedModel":
    """Load the decoder that the arguments of `add_generator` name."""
    from tjx_eval.load_model import load_model

    return load_model(
        arguments.model,
        step=arguments.step,
        average=arguments.average,
        tokenizer=arguments.tokenizer,
        attention=attention_options(arguments),
        quantization=getattr(arguments, "quantization", None),
        kv_cache=getattr(arguments, "kv_cache", "model"),
    )


def add_text(parser: CommandParser) -> None:
    """Add the text to score and how it is split into windows."""
    add = parser.add_argument
    add(
        "--data", nargs="+", metavar="FILE",
        help="files and patterns: text, .jsonl, .parquet (default: the validation data of the run)",
    )  # fmt: skip
    add("--text_field", default="text", help="name of the text field in records (default: text)")
    add("--corpus", metavar="NAME", help="corpus name, or NAME:SPLIT")
    add("--window", type=positive, help="tokens per window (default: as in training)")
    add(
        "--stride", type=positive,
        help="tokens between the starts of windows (default: the window); less gives more context",
    )  # fmt: skip
    add("--max_tokens", type=positive, help="score at most this many tokens")
    add("--batch_size", type=positive, help="windows per batch; does not change results")
