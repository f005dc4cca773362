"""Worker of the training benchmark for torch: GPT-2 in idiomatic torch; see training.py."""

import math
import sys
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found]  # pants: no-infer-dep
from torch import nn  # pants: no-infer-dep
from torch.nn import functional  # type: ignore[import-not-found]  # pants: no-infer-dep
from turns import Json, serve


class Block(nn.Module):  # type: ignore[misc]  # torch has no types here
    """Transformer block of GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Any) -> Any:
        """Apply attention and MLP to the residual stream."""
        batch, length, width = x.shape
        shape = (batch, length, self.heads, width // self.heads)
        q, k, v = (y.view(shape).transpose(1, 2) for y in self.qkv(self.ln_1(x)).chunk(3, -1))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.down(functional.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class GPT2(nn.Module):  # type: ignore[misc]  # torch has no types here
    """GPT-2 with a tied head."""

    def __init__(self, vocab: int, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)

    def forward(self, tokens: Any, labels: Any) -> Any:
        """Compute the mean cross-entropy."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.ln_f(x), self.wte.weight)
        return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    def load(self, path: str) -> None:
        """Load the weights written by the tjx worker."""
        given = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
        with torch.no_grad():
            self.wte.weight.copy_(given["wte.embedding"])
            self.wpe.weight.copy_(given["wpe.embedding"])
            for norm, name in ((self.ln_f, "ln_f"),):
                norm.weight.copy_(given[f"{name}.scale"])
                norm.bias.copy_(given[f"{name}.bias"])
            for layer, block in enumerate(self.blocks):
                of = {
                    name.removeprefix("blocks."): array[layer]
                    for name, array in given.items()
                    if name.startswith("blocks.")
                }
                names = [f"attention.{part}" for part in ("query", "key", "value")]
                block.qkv.weight.copy_(torch.cat([of[f"{n}.kernel"].T for n in names]))
                block.qkv.bias.copy_(torch.cat([of[f"{n}.bias"] for n in names]))
                for linear, name in (
                    (block.out, "attention.out"), (block.up, "mlp.up"), (block.down, "mlp.down"),
                ):  # fmt: skip
                    linear.weight.copy_(of[f"{name}.kernel"].T)
                    linear.bias.copy_(of[f"{name}.bias"])
                for norm, name in ((block.ln_1, "ln_1"), (block.ln_2, "ln_2")):
                    norm.weight.copy_(of[f"{name}.scale"])
                    norm.bias.copy_(of[f"{name}.bias"])


class Training:
    """Model, optimizer and a batch of tokens."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def prepare(self, case: Json, losses: int) -> Json:
        """Compile and run the first steps; return losses, times and versions."""
        torch.set_float32_matmul_precision("high")
        model = GPT2(*case["sizes"])
        model.load(case["weights"])
        self._model = model.to(self.device)
        decayed = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() < 2]
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True,
        )  # fmt: skip
        vocab, *_, length = case["sizes"]
        tokens = np.random.default_rng(0).integers(0, vocab, (case["batch"], length + 1))
        batch = torch.from_numpy(tokens).to(self.device)
        self._batch = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        self._context = (
            torch.autocast(self.device, dtype=torch.bfloat16)
            if case["dtype"] == "bfloat16"
            else nullcontext()
        )
        self._call = torch.compile(self._model) if self.mode == "compile" else self._model
        start = time.perf_counter()
        first = self._once()
        taken = time.perf_counter() - start
        found = [first, *(self._once() for _ in range(losses - 1))]
        assert all(math.isfinite(loss) for loss in found)
        return {
            "losses": found,
            "compile_seconds": round(taken, 2),
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "versions": {"torch": torch.__version__, "threads": torch.get_num_threads()},
        }

    def _once(self) -> float:
        with self._context:
            loss = self._call(*self._batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    def run(self, steps: int) -> Json:
        """Run training steps; return the seconds of each."""
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            self._once()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}


if __name__ == "__main__":
    training = Training(sys.argv[1])
    serve({"prepare": training.prepare, "run": training.run})
