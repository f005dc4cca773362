"""`serve`: an OpenAI-compatible endpoint on this machine, for many requests at once."""

import argparse
import os

from tjx_eval.commands.parser import Parser, add_model, positive, whole_number
from tjx_eval.errors import EvalError

KEY_VARIABLE = "TJX_API_KEY"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_LAST_PORT = 65535


def add_arguments(parser: Parser) -> None:
    """Add what `serve` can be told."""
    add = parser.add_argument
    add_model(parser)
    add("--name", help="what clients call the model (default: the folder's name)")
    add("--host", default="127.0.0.1", help="default 127.0.0.1; another needs --api_key")
    add("--port", type=whole_number(0), default=8000, help="default 8000; 0 is any free one")
    add("--api_key", help=f"clients must send it (or set {KEY_VARIABLE}, which `ps` does not show)")
    add("--slots", type=positive, default=8, help="sequences written at once; default 8")
    add("--max_len", type=positive, help="tokens of prompt and answer (default: the model's)")
    add("--max_waiting", type=positive, default=256, help="sequences in line; default 256")
    add("--max_body_bytes", type=positive, default=1 << 20, help="default 1048576")
    add("--grace", type=float, default=10.0, help="seconds to end in when stopped; default 10")


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes; the exit code is 128 + its number."""
    key = arguments.api_key or os.environ.get(KEY_VARIABLE) or None
    _check(arguments, key)
    try:
        from tjx_eval.serving.server import open_socket, serve
    except ImportError as error:
        raise EvalError(
            f"serving needs Starlette and uvicorn ({error}): pip install 'tjx-eval[serve]'"
        ) from error
    from tjx_eval.load_model import load_model
    from tjx_eval.serving.app import Service
    from tjx_eval.serving.engine import Engine

    with open_socket(arguments.host, arguments.port) as listening:
        model = load_model(arguments.model, step=arguments.step, tokenizer=arguments.tokenizer)
        try:
            engine = Engine(
                model.gpt,
                model.params,
                slots=arguments.slots,
                max_len=arguments.max_len,
                most_waiting=arguments.max_waiting,
            )
        except ValueError as error:
            raise EvalError(f"--slots or --max_len: {error}") from error
        name = arguments.name or model.path.resolve().name
        service = Service(name, engine, model.tokenizer, key, arguments.max_body_bytes)
        return serve(service, listening, grace=arguments.grace)


def _check(arguments: argparse.Namespace, key: str | None) -> None:
    problems = []
    if arguments.port > _LAST_PORT:
        problems.append(f"--port {arguments.port}: give 0 to {_LAST_PORT}")
    if arguments.host not in _LOOPBACK and key is None:
        problems.append(
            f"--host {arguments.host} is reached from other machines: give --api_key KEY (or "
            f"{KEY_VARIABLE}), or leave out --host"
        )
    if not 0 <= arguments.grace < float("inf"):
        problems.append(f"--grace {arguments.grace}: give seconds, 0 or more")
    if problems:
        raise EvalError("\n".join(problems))
