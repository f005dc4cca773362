"""Training steps of tiny models, compiled ahead of time for NVIDIA GPUs."""

import importlib
import importlib.util
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import pytest

from tjx_kernels.target import Target
from tjx_parallel.planning.chips import find_chip
from tjx_trainer.cli.command_line import parse
from tjx_trainer.planning.compiled_step import abstract_batch, lower_step
from tjx_trainer.planning.topology import topology_devices
from tjx_trainer.runtime.xla_flags import set_flags
from tjx_trainer.training.build import build_step_components

_TINY = """
--model.n_layer=1 --model.n_head=2 --model.d_model=32 --train.batch_size=8 --train.precision=bf16
--train.device_batch_size=8 --model.attention_implementation=xla
""".split()  # noqa: SIM905  a list of words reads worse
_TEXT = [
    "--model.max_seq_len=64",
    "--data.seq_len=64",
    "--data.tokenizer=bpe",
    "--data.vocab_size=1100",
]
FAMILIES = {
    "gpt": ["--config=gpt2_small", *_TINY, *_TEXT],
    # Positions of packed documents are looked up.
    "packed": ["--config=gpt2_small", *_TINY, *_TEXT, "--data.packing=documents"],
    "bert": ["--config=bert_base", *_TINY, *_TEXT],
    "vit": ["--config=vit_mnist", *_TINY, "--model.image_size=8", "--model.patch_size=4"],
    "experts": [
        "--config=gpt2_small", *_TINY, *_TEXT, "--model.experts.count=4",
        "--model.experts.per_token=2",
    ],
}  # fmt: skip

_BLOCK = """
--config=gpt2_small --model.n_layer=1 --model.max_seq_len=256 --data.seq_len=256
--train.batch_size=2 --train.device_batch_size=2 --data.tokenizer=bpe --data.vocab_size=1100
--model.attention_implementation=xla
""".split()  # noqa: SIM905  as above

# What chooses by platform when it is traced; attention is given by name.
_ASK_FOR_THE_TARGET = (
    "tjx_nn.layers.scan_layers",
    "tjx_nn.layers.mlp",
    "tjx_kernels.cross_entropy.api",
)


def stablehlo(family: str) -> str:
    """Return the step as it is lowered for CUDA, before XLA; no plugin is needed."""
    config = parse(FAMILIES[family])
    parts = build_step_components(config, jax.devices()[:1])
    step: Any = parts.train_step
    with ExitStack() as stack:
        for name in _ASK_FOR_THE_TARGET:
            module = importlib.import_module(name)
            chosen = Target("gpu", "sm_90")
            stack.enter_context(mock.patch.object(module, "current_target", return_value=chosen))
        traced = step.trace(parts.abstract, abstract_batch(config, parts.mesh))
    return str(traced.lower(lowering_platforms=("cuda",)).as_text())


def folder_of_ptxas() -> Path | None:
    """Return the folder of CUDA's compilers where they and the plugin are installed as wheels."""
    names = ("jax_plugins.xla_cuda13", "nvidia.cu13")
    try:
        plugin, cuda = map(importlib.util.find_spec, names)
    except ModuleNotFoundError:
        return None
    folders = [] if plugin is None or cuda is None else cuda.submodule_search_locations or []
    return next((Path(each) for each in folders if (Path(each) / "bin" / "ptxas").exists()), None)


def compile_elsewhere(*precisions: str, flags: str = "") -> str:
    """Run this file with a run's XLA flags and more; return what it prints. Skip without ptxas."""
    cuda = folder_of_ptxas()
    if cuda is None:
        pytest.skip("needs the CUDA plugin of JAX and ptxas: tools/locks/compile.txt")
    flags = f"--xla_gpu_cuda_data_dir={cuda} {flags}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    set_flags("gpu", environment)
    command = [sys.executable, __file__, *precisions]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def main() -> None:
    """Compile every step for an H200, or one step of the precisions that are named."""
    devices = topology_devices(find_chip("h200"), 1)
    precisions = sys.argv[1:]
    families = [[*_BLOCK, f"--train.precision={each}"] for each in precisions]
    for words in families or FAMILIES.values():
        compiled = lower_step(parse(words), devices)[1].compile()
        if precisions:
            sys.stdout.write(compiled.as_text())


if __name__ == "__main__":
    main()
