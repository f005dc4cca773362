"""Train a flax.nnx model of your own with Muon, a schedule and clipping from tjx-optim.

Run: `./pants run examples/nnx_model_with_muon.py`, or `python examples/nnx_model_with_muon.py` with
tjx-optim and flax installed. It prints the loss of a regression before and after 100 steps, and
the learning rate of some steps.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tjx_optim import OptimizerConfig, ScheduleConfig, make_optimizer, make_schedule

STEPS = 100


class Network(nnx.Module):
    """Two hidden layers. Muon updates their kernels, AdamW the biases and the head."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(8, 32, rngs=rngs)
        self.second = nnx.Linear(32, 32, rngs=rngs)
        self.head = nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return predictions [batch, 1] for inputs [batch, 8]."""
        return self.head(jnp.tanh(self.second(jnp.tanh(self.first(x)))))


config = OptimizerConfig(name="muon", learning_rate=0.02, weight_decay=0.01, clip_norm=1.0)
schedule = make_schedule(
    ScheduleConfig(name="wsd", warmup_steps=10),
    learning_rate=config.learning_rate,
    max_steps=STEPS,
)
model = Network(rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(model, make_optimizer(config, schedule), wrt=nnx.Param)


@nnx.jit
def train_step(model: Network, optimizer: Any, x: jax.Array, y: jax.Array) -> Any:
    """Update the model in place; return the mean squared error before the update."""
    loss, gradients = nnx.value_and_grad(lambda model: ((model(x) - y) ** 2).mean())(model)
    optimizer.update(model, gradients)
    return loss


x = jax.random.normal(jax.random.key(1), (64, 8))
y = jnp.sin(x.sum(axis=1, keepdims=True))
losses = [float(train_step(model, optimizer, x, y)) for _ in range(STEPS)]

print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
for step in (0, 10, 50, 99):
    print(f"learning rate of step {step}: {schedule(step):.4f}")
