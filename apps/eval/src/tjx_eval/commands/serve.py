"""`serve`: an OpenAI-compatible HTTP endpoint with continuous batching, and a chat page."""

import argparse
import os

from tjx_core import CommandParser, ConfigError, Problem, whole_number
from tjx_eval.commands.arguments import add_generator, load, positive
from tjx_eval.errors import EvalError

KEY_VARIABLE = "TJX_API_KEY"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_LAST_PORT = 65535


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of `serve`."""
    add = parser.add_argument
    add_generator(parser)
    add("--name", help="model name in the API (default: the directory's name)")
    add(
        "--chat_template", metavar="TEMPLATE",
        help="a file or folder of Hugging Face, tjx or plain (default: the model's; without one "
        "conversations are transcripts, for base models)",
    )  # fmt: skip
    add("--host", default="127.0.0.1", help="default 127.0.0.1; any other needs --api_key")
    add("--port", type=whole_number(0), default=8000, help="default 8000; 0 is any free port")
    add("--api_key", help=f"required of clients (or set {KEY_VARIABLE}, which `ps` does not show)")
    add("--slots", type=positive, default=8, help="sequences generated concurrently; default 8")
    add("--max_len", type=positive, help="tokens of prompt and completion (default: max_seq_len)")
    add("--max_waiting", type=positive, default=256, help="queued sequences; default 256")
    add("--max_body_bytes", type=positive, default=1 << 20, help="default 1048576")
    add("--grace", type=float, default=10.0, help="seconds for shutdown; default 10")


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal arrives; the exit code is 128 plus its number."""
    key = arguments.api_key or os.environ.get(KEY_VARIABLE) or None
    _check(arguments, key)
    try:
        from tjx_eval.serving.server import open_socket, serve
    except ImportError as error:
        raise EvalError(
            f"serving needs Starlette and uvicorn ({error}): pip install 'tjx-eval[serve]'"
        ) from error
    from tjx_eval.serving.app import Service
    from tjx_eval.serving.engine import Engine

    with open_socket(arguments.host, arguments.port) as listening:
        model = load(arguments)
        try:
            engine = Engine(
                model.gpt,
                model.params,
                slots=arguments.slots,
                max_len=arguments.max_len,
                max_waiting=arguments.max_waiting,
            )
        except ValueError as error:
            raise EvalError(f"--slots or --max_len: {error}") from error
        name = arguments.name or model.path.resolve().name
        template = None
        if arguments.chat_template or model.has_chat_template:
            template = model.chat_template(arguments.chat_template)
        service = Service(name, engine, model.tokenizer, template, key, arguments.max_body_bytes)
        return serve(service, listening, grace=arguments.grace)


def _check(arguments: argparse.Namespace, key: str | None) -> None:
    problems = []
    if arguments.port > _LAST_PORT:
        problems.append(Problem("--port", f"got {arguments.port}; expected 0 to {_LAST_PORT}"))
    if arguments.host not in _LOOPBACK and key is None:
        problems.append(
            Problem(
                "--host",
                f"got {arguments.host}, which other machines can reach; give --api_key KEY (or "
                f"{KEY_VARIABLE}), or leave out --host",
            )
        )
    if not 0 <= arguments.grace < float("inf"):
        problems.append(Problem("--grace", f"got {arguments.grace}; expected seconds, at least 0"))
    if problems:
        raise ConfigError(problems)
