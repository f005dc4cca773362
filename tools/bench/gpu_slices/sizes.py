"""Shapes and limits of the slices: for a GPU, and tiny ones for a rehearsal on a CPU."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# XLA flags to measure, one variant at a time.
XLA_FLAGS: Mapping[str, str] = {
    "no_triton_gemm": "--xla_gpu_enable_triton_gemm=false",
    "latency_hiding": "--xla_gpu_enable_latency_hiding_scheduler=true",
    "no_command_buffer": "--xla_gpu_enable_command_buffer=",
    "autotune_4": "--xla_gpu_autotune_level=4",
    "deterministic": "--xla_gpu_deterministic_ops=true",
}


@dataclass(frozen=True)
class Sizes:
    """Settings that differ between a rehearsal and a GPU.

    Attributes
    ----------
    tiny
        Whether processes use small shapes.
    patience
        Factor of all time limits, as a shared CPU may be much slower than an idle one.
    model
        Trainer flags of the model.
    peer
        The same model for torch: vocabulary, width, layers, heads, length.
    attention
        Backend of torch's attention, a name of `SDPBackend`.
    vocabulary, tokens
        Sizes of the synthetic corpus.
    smoke_batch, batch, other_batches
        Sequences per step in slice 1, in the comparisons, and in slice 3.
    smoke_steps, steps
        Steps per run in slice 1, and in the other slices.
    xla_flags
        Variants of slice 3, by name.
    repeats
        Number of repeats of the fastest case in slice 4.
    head_loss
        Arguments of `gpu_slices.head_loss`.
    resume_steps
        Steps of the resumed runs.
    attention_benchmark
        Arguments of attention.py.
    tune
        Arguments of tune.py, without the implementation.
    """

    tiny: bool
    patience: float
    model: Sequence[str]
    peer: Sequence[int]
    attention: str
    vocabulary: int
    tokens: int
    smoke_batch: int
    batch: int
    other_batches: Sequence[int]
    smoke_steps: int
    steps: int
    xla_flags: Mapping[str, str]
    repeats: int
    head_loss: Sequence[str]
    resume_steps: int
    attention_benchmark: Sequence[str]
    tune: Sequence[str]


GPU = Sizes(
    tiny=False,
    patience=1.0,
    model=("--config=gpt2_small", "--model.dropout=0", "--model.vocab_size=50257"),
    peer=(50304, 768, 12, 12, 1024),
    attention="CUDNN_ATTENTION",
    vocabulary=50_000,
    tokens=3_000_000,
    smoke_batch=16,
    batch=32,
    other_batches=(16, 64),
    smoke_steps=20,
    steps=40,
    xla_flags=XLA_FLAGS,
    repeats=3,
    head_loss=("--tokens=32768",),
    resume_steps=20,
    attention_benchmark=("--suite=gpu", "--cases=T (1024|8192),", "--minutes=1.5"),
    tune=("--head-dims", "64", "--causal=yes", "--minutes-a-row=0.7"),
)

CPU = Sizes(
    tiny=True,
    patience=10.0,
    model=(
        "--config=gpt2_small", "--model.dropout=0", "--model.vocab_size=250", "--model.n_layer=2",
        "--model.d_model=32", "--model.n_head=2", "--model.max_seq_len=32", "--data.seq_len=32",
    ),
    peer=(256, 32, 2, 2, 32),
    attention="MATH",
    vocabulary=200,
    tokens=20_000,
    smoke_batch=2,
    batch=2,
    other_batches=(4,),
    smoke_steps=20,
    steps=14,
    # XLA aborts a process on an unknown flag; check all flags together.
    xla_flags={"all_xla_flags": " ".join(XLA_FLAGS.values())},
    repeats=1,
    head_loss=("--tokens=64", "--width=32", "--vocabulary=768"),
    resume_steps=4,
    attention_benchmark=("--suite=cpu", "--quick", "--cases=T 64,.*causal"),
    tune=(
        "--head-dims", "16", "--causal=yes", "--interpret", "--passes", "forward", "--heads=1",
        "--batch=1", "--length=64", "--candidates=64,64,2,2", "--iterations=1",
    ),
)  # fmt: skip
