"""Worker of the generation benchmark for torch; see generation.py.

Measures `generate` of Hugging Face transformers, or a torch loop with a static KV cache.
"""

import sys
import time
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found]  # pants: no-infer-dep
from torch import nn  # pants: no-infer-dep
from torch.nn import functional  # type: ignore[import-not-found]  # pants: no-infer-dep
from training_torch import GPT2
from turns import Json, serve


class StaticCache:
    """Greedy generation of a GPT-2 in torch with a static KV cache."""

    def __init__(self, case: Json, device: str, dtype: Any) -> None:
        self.model = GPT2(*case["sizes"])
        self.model.load(case["weights"])
        self.model.to(device, dtype).eval()
        _, width, layers, heads, _ = case["sizes"]
        slots = case["prompt"] + case["new"]
        shape = (layers, 2, case["batch"], heads, slots, width // heads)
        self.cache = torch.zeros(shape, device=device, dtype=dtype)
        self.seen = torch.ones(slots, slots, dtype=torch.bool, device=device).tril()

    def __call__(self, prompt: Any, new: int) -> Any:
        """Generate and return the new tokens."""
        positions = torch.arange(prompt.shape[1], device=prompt.device)
        tokens = [self._step(prompt, positions)]
        for _ in range(new - 1):
            positions = positions[-1:] + 1
            tokens.append(self._step(tokens[-1], positions))
        return torch.cat(tokens, 1)

    def _step(self, tokens: Any, positions: Any) -> Any:
        model = self.model
        x = model.wte(tokens) + model.wpe(positions)
        mask = self.seen[positions]
        for layer, block in enumerate(model.blocks):
            x = self._block(block, x, positions, mask, *self.cache[layer])
        return functional.linear(model.ln_f(x[:, -1]), model.wte.weight).argmax(-1, keepdim=True)

    def _block(
        self, block: nn.Module, x: Any, positions: Any, mask: Any, keys: Any, values: Any
    ) -> Any:
        batch, length, width = x.shape
        shape = (batch, length, block.heads, width // block.heads)
        q, k, v = (y.view(shape).transpose(1, 2) for y in block.qkv(block.ln_1(x)).chunk(3, -1))
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        attended = functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        x = x + block.out(attended.transpose(1, 2).reshape(x.shape))
        return x + block.down(functional.gelu(block.up(block.ln_2(x)), approximate="tanh"))


class Transformers:
    """Greedy generation with Hugging Face transformers."""

    def __init__(self, case: Json, device: str, dtype: Any) -> None:
        import transformers  # type: ignore[import-not-found]  # pants: no-infer-dep

        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(case["saved"], dtype=dtype).to(device).eval()

    def __call__(self, prompt: Any, new: int) -> Any:
        """Generate and return the new tokens."""
        tokens = self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0,
            max_new_tokens=new, min_new_tokens=new, eos_token_id=None,
        )  # fmt: skip
        return tokens[:, prompt.shape[1] :]


class Generation:
    """Model and prompts."""

    def __init__(self, kind: str) -> None:
        kinds: dict[str, Any] = {"transformers": Transformers, "static cache": StaticCache}
        self._make = kinds[kind]
        self._device = "cuda" if torch.cuda.is_available() else "cpu"

    def prepare(self, case: Json) -> Json:
        """Warm up and return the generated tokens."""
        self._call = self._make(case, self._device, getattr(torch, case["dtype"]))
        rng = np.random.default_rng(0)
        shape = (case["batch"], case["prompt"])
        prompt = rng.integers(0, case["sizes"][0], shape, np.int32).astype(np.int64)
        self._prompt, self._new = torch.from_numpy(prompt).to(self._device), case["new"]
        start = time.perf_counter()
        tokens = self._once()
        return {
            "ready_seconds": round(time.perf_counter() - start, 2),
            "tokens": tokens,
            "device": torch.cuda.get_device_name() if self._device == "cuda" else "cpu",
            "versions": {"torch": torch.__version__, "threads": torch.get_num_threads()},
        }

    def _once(self) -> Any:
        with torch.inference_mode():
            return self._call(self._prompt, self._new).tolist()

    def run(self, times: int) -> Json:
        """Generate `times` times; return the seconds of each."""
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            self._once()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}


if __name__ == "__main__":
    generation = Generation(sys.argv[1])
    serve({"prepare": generation.prepare, "run": generation.run})
