"""Worker of the training benchmark for tjx; see training.py."""

import time
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
import optax
from turns import Json, serve

import tjx_nn
import tjx_optim
from tjx_trainer.runtime.allocator import retain_freed_memory, run_cpu_programs_inline
from tjx_trainer.runtime.xla_flags import set_flags


class Training:
    """Model, optimizer and a batch of tokens."""

    def prepare(self, case: Json, losses: int) -> Json:
        """Compile and run the first steps; return losses, times and versions."""
        vocab, width, layers, heads, length = case["sizes"]
        config = tjx_nn.GPTConfig(
            vocab_size=vocab, d_model=width, n_layer=layers, n_head=heads, max_seq_len=length,
            dtype=case["dtype"], **case.get("options", {}),
        )  # fmt: skip
        params = jax.jit(tjx_nn.init, static_argnums=0)(config, jax.random.key(0))
        if case["weights"] is not None:
            flat = jax.tree.leaves_with_path(params)
            arrays = {".".join(k.key for k in path): np.asarray(p) for path, p in flat}
            np.savez(case["weights"], allow_pickle=False, **arrays)
        optimizer = tjx_optim.make_optimizer(
            tjx_optim.OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, clip_norm=1.0)
        )
        tokens = np.random.default_rng(0).integers(0, vocab, (case["batch"], length + 1))
        self._batch = jax.device_put(tokens.astype(np.int32))

        def step(params: Any, state: Any, tokens: Any) -> Any:
            def loss(params: Any) -> Any:
                model = tjx_nn.bind(config, params)
                return model.losses(tokens[:, :-1], tokens[:, 1:]).tokens.mean()

            value, gradients = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, value

        state = jax.jit(optimizer.init)(params)
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, self._batch)
        self._step = lowered.compile()
        compiled = time.perf_counter() - start
        self._state = (params, state)
        memory = self._step.memory_analysis()
        assert memory is not None
        return {
            "losses": [self._once() for _ in range(losses)],
            "compile_seconds": round(compiled, 2),
            "temp_bytes": memory.temp_size_in_bytes,
            "device": f"{jax.devices()[0].device_kind}",
            "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        }

    def _once(self) -> float:
        *self._state, loss = self._step(*self._state, self._batch)
        return float(loss)

    def run(self, steps: int) -> Json:
        """Run training steps; return the seconds of each."""
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            self._once()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}


if __name__ == "__main__":
    # The trainer applies these settings before its first step.
    set_flags()
    run_cpu_programs_inline()
    if jax.default_backend() == "cpu":
        retain_freed_memory()
    training = Training()
    serve({"prepare": training.prepare, "run": training.run})
