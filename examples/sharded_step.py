"""Train a GPT on a mesh of eight devices, sharded by data, FSDP and tensor parallelism.

Run: `./pants run examples/sharded_step.py`, or `python examples/sharded_step.py` with tjx-kernels,
tjx-nn, tjx-optim and tjx-parallel installed; a CPU simulates eight devices. It prints the losses.
"""

from typing import Any

import jax
import numpy as np
import optax

import tjx_kernels
import tjx_nn
import tjx_optim
import tjx_parallel

jax.config.update("jax_num_cpu_devices", 8)  # type: ignore[no-untyped-call]  # as jax is


class Layout(tjx_parallel.MeshLayout, tjx_nn.Layout):
    """Layout of the model on the mesh."""


model = tjx_nn.GPTConfig(vocab_size=64, max_seq_len=16, n_layer=2, n_head=2, d_model=32)
choices = tjx_parallel.MeshConfig(data=2, fsdp=2, tensor=2)
mesh, rules = tjx_parallel.make_mesh(choices), tjx_parallel.ShardingRules.of(choices)
layout = Layout(mesh, rules, choices, attention=tjx_kernels.sharded_flash_attention)
optimizer = tjx_optim.make_optimizer(tjx_optim.OptimizerConfig(learning_rate=1e-2))


def init(key: jax.Array) -> Any:
    params = tjx_nn.init(model, key)
    return {"params": params, "optimizer": optimizer.init(params)}


def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
    def loss_of(params: Any) -> jax.Array:
        return tjx_nn.bind(model, params, layout=layout).losses(**batch).tokens.mean()

    loss, gradients = jax.value_and_grad(loss_of)(state["params"])
    updates, moments = optimizer.update(gradients, state["optimizer"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "optimizer": moments}, loss


abstract = jax.eval_shape(init, jax.random.key(0))
shards = tjx_parallel.param_shardings(mesh, rules, tjx_nn.logical_axes(model), abstract["params"])
shardings = tjx_parallel.state_shardings(abstract, shards)
outputs = (shardings, tjx_parallel.replicated(mesh))
sharded_step = jax.jit(step, donate_argnums=0, out_shardings=outputs)
state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
rows = np.arange(8 * 17, dtype=np.int32).reshape(8, 17) % 64
batch = tjx_parallel.shard_batch(mesh, {"tokens": rows[:, :-1], "labels": rows[:, 1:]})
losses = []
for _ in range(4):
    state, loss = sharded_step(state, batch)
    losses.append(float(jax.device_get(loss)))
kernel = state["params"]["blocks"]["mlp"]["up"]["kernel"]
print(losses, "kernel per device", kernel.sharding.shard_shape(kernel.shape))
