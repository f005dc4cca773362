"""Worker of the attention benchmark for torch: backends of `scaled_dot_product_attention`.

Started by attention.py with the interpreter of --torch-python; it never imports JAX.
"""

import argparse
import platform
from collections.abc import Callable, Mapping
from typing import Any

import attention_cases
import numpy as np
import torch  # type: ignore[import-not-found]  # pants: no-infer-dep
from attention_cases import DENSE_LIMIT, PASSES, Case, Pass, Suite
from attention_worker import Json, Progress, first_line, serve, timed
from torch.nn import attention as sdpa  # type: ignore[import-not-found]  # pants: no-infer-dep

BACKENDS = {
    "math": sdpa.SDPBackend.MATH,
    "flash": sdpa.SDPBackend.FLASH_ATTENTION,
    "cudnn": sdpa.SDPBackend.CUDNN_ATTENTION,
}


class Programs:
    """The three passes of one backend on tensors [B, N, T, D], torch's layout."""

    def __init__(self, backend: Any, causal: bool, inputs: tuple[Any, ...]) -> None:
        *qkv, self._dout = inputs
        self._qkv = [x.requires_grad_() for x in qkv]
        self._backend, self._causal = backend, causal
        self.seconds: dict[Pass, float] = {}
        self.temp_bytes: dict[str, int | None] = {}

    def _attention(self) -> Any:
        with sdpa.sdpa_kernel(self._backend):
            return torch.nn.functional.scaled_dot_product_attention(
                *self._qkv, is_causal=self._causal
            )

    def _forward(self) -> Any:
        with torch.no_grad():
            return self._attention()

    def _both(self) -> Any:
        out = self._attention()
        return out, *torch.autograd.grad(out, self._qkv, self._dout)

    def call(self, which: Pass) -> Callable[[], Any]:
        """Return a function that runs a pass."""
        if which == "forward":
            return self._forward
        if which == "both":
            return self._both
        kept = self._attention()
        return lambda: torch.autograd.grad(kept, self._qkv, self._dout, retain_graph=True)


class Torch:
    """Torch framework of the benchmark."""

    def __init__(self, suite: Suite) -> None:
        self.platform = suite
        self.device = "cuda" if suite == "gpu" else "cpu"
        self.programs: dict[str, Programs] = {}
        self.errors: dict[tuple[str, Case], dict[str, float]] = {}

    def describe(self) -> Json:
        """Return versions and the device."""
        gpu = self.device == "cuda"
        return {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if gpu else platform.machine(),
        }

    def prepare(self, case: Case, exclude: Mapping[str, str], progress: Progress) -> list[Json]:
        """Warm up every backend."""
        self.release()
        torch.manual_seed(0)
        shape = (case.batch, case.heads, case.length, case.head_dim)
        dtype = getattr(torch, case.dtype)
        inputs = tuple(torch.randn(shape, device=self.device, dtype=dtype) for _ in range(4))
        entries = []
        for backend in ("math", "flash", "cudnn") if self.device == "cuda" else ("math", "flash"):
            name = "torch/" + backend
            skipped = exclude.get(name)
            if backend == "math" and case.scores_bytes > DENSE_LIMIT[self.platform]:
                skipped = f"the scores alone would take {case.scores_bytes / 2**30:.0f} GiB"
            if skipped is None:
                progress(name)
                try:
                    self._check(name, BACKENDS[backend], case)
                    self.programs[name] = self._start(BACKENDS[backend], case, inputs)
                except RuntimeError as error:
                    skipped = "failed: " + first_line(error)
            entry: Json = {"name": name, "skipped": skipped}
            if skipped is None:
                entry["temp_bytes"] = self.programs[name].temp_bytes
                entry["errors"] = self.errors[name, case.small()]
            entries.append(entry)
        return entries

    def measure(self, seconds: float, progress: Progress) -> dict[str, dict[Pass, Json]]:
        """Time all backends for one round."""
        found: dict[str, dict[Pass, Json]] = {}
        for name, entry in self.programs.items():
            progress(name)
            found[name] = {}
            for which in PASSES:
                count = attention_cases.iterations(entry.seconds[which], seconds)
                call = entry.call(which)
                times = timed(call, self._wait, count)
                if self.device == "cuda":
                    times["events"] = _event_time(call, count)
                    times["device"] = _kernel_time(call, count)
                del call  # frees the residuals of the forward pass
                found[name][which] = times
        return found

    def release(self) -> None:
        """Free the memory of the case."""
        self.programs.clear()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _start(self, backend: Any, case: Case, inputs: tuple[Any, ...]) -> Programs:
        entry = Programs(backend, case.causal, inputs)
        for which in PASSES:
            call = entry.call(which)
            timed(call, self._wait, 1)
            entry.temp_bytes[which] = self._temp_bytes(call)
            entry.seconds[which] = timed(call, self._wait, 1)["host"]
            del call
        return entry

    def _temp_bytes(self, call: Callable[[], Any]) -> int | None:
        """Return the peak allocation of a call minus its results; None on a CPU."""
        if self.device != "cuda":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        outputs = result if isinstance(result, tuple) else (result,)
        returned = sum(x.numel() * x.element_size() for x in outputs)
        return max(0, int(torch.cuda.max_memory_allocated() - before - returned))

    def _check(self, name: str, backend: Any, case: Case) -> None:
        """Measure the error against float64 at a small size."""
        small = case.small()
        if (name, small) in self.errors:
            return
        dtype = getattr(torch, case.dtype)
        inputs = tuple(
            torch.from_numpy(x).to(self.device, dtype).transpose(1, 2).contiguous()
            for x in attention_cases.small_inputs(small)
        )
        result = Programs(backend, case.causal, inputs).call("both")()
        found, given = (
            tuple(x.detach().transpose(1, 2).double().cpu().numpy() for x in tensors)
            for tensors in (result, inputs)
        )
        right = attention_cases.oracle(small, *given)
        self.errors[name, small] = attention_cases.errors(found, right)


def _event_time(call: Callable[[], Any], count: int) -> float:
    """Return the median time of a call by CUDA events, in seconds."""
    marks = [
        [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # before and after
        for _ in range(count)
    ]
    for before, after in marks:
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return float(np.median([before.elapsed_time(after) for before, after in marks])) / 1e3


def _kernel_time(call: Callable[[], Any], count: int) -> float | None:
    """Return the summed kernel time of a call from the torch profiler, in seconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(count):
            call()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    total = sum(e.self_device_time_total for e in profile.key_averages() if e.device_type == cuda)
    return float(total) / 1e6 / count or None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=("cpu", "gpu"))
    chosen: Suite = parser.parse_args().suite
    serve(lambda: Torch(chosen))
