"""A tiny training run shared by all tests of the app, also as a Transformers model.

All tests use the same text and sizes, so that compiled programs are shared.
"""

import functools
import shutil
import tempfile
from pathlib import Path

import jax

from tjx_eval.load_model import load_model
from tjx_nn import hf
from tjx_trainer import main as trainer

TINY = """
--model.n_layer=2 --model.n_head=2 --model.d_model=16 --model.max_seq_len=16 --data.seq_len=16
--data.tokenizer=char --data.holdout=tail --train.max_steps=4 --train.batch_size=16
--train.eval_every=2 --train.sample_tokens=0 --checkpoint.every=2
--optimizer.learning_rate=1e-2 --optimizer.ema_decay=0.9
""".split()  # noqa: SIM905  a list of words reads worse


@functools.cache
def tiny_run() -> Path:
    """Return the run directory of a decoder of 16 positions, with checkpoints of steps 2 and 4.

    Read-only. It was trained on lines such as "12 sheep and more more ", by characters.
    """
    folder = Path(tempfile.mkdtemp(prefix="tjx-eval-tests-"))
    text = folder / "text.txt"
    text.write_text("".join(f"{n} sheep and {'more ' * (n % 5)}\n" for n in range(200)))
    words = [f"--data.path={text}", f"--data.cache_dir={folder / 'cache'}"]
    assert trainer.main([*TINY, *words, f"--run_dir={folder / 'run'}"]) == 0
    return folder / "run"


def as_transformers(run: Path, folder: Path) -> Path:
    """Export the model of a run to a Transformers model directory, with its tokenizer."""
    model = load_model(run)
    hf.save(folder, model.architecture, jax.device_get(model.params))
    shutil.copy(run / "tokenizer.json", folder)
    return folder
