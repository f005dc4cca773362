"""The command ``tjx-data``: prepare text for training, and look at what was prepared."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path

from tjx_data.config import DataConfig
from tjx_data.corpora import CORPORA
from tjx_data.dataset import open_or_prepare
from tjx_data.loader import TokenLoader
from tjx_data.tokenizer import Tokenizer

_SAMPLE_CHARACTERS = 200


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status (0, or 2 for a mistake of the user's)."""
    parsed = _parser().parse_args(arguments)
    try:
        text = _prepare(parsed) if parsed.command == "prepare" else _inspect(parsed)
    except ValueError as error:
        sys.stderr.write(f"tjx-data: {error}\n")
        return 2
    sys.stdout.write(text + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tjx-data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser(
        "prepare", help="text to token shards", description="Turn a corpus into token shards."
    )
    default = {f.name: f.default for f in fields(DataConfig) if f.default is not MISSING}
    prepare.add_argument("--corpus", default=default["corpus"], help=", ".join(CORPORA))
    prepare.add_argument("--path", help="UTF-8 text of your own: a file or a pattern")
    prepare.add_argument(
        "--tokenizer", default=default["tokenizer"], help="bpe, char, gpt2, auto, or a path"
    )
    prepare.add_argument("--vocab_size", type=int, default=default["vocab_size"], help="of bpe")
    prepare.add_argument("--holdout", default=default["holdout"], help="documents or tail")
    prepare.add_argument("--holdout_fraction", type=float, default=default["holdout_fraction"])
    prepare.add_argument("--cache_dir", help="folder for prepared sets")
    inspect = commands.add_parser(
        "inspect", help="what a prepared set holds", description="Show what a prepared set holds."
    )
    inspect.add_argument("directory", type=Path)
    inspect.add_argument("--verify", action="store_true", help="compare all hashes")
    return parser


def _prepare(parsed: argparse.Namespace) -> str:
    chosen = {f.name: getattr(parsed, f.name) for f in fields(DataConfig) if f.name != "seq_len"}
    directory = open_or_prepare(DataConfig(**chosen), progress=_show_progress)
    if sys.stderr.isatty():
        sys.stderr.write("\n")
    return f"{directory}\n{_describe(directory, verify=False)}"


def _show_progress(stage: str, done: int, total: int | None) -> None:
    if sys.stderr.isatty():
        of = "" if total is None else f" of {total / 1e6:.1f}"
        sys.stderr.write(f"\r{stage}: {done / 1e6:.1f}{of} MB of text")


def _inspect(parsed: argparse.Namespace) -> str:
    return _describe(parsed.directory, verify=parsed.verify)


def _describe(directory: Path, *, verify: bool) -> str:
    loader = TokenLoader(directory, seq_len=1, batch_size=1)
    tokenizer, index = Tokenizer.load(directory), loader.index
    lines = [f"{name}: {value}" for name, value in index.source.items()]
    lines += [
        f"tokenizer: {index.tokenizer_fingerprint[:16]}, {index.vocab_size} tokens, {index.dtype}",
        f"held out: {index.holdout}, {index.holdout_fraction}",
        f"empty documents left out: {index.n_empty_documents}",
    ]
    for name, split in index.splits.items():
        lines.append(
            f"{name}: {split.n_documents:,} documents, {split.n_text_bytes:,} bytes of text, "
            f"{split.n_tokens:,} tokens in {len(split.shards)} shards, "
            f"{split.n_text_bytes / split.n_tokens:.2f} bytes a token"
        )
        if verify:
            TokenLoader(directory, split=name, seq_len=1, batch_size=1).verify()
            lines.append(f"{name}: all hashes are right")
    sample = tokenizer.decode(loader.document(0)[:_SAMPLE_CHARACTERS])[:_SAMPLE_CHARACTERS]
    return "\n".join([*lines, f"the first training document begins: {sample!r}"])


if __name__ == "__main__":
    sys.exit(main())
