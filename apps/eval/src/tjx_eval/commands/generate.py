"""`generate`: continue a prompt and stream the text; with --interactive as a conversation."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tjx_core import CommandParser
from tjx_eval.commands.arguments import add_generator, load, positive
from tjx_eval.errors import EvalError

if TYPE_CHECKING:
    from tjx_eval.load_model import TrainedModel
    from tjx_trainer.run_reader import SamplingParams


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of `generate`."""
    add = parser.add_argument
    add_generator(parser)
    add("--prompt", help="text to continue (default: none)")
    add("--prompt_file", metavar="FILE", help="read the prompt from this file; - is standard input")
    add("--interactive", action="store_true", help="converse; Ctrl-C ends an answer")
    add("--chat", action="store_true", help="answer --prompt with the model's chat template")
    add("--samples", type=positive, default=1, help="number of completions; default 1")
    add("--max_new_tokens", type=positive, default=50, help="tokens of each; default 50")
    add("--temperature", type=float, default=0.8, help="0 is greedy; default 0.8")
    add("--top_k", type=positive, default=50, help="sample from the k likeliest; default 50")
    add("--top_p", type=float, help="sample from the likeliest with this total probability")
    add("--min_p", type=float, help="least probability relative to the likeliest token")
    add("--repetition_penalty", type=float, help="above 1: less repetition; 1 has no effect")
    add("--stop", action="append", default=[], metavar="TEXT", help="stop text; may be repeated")
    add("--seed", type=int, default=0, help="the same seed gives the same text; default 0")
    add("--json", metavar="FILE", help="also write texts, tokens and options to this file")


def run(arguments: argparse.Namespace) -> int:
    """Write texts to standard output."""
    prompt = _read_prompt(arguments)
    if arguments.interactive and (arguments.samples > 1 or arguments.json):
        raise EvalError("--interactive: not supported with --samples or --json; leave them out")

    model = load(arguments)
    names = (
        "samples", "max_new_tokens", "temperature", "top_k", "top_p", "min_p",
        "repetition_penalty", "seed",
    )  # fmt: skip
    params: SamplingParams = {name: getattr(arguments, name) for name in names}  # type: ignore[assignment]  # its keys
    try:
        if arguments.interactive:
            from tjx_eval.generation.conversation import chat

            template = model.chat_template() if arguments.chat else None
            chat(model, prompt, stops=arguments.stop, params=params, template=template)
        else:
            _generate(model, prompt, params, arguments)
    except ValueError as error:
        raise EvalError(str(error)) from error
    return 0


def _generate(
    model: "TrainedModel", prompt: str, params: "SamplingParams", arguments: argparse.Namespace
) -> None:
    """Stream the first completion, then print the others, which are generated with it."""
    from tjx_data import encode_chat_prompt
    from tjx_eval.generation.completions import CompletionStream

    stops, shown = list(arguments.stop), prompt
    if arguments.chat:
        messages = [{"role": "user", "content": prompt}]
        tokens = encode_chat_prompt(model.chat_template(), model.tokenizer, messages)
        stops, shown = [*stops, *model.tokenizer.special_tokens], ""
    else:
        tokens = model.tokenizer.encode_prompt(prompt)
    longest = model.gpt.max_seq_len
    if len(tokens) + params["max_new_tokens"] > longest:
        sys.stderr.write(
            f"note: the model's max_seq_len is {longest} tokens; beyond it each token is "
            f"predicted from the last {longest - 1}\n"
        )
    stream = CompletionStream(model, tokens, stops=stops, **params)
    sys.stdout.write(shown)
    for piece in stream:
        sys.stdout.write(piece)
        sys.stdout.flush()
    for completion in stream.completions[1:]:
        sys.stdout.write(f"\n----\n{shown}{completion.text}")
    sys.stdout.write("\n")
    if arguments.json:
        record = {
            "model": model.name, "prompt": prompt, "prompt_tokens": tokens,
            "options": {**params, "stop": arguments.stop},
            "samples": [vars(each) for each in stream.completions],
        }  # fmt: skip
        Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n")


def _read_prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt_file is None:
        return arguments.prompt or ""
    if arguments.prompt is not None:
        raise EvalError("--prompt_file: not supported with --prompt; leave out one")
    try:
        if arguments.prompt_file == "-":
            return sys.stdin.read()
        return Path(arguments.prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"--prompt_file {arguments.prompt_file} cannot be read: {error}") from error
