"""A server of a tiny model with random parameters, on a free port."""

import socket
import threading
from typing import Any

import jax
import numpy as np
import openai
import uvicorn

from tjx_data import Tokenizer
from tjx_eval.serving import connections
from tjx_eval.serving.app import Service
from tjx_eval.serving.engine import Engine
from tjx_nn import GPTConfig, init


def make_params(config: GPTConfig) -> dict[str, Any]:
    """Return parameters whose texts vary, so that mixed-up requests are detected."""
    with jax.transfer_guard("allow"):
        params = jax.device_get(jax.jit(init, static_argnums=0)(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    found: dict[str, Any] = jax.tree.map(
        lambda x: (x + 0.3 * rng.standard_normal(x.shape)).astype(np.float32), params
    )
    return found


class Served:
    """A real server on a free port, in a thread."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_seq_len: int = 64,
        slots: int = 4,
        max_waiting: int = 64,
        **options: Any,
    ) -> None:
        config = GPTConfig(
            vocab_size=tokenizer.vocab_size,
            max_seq_len=max_seq_len,
            n_layer=1,
            n_head=2,
            d_model=16,
        )
        self.engine = Engine(config, make_params(config), slots=slots, max_waiting=max_waiting)
        self.engine.start()
        service = Service("tiny", self.engine, tokenizer, **options)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        settings = uvicorn.Config(
            service.app(), log_level="warning", lifespan="off", http=connections.LimitedProtocol
        )
        self.server = uvicorn.Server(settings)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.server.should_exit = True
        self.engine.stop(0.0)
        self.engine.join(30.0)
        self.thread.join(30)
        self.socket.close()
        assert not self.thread.is_alive()

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60, **options
        )
