"""`generate`: text after a prompt, as it is written; with --interactive in turns."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tjx_eval.commands.parser import Parser, add_model, positive
from tjx_eval.errors import EvalError

if TYPE_CHECKING:
    from tjx_eval.load_model import TrainedModel
    from tjx_trainer.tasks.sampling import SamplingParams


def add_arguments(parser: Parser) -> None:
    """Add what `generate` can be told."""
    add = parser.add_argument
    add_model(parser)
    add("--prompt", help="text to go on from (default: none)")
    add("--prompt_file", metavar="FILE", help="read the prompt from this file; - is standard input")
    add("--interactive", action="store_true", help="write in turns; Ctrl-C ends an answer")
    add("--samples", type=positive, default=1, help="continuations; default 1")
    add("--max_new_tokens", type=positive, default=50, help="tokens of each; default 50")
    add("--temperature", type=float, default=0.8, help="0 is greedy; default 0.8")
    add("--top_k", type=positive, default=50, help="among so many likeliest; default 50")
    add("--top_p", type=float, help="among the likeliest that sum to this probability")
    add("--min_p", type=float, help="only tokens this many times as likely as the likeliest")
    add("--repetition_penalty", type=float, help="above 1: less of what is there; 1 does nothing")
    add("--stop", action="append", default=[], metavar="TEXT", help="end here; may be repeated")
    add("--seed", type=int, default=0, help="the same seed gives the same text; default 0")
    add("--json", metavar="FILE", help="also write texts, tokens and options to this file")


def run(arguments: argparse.Namespace) -> int:
    """Write texts to standard output."""
    prompt = _prompt(arguments)
    if arguments.interactive and (arguments.samples > 1 or arguments.json):
        raise EvalError("--interactive writes one answer at a time: leave out --samples and --json")
    from tjx_eval.load_model import load_model

    model = load_model(arguments.model, step=arguments.step, tokenizer=arguments.tokenizer)
    names = (
        "samples", "max_new_tokens", "temperature", "top_k", "top_p", "min_p",
        "repetition_penalty", "seed",
    )  # fmt: skip
    choice: SamplingParams = {name: getattr(arguments, name) for name in names}  # type: ignore[assignment]  # names of it
    try:
        if arguments.interactive:
            from tjx_eval.generation.conversation import converse

            converse(model, prompt, stops=arguments.stop, choice=choice)
        else:
            _write(model, prompt, choice, arguments)
    except ValueError as error:
        raise EvalError(str(error)) from error
    return 0


def _write(
    model: "TrainedModel", prompt: str, choice: "SamplingParams", arguments: argparse.Namespace
) -> None:
    """Write the first continuation while it is made, then the others, which are made with it."""
    from tjx_eval.generation.completions import Writing
    from tjx_trainer.tasks.sampling import encode_prompt

    tokens = encode_prompt(model.tokenizer, prompt)
    longest = model.gpt.max_seq_len
    if len(tokens) + choice["max_new_tokens"] > longest:
        sys.stderr.write(
            f"note: the model's longest sequence is {longest} tokens; beyond it each token is "
            f"predicted from the last {longest - 1}\n"
        )
    writing = Writing(model, tokens, stops=arguments.stop, **choice)
    sys.stdout.write(prompt)
    for piece in writing:
        sys.stdout.write(piece)
        sys.stdout.flush()
    for other in writing.continuations[1:]:
        sys.stdout.write(f"\n----\n{prompt}{other.text}")
    sys.stdout.write("\n")
    if arguments.json:
        samples = [vars(each) for each in writing.continuations]
        record = {
            "model": model.name, "prompt": prompt, "prompt_tokens": tokens,
            "options": {**choice, "stop": arguments.stop}, "samples": samples,
        }  # fmt: skip
        Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n")


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt_file is None:
        return arguments.prompt or ""
    if arguments.prompt is not None:
        raise EvalError("--prompt and --prompt_file both give the prompt: leave out one")
    try:
        if arguments.prompt_file == "-":
            return sys.stdin.read()
        return Path(arguments.prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"--prompt_file {arguments.prompt_file} cannot be read: {error}") from error
