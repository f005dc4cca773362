"""Export a model: Hugging Face transformers, PEFT adapters, Orbax, and plain safetensors.

Run: `./pants run examples/export_model.py`, or `python examples/export_model.py` with tjx-nn[hf]
and tjx-ckpt[orbax] installed. It prints the files of each format, and the largest difference of the
parameters that are read back. For a run of the trainer: `tjx-eval export RUN FOLDER --format hf`.
"""

import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

import tjx_ckpt
import tjx_nn

config = tjx_nn.GPTConfig(vocab_size=64, max_seq_len=16, n_layer=2, n_head=2, d_model=16)
params = jax.jit(tjx_nn.init, static_argnums=0)(config, jax.random.key(0))
folder = Path(tempfile.mkdtemp())


def report(name: str, restored: Any) -> None:
    """Print the files of a format and the largest difference to the parameters."""
    differences = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), jax.device_get(params), restored
    )
    files = sorted(path.name for path in (folder / name).iterdir())[:3]
    print(f"{name:12} {', '.join(files)}: difference {max(jax.tree.leaves(differences))}")


# AutoModelForCausalLM.from_pretrained(folder / "hf") of transformers loads it.
tjx_nn.hf.save(folder / "hf", config, params)
report("hf", tjx_nn.hf.load(folder / "hf")[1])

# Low-rank adapters: save them alone, for PEFT, or merge them before an export.
low_rank = tjx_nn.LoRAConfig(rank=4, alpha=8, targets="attention.*")
adapters = tjx_nn.lora.init(config, low_rank, jax.random.key(1))
tjx_nn.lora.save(folder / "peft", config, low_rank, adapters)
low_rank, adapters = tjx_nn.lora.load(folder / "peft", config)
merged = tjx_nn.lora.merge(params, adapters, low_rank)  # untrained adapters change nothing
report("peft", jax.device_get(merged))

# MaxText and other programs with Orbax.
tjx_ckpt.write_orbax(folder / "orbax", params)
unflatten: Any = traverse_util.unflatten_dict
report("orbax", unflatten(tjx_ckpt.read_orbax(folder / "orbax"), sep="/"))

# One file that every reader of safetensors opens.
(folder / "file").mkdir()
tjx_ckpt.save_tree(folder / "file" / "params.safetensors", params)
report("file", tjx_ckpt.load_tree(folder / "file" / "params.safetensors"))
