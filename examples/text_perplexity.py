"""Compute perplexity and bits per byte of a text under a language model.

Run: `./pants run examples/text_perplexity.py -- [FOLDER [FILE]]`, or `python
examples/text_perplexity.py ...` with tjx-data, tjx-metrics and tjx-nn[hf] installed. FOLDER is a
model in the format of Hugging Face transformers with its tokenizer.json, such as
`tjx-eval export RUN FOLDER --format hf` writes. Without it, the model guesses all bytes equally
well, and the script prints a perplexity of 257 (256 bytes and the end of text).
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tjx_nn
from tjx_data import Tokenizer, byte_tokenizer
from tjx_metrics import bits_per_byte, perplexity

TEXT = "A language model assigns a probability to each token of a text.\n" * 20

config: Any
if len(sys.argv) > 1:
    config, params = tjx_nn.hf.load(sys.argv[1])
    tokenizer = Tokenizer.load(sys.argv[1])
else:
    tokenizer = byte_tokenizer()
    config = tjx_nn.GPTConfig(
        vocab_size=tokenizer.vocab_size, max_seq_len=64, n_layer=1, n_head=2, d_model=16
    )
    params = jax.tree.map(jnp.zeros_like, tjx_nn.init(config, jax.random.key(0)))
text = Path(sys.argv[2]).read_text(encoding="utf-8") if len(sys.argv) > 2 else TEXT


@jax.jit
def token_losses(params: Any, tokens: jax.Array, labels: jax.Array) -> Any:
    """Return the loss of each label in nats; labels of -100 have loss 0."""
    return tjx_nn.bind(config, params).losses(tokens, labels).tokens


# Windows without overlap: row i predicts the tokens that follow its own.
ids = np.array(tokenizer.encode_prompt(text), np.int32)
rows = -(-(len(ids) - 1) // config.max_seq_len)
labels = np.full((rows, config.max_seq_len), -100, np.int32)
labels.flat[: len(ids) - 1] = ids[1:]
tokens = np.zeros_like(labels)
tokens.flat[: len(ids) - 1] = ids[:-1]

nll = sum(float(token_losses(params, tokens[i : i + 4], labels[i : i + 4]).sum())
          for i in range(0, rows, 4))  # fmt: skip
print(f"{len(ids) - 1} tokens, {len(text.encode())} bytes")
print(f"perplexity    {perplexity(nll / (len(ids) - 1)):.3f}")
print(f"bits per byte {bits_per_byte(nll, len(text.encode())):.4f}")
