"""Out-of-memory errors: a memory table and flags that help."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tjx_trainer.cli.arguments import resolve
from tjx_trainer.runtime.exit_codes import ExitCode
from tjx_trainer.runtime.memory_report import StepMemory, advice, measure, table
from tjx_trainer.runtime.out_of_memory import is_out_of_memory
from tjx_trainer.training.build import Job
from tjx_trainer.training.preflight import check_host_memory, host_memory
from tjx_trainer.training.train import prepare

WORDS = [
    *("--model.n_layer=2", "--model.n_head=2", "--model.d_model=32", "--model.max_seq_len=32"),
    *("--data.seq_len=32", "--data.tokenizer=char", "--data.holdout=tail", "--train.max_steps=2"),
    *("--schedule.warmup_steps=1", "--train.sample_tokens=0"),
]
# A process sets its own limit: code between fork and exec is none for a parent with threads.
IN_16_GIB = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
runpy.run_module("tjx_trainer.main", run_name="__main__")
"""
# Activations of terabytes, of a batch and parameters that are small.
LARGE = ["--train.batch_size=65536", "--model.d_ff=65536"]


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    text = tmp_path / "rhyme.txt"
    text.write_text("".join(f"{n % 10} and over the wall they run\n" for n in range(1500)))
    monkeypatch.setenv("HOME", str(tmp_path))
    return [*WORDS, f"--data.path={text}"]


def job_of(words: list[str], *more: str) -> Job:
    return prepare(resolve([*words, *more]))


def test_a_run_too_large_ends_with_the_table_and_flags_that_would_do(
    words: list[str], tmp_path: Path
) -> None:
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)

    done = subprocess.run(
        [sys.executable, "-c", IN_16_GIB, *words, *LARGE, f"--run_dir={tmp_path / 'run'}"],
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == ExitCode.OUT_OF_MEMORY, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"activations and other temporaries +[\d.]+ TiB", done.stderr)
    assert re.search(r"share of this machine +1[56]\.\d GiB", done.stderr)
    (pieces,) = re.findall(r"--train\.accumulation (\d+)", done.stderr)
    assert 65536 % int(pieces) == 0
    # The flag would do: what is needed is inversely proportional to the pieces.
    found = measure(job_of(words, *LARGE, f"--train.accumulation={pieces}"))
    assert found.temporaries is not None
    assert found.total < 16 << 30


def test_the_memory_table_describes_the_compiled_step(words: list[str]) -> None:
    job = job_of(words, "--train.batch_size=16", "--mesh.fsdp=2")
    found = measure(job)
    state = job.initial_state()
    shards = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.params)]
    assert found.params == found.gradients == sum(shards)
    moments = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.opt_state)]
    assert found.opt_state == sum(moments)
    halved = measure(job_of(words, "--train.batch_size=16", "--train.accumulation=2"))
    assert found.temporaries is not None
    assert halved.temporaries is not None
    assert halved.temporaries < found.temporaries
    assert len(table(found)) == 8


GIB = 2**30


def memory(*, state: int, activations: int | None, capacity: int | None) -> StepMemory:
    return StepMemory(
        params=state // 4,
        opt_state=state // 2,
        gradients=state // 4,
        batch=0,
        temporaries=activations,
        capacity=capacity,
        on_host=False,
    )


def test_advice_fits_the_run_cheapest_first(words: list[str]) -> None:
    job = job_of(words, "--train.batch_size=64", "--train.device_batch_size=8", "--mesh.fsdp=2")
    lines = advice(job, memory(state=4 * GIB, activations=20 * GIB, capacity=16 * GIB))[1:]
    # Eight sequences a device, two of which fit: 20 GiB / 4 beside a state of 4 GiB.
    assert "--train.device_batch_size 4:" in lines[0]
    assert "--model.remat full" in lines[1]
    assert "--mesh.fsdp 8:" in lines[2]
    assert all("the same --run_dir can resume" in line for line in lines[:3])
    assert "--optimizer.moment_dtype bfloat16" in lines[3]
    assert "a new run" in lines[3]
    # Smaller pieces are no help where the state alone is too large.
    lines = advice(job, memory(state=40 * GIB, activations=GIB, capacity=16 * GIB))
    assert not [line for line in lines if "batch_size 4" in line or "remat" in line]
    # What is done already is not advised.
    done = ["--model.remat=full", "--optimizer.moment_dtype=bfloat16", "--train.precision=bf16"]
    job = job_of(words, "--train.batch_size=8", "--mesh.fsdp=8", *done)
    lines = advice(job, memory(state=GIB, activations=None, capacity=None))
    assert len(lines) == 2
    assert "a smaller" in lines[1]


def test_only_want_of_memory_is_out_of_memory() -> None:
    dispatched = jax.errors.JaxRuntimeError(
        "INTERNAL: Error dispatching computation: Out of memory allocating 9 bytes."
    )
    assert is_out_of_memory(dispatched)
    assert not is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: it broke"))
    assert not is_out_of_memory(OSError("RESOURCE_EXHAUSTED: no space left"))


def test_batches_that_no_memory_holds_are_refused_before_they_are_prepared() -> None:
    config = resolve(["--train.batch_size", "20000000", "--data.seq_len", "64"])
    (problem,) = check_host_memory(config, 24 * 2**30)
    assert "train.batch_size: got 20,000,000" in problem
    assert "need 28.6 GiB" in problem
    assert "give at most 16,777,216" in problem
    assert check_host_memory(config, 29 * 2**30) == []
    # A CPU holds the activations as well: the inputs of 4 blocks of 128 float32 numbers.
    small = resolve([
        *("--train.batch_size", "20000000", "--data.seq_len", "16"),
        *("--model.n_layer", "4", "--model.d_model", "128"),
    ])  # fmt: skip
    assert check_host_memory(small, 24 * 2**30) == []
    (problem,) = check_host_memory(small, 24 * 2**30, on_cpu=True)
    assert "activations (rows of 16 tokens) need 610.4 GiB" in problem
    assert "give at most 786,432, or a larger --train.accumulation" in problem
    halves = resolve([
        *("--train.batch_size", "1500000", "--data.seq_len", "16", "--train.accumulation", "2"),
        *("--model.n_layer", "4", "--model.d_model", "128"),
    ])  # fmt: skip
    assert check_host_memory(halves, 24 * 2**30, on_cpu=True) == []
    assert host_memory() > 2**28
