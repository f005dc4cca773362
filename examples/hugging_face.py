"""Load a model in the format of Hugging Face transformers and generate text.

Run: `./pants run examples/hugging_face.py -- [FOLDER [PROMPT]]`, or `python
examples/hugging_face.py ...` with tjx-data and tjx-nn[hf] installed. FOLDER may be a name on the
hub, such as openai-community/gpt2, if the hub can be reached. Without it, the script writes a tiny
untrained GPT-2 and loads that. It prints the model, and samples with their log-probabilities.
"""

import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tjx_nn
from tjx_data import Tokenizer, byte_tokenizer


def write_tiny_model() -> str:
    """Write a random GPT-2 that reads bytes; return its folder."""
    folder = tempfile.mkdtemp()
    config = tjx_nn.GPTConfig(vocab_size=257, max_seq_len=64, n_layer=1, n_head=2, d_model=16)
    tjx_nn.hf.save(
        folder, config, jax.jit(tjx_nn.init, static_argnums=0)(config, jax.random.key(0))
    )
    byte_tokenizer().save(f"{folder}/tokenizer.json")
    return folder


folder = sys.argv[1] if len(sys.argv) > 1 else write_tiny_model()
prompts = sys.argv[2:] or ["Once upon a time", "The"]
config: Any
config, params = tjx_nn.hf.load(folder)
tokenizer = Tokenizer.load(folder)

# Prompts of different lengths in one batch: each row is filled up on the right.
encoded = [tokenizer.encode_prompt(prompt) for prompt in prompts]
lengths = np.array([len(ids) for ids in encoded])
prompt = np.zeros((len(encoded), lengths.max()), np.int32)
for row, ids in zip(prompt, encoded, strict=True):
    row[: len(ids)] = ids

tokens, log_probs = tjx_nn.generate(
    config,
    params,
    jnp.asarray(prompt),
    jnp.asarray(lengths),
    max_new_tokens=8,
    temperature=0.8,
    top_k=50,
    key=jax.random.key(1),
    return_log_probs=True,
)
print(f"{config.family}: {tjx_nn.count_params(config):,} parameters, {config.n_layer} layers")
for text, row, log_prob in zip(prompts, np.asarray(tokens), np.asarray(log_probs), strict=True):
    print(f"{text!r} -> {tokenizer.decode(row)!r} ({log_prob.sum():.2f} nats)")
