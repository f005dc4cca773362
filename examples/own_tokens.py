"""Train on token ids that you have already: an array, a .npy file or nanoGPT's train.bin.

Run: `./pants run examples/own_tokens.py`, or `python examples/own_tokens.py` with tjx-data, tjx-nn
and optax installed. It prints a batch, shows that a batch depends on (seed, step) only, and trains
a tiny GPT on the ids until the loss is near 0.
"""

from typing import Any

import jax
import numpy as np
import optax

import tjx_nn
from tjx_data import TokenLoader

VOCAB_SIZE, STEPS = 16, 60

tokens = np.tile(np.arange(VOCAB_SIZE, dtype=np.uint16), 500)  # 0 1 2 ... 15 0 1 2 ...
loader = TokenLoader.from_tokens(
    tokens, vocab_size=VOCAB_SIZE, seq_len=12, batch_size=8, seed=1, windows="random"
)
batch = loader.batch(3)
print("tokens", batch["tokens"][0])
print("labels", batch["labels"][0])
loader.batch(7)
print("the same batch again:", bool((loader.batch(3)["tokens"] == batch["tokens"]).all()))

model = tjx_nn.GPTConfig(vocab_size=VOCAB_SIZE, max_seq_len=12, n_layer=1, n_head=2, d_model=32)
optimizer = optax.adamw(1e-2)


@jax.jit
def train_step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
    """Return updated parameters, optimizer state, and the loss in nats per token."""

    def loss(params: Any) -> jax.Array:
        return tjx_nn.bind(model, params).losses(**batch).tokens.mean()

    value, gradients = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value


params = jax.jit(tjx_nn.init, static_argnums=0)(model, jax.random.key(0))
state = optimizer.init(params)
losses = []
for step in range(STEPS):
    params, state, loss = train_step(params, state, loader.batch(step))
    losses.append(float(loss))
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per token; log(16) = {np.log(16):.3f}")
