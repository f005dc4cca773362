"""Whatever the mesh, a run is the same run: its losses, its gradients, and where its bytes lie."""

import math
import os
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import tjx_optim
import tjx_parallel
from tjx_trainer.command_line import parse
from tjx_trainer.config import Config
from tjx_trainer.gradients import make_gradients
from tjx_trainer.mesh_checks import known_sizes
from tjx_trainer.job import Parts, build_parts
from tjx_trainer.state import initial_state

VOCAB, ROWS, TOKENS = 64, 16, 32

# Partitioning is what is tested here; optimising the code of each device takes most of the time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

TINY = {
    "config": "quickstart",
    "model.n_layer": "4", "model.n_head": "4", "model.d_model": "32", "model.max_seq_len": "32",
    "train.max_steps": "10", "train.batch_size": "16", "train.sample_tokens": "0",
    "data.seq_len": "32", "optimizer.learning_rate": "1e-2", "schedule.warmup_steps": "2",
    "mesh.data": "1",
}  # fmt: skip
LLAMA = {"model.n_kv_head": "2", "model.d_ff": "64", "model.positions": "rope",
         "model.norm": "rmsnorm", "model.activation": "swiglu", "model.bias": "false"}  # fmt: skip
EXPERTS = {"model.experts.count": "4", "model.experts.capacity_factor": "1.0",
           "model.experts.d_ff": "32", "model.experts.balance_loss": "0.01",
           "optimizer.learning_rate": "1e-3"}  # fmt: skip


def batch_of(config: Config, step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, VOCAB, (ROWS, TOKENS + 1)).astype(np.int32)
    labels = np.where(rng.random((ROWS, TOKENS)) < 0.1, -100, tokens[:, 1:]).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "labels": labels}
    if config.data.packing == "documents":
        starts = np.sort(rng.integers(1, TOKENS, (ROWS, 2)), axis=1)
        batch["segment_ids"] = (np.arange(TOKENS)[None, :, None] >= starts[:, None]).sum(-1)
        batch["segment_ids"] = batch["segment_ids"].astype(np.int32)
    return batch


class Run(NamedTuple):
    losses: list[float]
    gradients: dict[str, np.ndarray]
    initial: dict[str, np.ndarray]
    parts: Parts
    program: str


def flat(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def run(**flags: str) -> Run:
    """Train ten steps; differentiate the first batch."""
    return _run(tuple((TINY | {name.replace("__", "."): v for name, v in flags.items()}).items()))


@cache
def _run(flags: tuple[tuple[str, str], ...]) -> Run:
    config = parse([f"--{name}={value}" for name, value in flags]).with_vocabulary(VOCAB)
    devices = jax.devices()[: math.prod(known_sizes(config.mesh).values())]
    with jax.transfer_guard("allow"):
        parts = build_parts(config, devices)
        state = initial_state(config, parts.optimizer, parts.abstract)
        initial = flat(state.params)
        put = lambda step: tjx_parallel.shard_batch(parts.mesh, batch_of(config, step))
        gradients = make_gradients(config, parts.mesh, parts.layout, accumulation=parts.accumulation)

        def differentiate(params: Any, batch: Any) -> Any:
            microbatches = dict(tjx_optim.split_microbatches(batch, parts.accumulation))
            if config.model.drops:
                microbatches["key"] = jax.random.split(jax.random.key(7), parts.accumulation)
            return gradients(params, microbatches, None).gradients

        found = jax.jit(differentiate, compiler_options=QUICK)(state.params, put(0))
        found = flat(found)
        compiled = parts.train_step.lower(state, put(0)).compile(QUICK)
        losses = []
        for step in range(10):
            state, metrics = compiled(state, put(step))
            losses.append(float(metrics["loss"]))
    return Run(losses, found, initial, parts, compiled.as_text())


def assert_alike(found: Run, expected: Run) -> None:
    np.testing.assert_allclose(found.losses, expected.losses, atol=1e-5, rtol=0)
    for name, gradient in expected.gradients.items():
        # The gradient of a key bias is 0 but for rounding.
        size = max(np.linalg.norm(gradient), 1e-3)
        off = np.linalg.norm(found.gradients[name] - gradient) / size
        assert off < 5e-6, (name, off)
        np.testing.assert_array_equal(found.initial[name], expected.initial[name])


def test_try() -> None:
    import time
    import sys
    only = os.environ.get("ONLY")
    cases = {
     "cp_ring": (dict(mesh__context="4"), {}),
     "cp_ring_mix": (dict(mesh__context="2",mesh__fsdp="2",mesh__tensor="2"), LLAMA),
     "ulysses": (dict(mesh__context="2",mesh__fsdp="2",mesh__tensor="2", mesh__context_kind="all_to_all"), LLAMA),
     "ep": (dict(mesh__expert="4"), EXPERTS),
     "ep_mix": (dict(mesh__expert="2",mesh__fsdp="2",mesh__tensor="2"), EXPERTS),
     "ep_cp": (dict(mesh__expert="2",mesh__context="2",mesh__tensor="2"), EXPERTS),
     "zero1": (dict(mesh__fsdp="4",mesh__zero="1"), {}),
     "zero2": (dict(mesh__fsdp="4",mesh__zero="2"), {}),
     "offload": (dict(mesh__fsdp="4",mesh__offload="optimizer"), {}),
     "drop": (dict(mesh__fsdp="2",mesh__context="2",mesh__tensor="2"), {"model.dropout":"0.2"}),
     "drop2": (dict(mesh__context="2",mesh__tensor="2",mesh__context_kind="all_to_all"), {"model.dropout":"0.2","model.attention_dropout":"0.2"}),
     "nosp": (dict(mesh__fsdp="2",mesh__tensor="2",mesh__sequence_parallel="false"), LLAMA),
     "pp": (dict(mesh__stage="2"), {"train.accumulation":"4"}),
     "pp4": (dict(mesh__stage="4",mesh__pipeline="gpipe"), {"train.accumulation":"4"}),
     "pp_i": (dict(mesh__stage="2",mesh__pipeline="interleaved_1f1b",mesh__fsdp="2",mesh__tensor="2"), {"train.accumulation":"4"}),
     "pp_f": (dict(mesh__stage="2",mesh__fsdp="2"), {"train.accumulation":"4"}),
     "pp_t": (dict(mesh__stage="2",mesh__tensor="2"), {"train.accumulation":"4"}),
     "pp_tn": (dict(mesh__stage="2",mesh__tensor="2",mesh__sequence_parallel="false"), {"train.accumulation":"4"}),
     "pp_ft": (dict(mesh__stage="2",mesh__fsdp="2",mesh__tensor="2"), {"train.accumulation":"4"}),
     "pp_dt": (dict(mesh__stage="2",mesh__data="2",mesh__tensor="2"), {"train.accumulation":"4"}),
     "pp_ii": (dict(mesh__stage="2",mesh__pipeline="interleaved_1f1b"), {"train.accumulation":"4"}),
     "pp_cp": (dict(mesh__stage="2",mesh__context="2",mesh__tensor="2"), {"train.accumulation":"4"}|LLAMA),
     "pp_ep": (dict(mesh__stage="2",mesh__expert="2",mesh__fsdp="2"), {"train.accumulation":"4"}|EXPERTS),
     "pp_drop": (dict(mesh__stage="2",mesh__tensor="2"), {"train.accumulation":"4","model.dropout":"0.2"}),
    }
    for name,(words, extra) in cases.items():
        if only and name not in only.split(","): continue
        t=time.time()
        a=run(**extra); b=run(**extra, **words)
        print(name, words, max(abs(np.array(a.losses)-np.array(b.losses))), max((np.linalg.norm(b.gradients[n]-g)/max(1e-3,np.linalg.norm(g)),n) for n,g in a.gradients.items()), time.time()-t)
