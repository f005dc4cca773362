"""Save and restore any pytree: checksummed checkpoints of a run, and a single file.

Run: `./pants run examples/checkpoint_any_pytree.py`, or `python examples/checkpoint_any_pytree.py`
with tjx-ckpt installed. It saves two steps, damages the newer one, and prints from which step it
restores, and that all leaves are equal bit for bit.
"""

import tempfile
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp

from tjx_ckpt import Checkpointer, CorruptCheckpointWarning, load_tree, save_tree

state = {
    "step": jnp.int32(100),
    "params": {"w": jnp.arange(12, dtype=jnp.bfloat16).reshape(3, 4), "layers": [jnp.ones(2)] * 2},
    "key": jax.random.key_data(jax.random.key(7)),
}
# Shapes, dtypes and shardings of the state: what `restore` needs.
abstract = jax.eval_shape(lambda: state)
folder = Path(tempfile.mkdtemp())

with Checkpointer(folder / "checkpoints", keep=3) as checkpointer:
    checkpointer.save(100, state, metadata={"note": "before"}, metrics={"eval/loss": 2.5})
    checkpointer.save(200, {**state, "step": jnp.int32(200)})  # in the background

# A disk flips a bit of the newer checkpoint.
file = next((folder / "checkpoints" / "200").glob("params-*.safetensors"))
content = bytearray(file.read_bytes())
content[-1] ^= 1
file.write_bytes(content)

with Checkpointer(folder / "checkpoints") as checkpointer:
    print("damaged files of step 200:", len(checkpointer.verify(200)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CorruptCheckpointWarning)
        restored = checkpointer.restore(abstract)  # the newest intact one
    print("restored step", int(restored["step"]), checkpointer.metadata(100))

same = jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), state, restored)
print("equal leaves:", all(jax.tree.leaves(same)))

# One file, without a directory of steps; no template is needed to read it.
save_tree(
    folder / "state.safetensors", {"epoch": 3, "params": state["params"], "key": jax.random.key(7)}
)
tree = load_tree(folder / "state.safetensors")
print("file:", tree["epoch"], tree["params"]["w"].dtype, len(tree["params"]["layers"]), tree["key"])
