"""Worker of the generation benchmark for tjx; see generation.py."""

import time
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from turns import Json, serve

import tjx_nn
import tjx_nn.hf


class Generation:
    """Model and prompts."""

    def prepare(self, case: Json) -> Json:
        """Compile and generate once; return the tokens, times and versions."""
        vocab, width, layers, heads, length = case["sizes"]
        self._config = tjx_nn.GPTConfig(
            vocab_size=vocab, d_model=width, n_layer=layers, n_head=heads, max_seq_len=length,
            dtype=case["dtype"], **case.get("options", {}),
        )  # fmt: skip
        self._params = jax.jit(tjx_nn.init, static_argnums=0)(self._config, jax.random.key(0))
        if case["quantized"] is not None:
            quantize = jax.jit(tjx_nn.quantize, static_argnums=(0, 2))
            self._params = quantize(self._config, self._params, case["quantized"])
        else:
            flat = jax.tree.leaves_with_path(self._params)
            arrays: dict[str, Any] = {
                ".".join(k.key for k in path): np.asarray(p) for path, p in flat
            }
            np.savez(case["weights"], **arrays)
            tjx_nn.hf.save(case["saved"], self._config, jax.device_get(self._params))
        rng = np.random.default_rng(0)
        self._prompt = rng.integers(0, vocab, (case["batch"], case["prompt"]), np.int32)
        self._lengths = np.full(case["batch"], case["prompt"], np.int32)
        self._new = case["new"]
        start = time.perf_counter()
        tokens = self._once()
        return {
            "ready_seconds": round(time.perf_counter() - start, 2),
            "tokens": tokens.tolist(),
            "device": f"{jax.devices()[0].device_kind}",
            "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
        }

    def _once(self) -> np.ndarray:
        tokens = tjx_nn.generate(
            self._config, self._params, self._prompt, self._lengths, max_new_tokens=self._new
        )
        return np.asarray(tokens)

    def run(self, times: int) -> Json:
        """Generate `times` times; return the seconds of each."""
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            self._once()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}


if __name__ == "__main__":
    generation = Generation()
    serve({"prepare": generation.prepare, "run": generation.run})
