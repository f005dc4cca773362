"""Measure GPT-2 training as in nanoGPT: torch.compile, bf16 autocast, fused AdamW, cuDNN attention.

    python -m gpu_slices.training_peer --case NAME --batch 32 --steps 40

Reports the same figures as `gpu_slices.trainer_run`. It never imports JAX.
"""

import argparse
import itertools
import time
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found]  # pants: no-infer-dep
from gpu_slices.json_lines import begin, finish
from torch.nn import attention as sdpa  # type: ignore[import-not-found]  # pants: no-infer-dep
from training_torch import GPT2
from turns import percentiles

WARM_UP = 5  # steps excluded from the measurement
TOP = 30  # number of operations to report


class Peer:
    """Model, optimizer and batches of random tokens."""

    def __init__(self, sizes: list[int], batch: int, attention: str) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        self._sizes, self._attention = sizes, attention
        self.model = GPT2(*sizes).to(self.device)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.02)
        groups = [
            {"params": [p for p in self.model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in self.model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
        rng = np.random.default_rng(0)
        rows = rng.integers(0, sizes[0], (8, batch, sizes[4] + 1))
        self._batches = torch.from_numpy(rows).to(self.device)
        self._compiled = torch.compile(self.model)
        self._step = 0
        self._context = torch.autocast(self.device, dtype=torch.bfloat16)

    def step(self) -> Any:
        """Run one step; return the loss without synchronizing."""
        rows = self._batches[self._step % len(self._batches)]
        self._step += 1
        backend = getattr(sdpa.SDPBackend, self._attention)
        with self._context, sdpa.sdpa_kernel(backend):
            loss = self._compiled(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def wait(self) -> None:
        """Synchronize with the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def times(self, steps: int) -> list[float]:
        """Run steps; return the seconds of each by CUDA events, or by the host clock on a CPU."""
        if self.device == "cpu":
            seconds = []
            for _ in range(steps):
                start = time.perf_counter()
                self.step()
                seconds.append(time.perf_counter() - start)
            return seconds
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        marks[0].record()
        for mark in marks[1:]:
            self.step()
            mark.record()
        self.wait()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]

    def flops_per_token(self) -> float:
        """Return 6 N + 12 L d T, as in tjx; N excludes position embeddings."""
        _, width, layers, _, length = self._sizes
        parameters: int = sum(p.numel() for p in self.model.parameters())
        positions: int = self.model.wpe.weight.numel()
        return 6.0 * (parameters - positions) + 12.0 * layers * width * length

    def operations(self, steps: int = 3) -> list[dict[str, Any]]:
        """Profile steps; return the kernels, or on a CPU the calls, with the highest total time."""
        activity = torch.profiler.ProfilerActivity
        kind = activity.CUDA if self.device == "cuda" else activity.CPU
        name = "self_device_time_total" if self.device == "cuda" else "self_cpu_time_total"
        with torch.profiler.profile(activities=[kind]) as profile:
            for _ in range(steps):
                self.step()
            self.wait()
        events = [
            (event.key, getattr(event, name), event.count) for event in profile.key_averages()
        ]
        total = sum(time for _, time, _ in events)
        events.sort(key=lambda event: -event[1])
        return [
            {"name": key[:160], "seconds": time / 1e6, "share": time / total, "runs": count}
            for key, time, count in events[:TOP]
        ]


def main() -> None:
    """Parse the command line and run the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--sizes", type=int, nargs=5, default=[50304, 768, 12, 12, 1024],
        metavar=("VOCABULARY", "WIDTH", "LAYERS", "HEADS", "LENGTH"),
    )  # fmt: skip
    parser.add_argument("--attention", default="CUDNN_ATTENTION", help="a name of SDPBackend")
    parser.add_argument("--peak-flops", type=float, help="of the device, for the MFU")
    parser.add_argument("--compile-only", action="store_true", help="fill the compilation cache")
    given = parser.parse_args()
    case = f"compile {given.case}" if given.compile_only else given.case
    begin(case)
    peer = Peer(given.sizes, given.batch, given.attention)
    start = time.perf_counter()
    first = float(peer.step())
    compile_seconds = round(time.perf_counter() - start, 1)
    if given.compile_only:
        finish(case, "ok", compile_seconds=compile_seconds)
        return
    peer.times(WARM_UP)
    if peer.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = percentiles(peer.times(given.steps - WARM_UP))
    rate = 1e3 * given.batch * given.sizes[4] / times["p50_ms"]
    memory = torch.cuda.max_memory_allocated() if peer.device == "cuda" else None
    finish(
        case,
        "ok",
        tokens_per_sec=round(rate, 1),
        mfu=rate * peer.flops_per_token() / given.peak_flops if given.peak_flops else None,
        step_time=times,
        device_peak_bytes=memory,
        compile_seconds=compile_seconds,
        loss_first=first,
        loss_last=float(peer.step()),
        attention=given.attention,
        torch=torch.__version__,
        operations=peer.operations(),
    )


if __name__ == "__main__":
    main()
