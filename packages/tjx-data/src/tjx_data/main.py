"""Command ``tjx-data``: clean and prepare text, inspect prepared sets, show conversations."""

import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from tjx_core import CommandParser, printable
from tjx_data.cleaning.clean import HTML_FILE, clean
from tjx_data.cleaning.clean_config import CleanConfig
from tjx_data.cleaning.scores import scored_text
from tjx_data.config import DataConfig
from tjx_data.conversations.config import ChatConfig
from tjx_data.conversations.encoding import encode_conversation
from tjx_data.conversations.reader import read_conversations
from tjx_data.conversations.template import find_template
from tjx_data.conversations.viewer import format_conversation
from tjx_data.corpora.documents import Stage
from tjx_data.corpora.files import load_files
from tjx_data.corpora.registry import CORPORA, load_corpus
from tjx_data.prepared.dataset_cache import open_sets
from tjx_data.prepared.inspection import describe, draw_lengths, verify
from tjx_data.tokenization.tokenizer import Tokenizer

_DASK_TIMEOUT = 10.0  # seconds to connect to a scheduler

_HELP = {
    "corpus": f"{', '.join(CORPORA)}, or hub:OWNER/NAME[:CONFIG][:SPLIT][@COMMIT]",
    "path": "local files or folders: text, .jsonl, .tar, also .gz or .zst; .parquet, .arrow",
    "text_field": "field of the text in records, or a template such as '{title}: {text}'",
    "mixture": "several corpora: NAME_OR_PATH=WEIGHT,...",
    "seq_len": "tokens per row with --packing documents",
    "packing": "windows or documents",
    "tokenizer": "bpe, char, byte, gpt2, auto, or a path",
    "vocab_size": "vocabulary size of bpe",
    "holdout": "auto, official, documents or tail",
    "holdout_fraction": "share held out",
    "max_tokens": "most training tokens of each corpus",
    "max_documents": "most documents of each corpus",
    "subset": "fraction of the documents, by their hash",
    "strict": "fail at a malformed record",
    "cache_dir": "folder of prepared sets",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns
    -------
    int
        Exit code: 0, or 2 after a usage error.
    """
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    try:
        text = _COMMANDS[parsed.command](parsed)
    except ValueError as error:
        sys.stderr.write(printable(f"tjx-data: {error}\n"))
        return 2
    sys.stdout.write(text + "\n")
    return 0


def make_parser() -> CommandParser:
    """Make the command-line parser."""
    parser = CommandParser(prog="tjx-data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser(
        "prepare", help="tokenize text", description="Tokenize a corpus into token shards."
    )
    for field in fields(DataConfig):
        if field.name not in _HELP:
            continue
        assert field.default is not MISSING
        if isinstance(field.default, bool):
            prepare.add_argument(f"--{field.name}", action="store_true", help=_HELP[field.name])
            continue
        kind: type = str if field.default is None else type(field.default)
        if field.name.startswith("max_"):
            kind = int
        prepare.add_argument(
            f"--{field.name}", type=kind, default=field.default, help=_HELP[field.name]
        )
    prepare.add_argument("--dask", metavar="ADDRESS", help="Dask scheduler that runs the work")
    cleaning = commands.add_parser(
        "clean",
        help="drop bad and repeated documents",
        description="Write the good documents of a corpus as JSON lines, with a report.",
    )
    cleaning.add_argument("directory", type=Path, help="output folder")
    for name in ("corpus", "path", "text_field"):
        cleaning.add_argument(f"--{name}", help=_HELP[name])
    defaults = CleanConfig()
    cleaning.add_argument(
        "--rules",
        default=",".join(defaults.rules),
        help="quality rules: gopher, c4, fineweb, single ones, or none",
    )
    cleaning.add_argument(
        "--masks", default=",".join(defaults.masks), help="email, ip, phone, or none"
    )
    cleaning.add_argument(
        "--near_duplicates",
        default=str(defaults.near_duplicates),
        help="smallest similarity, or none",
    )
    cleaning.add_argument(
        "--repeated_spans", type=int, metavar="BYTES", help="shortest repeated span to remove"
    )
    cleaning.add_argument("--languages", default="none", help="languages to keep, or none for all")
    cleaning.add_argument(
        "--language_identifier",
        metavar="MODULE:FUNCTION",
        help="function from a text to (language, probability)",
    )
    cleaning.add_argument(
        "--min_language_score",
        type=float,
        default=defaults.min_language_score,
        help="smallest probability of the language",
    )
    cleaning.add_argument("--score_column", metavar="NAME", help="field of the score in records")
    cleaning.add_argument("--min_score", type=float, help="smallest score of a document")
    cleaning.add_argument(
        "--evaluation", help="files of evaluation texts to remove from the corpus"
    )
    cleaning.add_argument("--dask", metavar="ADDRESS", help="Dask scheduler that runs the work")
    inspect = commands.add_parser(
        "inspect", help="describe a prepared set", description="Describe a prepared set."
    )
    inspect.add_argument("directory", type=Path)
    inspect.add_argument("--verify", action="store_true", help="compare all hashes")
    inspect.add_argument("--samples", type=int, default=3, help="documents to show")
    inspect.add_argument("--picture", type=Path, help="histogram of document lengths: .png, .svg")
    show = commands.add_parser(
        "show-chat",
        help="show conversations as tokens",
        description="Show the tokens of conversations: tokens that are trained on in green, or "
        "between ⟦ and ⟧ if the output is no terminal.",
    )
    show.add_argument("path", help="conversations: .jsonl or .json, or a pattern")
    show.add_argument("--tokenizer", required=True, help="tokenizer.json, a folder, or gpt2")
    for field in fields(ChatConfig):
        if isinstance(field.default, bool):
            show.add_argument(f"--{field.name}", action="store_true")
        else:
            show.add_argument(f"--{field.name}", default=field.default)
    show.add_argument("--count", type=int, default=3, help="conversations to show")
    return parser


def _prepare(parsed: Any) -> str:
    config = DataConfig(**{name: getattr(parsed, name) for name in _HELP})
    with _dask(parsed.dask) as (executor, in_flight):
        sets = open_sets(config, executor=executor, in_flight=in_flight, progress=_ProgressLine())
    return "\n".join(f"{directory}\n{describe(directory)}" for directory in sets.values())


def _clean(parsed: Any) -> str:
    if (parsed.corpus is None) == (parsed.path is None):
        raise ValueError("--corpus, --path: got both or none; expected one of them")
    near: float | None = None
    if parsed.near_duplicates != "none":
        try:
            near = float(parsed.near_duplicates)
        except ValueError as error:
            raise ValueError(
                f"--near_duplicates: got {parsed.near_duplicates!r}; expected a number or none"
            ) from error
    config = CleanConfig(
        rules=_names(parsed.rules),
        masks=_names(parsed.masks),
        min_score=parsed.min_score,
        languages=_names(parsed.languages),
        language_identifier=parsed.language_identifier,
        min_language_score=parsed.min_language_score,
        near_duplicates=near,
        repeated_spans=parsed.repeated_spans,
    )
    field = parsed.text_field or "text"
    if (parsed.score_column is None) != (parsed.min_score is None):
        raise ValueError(
            f"--score_column, --min_score: got {parsed.score_column} and {parsed.min_score}; "
            "expected both or none"
        )
    if parsed.score_column is not None:
        field = scored_text(field, parsed.score_column)
    if parsed.corpus is not None:
        documents = load_corpus(parsed.corpus, text_field=field)
    else:
        documents = load_files(parsed.path, text_field=field)
    if parsed.score_column is not None and "text_field" not in documents.source:
        raise ValueError(
            f"--score_column: got {parsed.score_column} with text; expected records, such as "
            ".jsonl or .parquet files"
        )
    evaluation = () if parsed.evaluation is None else load_files(parsed.evaluation)
    with _dask(parsed.dask) as (executor, in_flight):
        report = clean(
            documents,
            parsed.directory,
            config,
            evaluation=evaluation,
            executor=executor,
            in_flight=in_flight,
            progress=_ProgressLine(),
        )
    lines = [f"{'rule':<24}{'documents':>12}{'bytes':>16}"]
    for name, found in {**report["dropped"], "kept": report["kept"]}.items():
        lines.append(f"{name:<24}{found['documents']:>12,}{found['bytes']:>16,}")
    cut = report["cut"]
    if cut["spans"]:
        lines.append(f"{cut['spans']:,} repeated spans removed, {cut['bytes']:,} bytes")
    return "\n".join([*lines, f"wrote {parsed.directory / HTML_FILE}"])


def _names(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(text.split(","))


@contextmanager
def _dask(address: str | None) -> Iterator[tuple[Executor | None, int | None]]:
    """Connect to a Dask cluster; yield its executor and the number of parts to keep in flight."""
    if address is None:
        yield None, None
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise ValueError("--dask needs the extra: pip install 'tjx-data[dask]'") from error
    try:
        client = Client(address, timeout=_DASK_TIMEOUT)  # type: ignore[no-untyped-call]  # as distributed is
    except (OSError, TimeoutError, ValueError) as error:
        raise ValueError(
            f"--dask: got {address}; no scheduler answers there ({error}); give the address that "
            "`dask scheduler` prints, such as tcp://HOST:8786"
        ) from error
    with client:
        cores: dict[str, int] = client.ncores()  # type: ignore[no-untyped-call]  # as above
        yield client.get_executor(), 2 * max(sum(cores.values()), 1)  # type: ignore[no-untyped-call]  # as above


class _ProgressLine:
    """Progress callback: one updated line on a terminal, else one line per stage."""

    def __init__(self) -> None:
        self._stage = ""
        self._start = 0.0

    def __call__(self, stage: Stage) -> None:
        if stage.name != self._stage:
            self._stage, self._start = stage.name, time.monotonic()
            if not sys.stderr.isatty():
                sys.stderr.write(f"{stage.name}\n")
        if not sys.stderr.isatty():
            return
        total = "" if stage.total is None else f" of about {stage.total / 1e6:,.0f}"
        rate = ""
        if stage.tokens and (seconds := time.monotonic() - self._start) > 0:
            rate = f", {stage.tokens / seconds:,.0f} tokens/s"
        line = f"{stage.name}: {stage.done / 1e6:,.1f}{total} MB of text{rate}"
        sys.stderr.write(f"\r{line:<78}")
        if stage.done == stage.total:
            sys.stderr.write("\n")


def _inspect(parsed: Any) -> str:
    lines = [describe(parsed.directory, samples=parsed.samples)]
    if parsed.verify:
        verify(parsed.directory)
        lines.append("all hashes match the index")
    if parsed.picture is not None:
        draw_lengths(parsed.directory, parsed.picture)
        lines.append(f"wrote {parsed.picture}")
    return "\n".join(lines)


def _show_chat(parsed: Any) -> str:
    config = ChatConfig(**{field.name: getattr(parsed, field.name) for field in fields(ChatConfig)})
    conversations, malformed = read_conversations(parsed.path, config)
    tokenizer = Tokenizer.load(parsed.tokenizer)
    template = find_template(config, tokenizer, parsed.tokenizer)
    lines = [f"{len(conversations):,} conversations, {len(malformed):,} malformed, {template.name}"]
    for conversation in conversations[: parsed.count]:
        try:
            encoded = encode_conversation(template, tokenizer, conversation, turns=config.turns)
        except ValueError as error:
            raise ValueError(f"{conversation.location}: {error}") from error
        n_tokens, n_answer = len(encoded.tokens), int(encoded.is_answer.sum())
        lines.append(f"{conversation.location}: {n_tokens} tokens, {n_answer} trained on")
        lines.append(format_conversation(encoded, tokenizer, color=sys.stdout.isatty()))
    return "\n".join(lines)


_COMMANDS = {"clean": _clean, "prepare": _prepare, "inspect": _inspect, "show-chat": _show_chat}


if __name__ == "__main__":
    sys.exit(main())
