"""Measure the loss of quantized weights and KV caches on the validation text of runs; write JSON.

    python tools/bench/quantization_loss.py RUN... [--max-tokens N] [--output FILE]

requires the packages of apps/eval (or PYTHONPATH of their src). The text is cut into windows of the
model's length. After its first token each window is decoded token by token with a KV cache, as a
response of `tjx_nn.generate_exact`, so that all numbers have the same path.
"""

import argparse
import dataclasses
import datetime
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from turns import Json, machine

import tjx_nn
from tjx_eval.load_model import TrainedModel, load_model
from tjx_eval.scoring.encoding import encode, make_sequences
from tjx_eval.scoring.eval_data import load_texts

TILE = 64
# Fields of the configuration, and dtype of the weights of blocks.
FORMATS: dict[str, tuple[dict[str, Any], str | None]] = {
    "float32": ({}, None),
    "bfloat16": ({"dtype": "bfloat16"}, None),
    "int8": ({}, "int8"),
    "int4": ({}, "int4"),
    "int8 KV cache": ({"kv_cache_dtype": "int8"}, None),
    "int4 and int8 KV cache": ({"kv_cache_dtype": "int8"}, "int4"),
}


def windows(model: TrainedModel, max_tokens: int | None) -> np.ndarray:
    """Return windows of validation text, int32 [windows, length]; the last tokens are dropped."""
    documents = encode(load_texts(model).documents, model.tokenizer, max_tokens)
    (tokens,) = make_sequences(documents, model.tokenizer.eot_id, per_document=False).sequences
    length = model.architecture.max_seq_len
    return tokens[: len(tokens) // length * length].reshape(-1, length)


def loss(config: Any, params: Any, tokens: np.ndarray) -> float:
    """Return the mean loss of all tokens but the first of each window, in nats."""
    _, log_probs = tjx_nn.generate_exact(
        config, params, tokens[:, :1], np.ones(len(tokens), np.int32),
        max_new_tokens=tokens.shape[1] - 1, responses=tokens[:, 1:], tile=TILE,
    )  # fmt: skip
    return -float(log_probs.mean(dtype=np.float64))


def measure(path: str, max_tokens: int | None) -> Json:
    """Measure all formats on one run."""
    model = load_model(path)
    tokens = windows(model, max_tokens)
    quantize = jax.jit(tjx_nn.quantize, static_argnums=(0, 2))
    found: Json = {"run": Path(path).name, "tokens": tokens[:, 1:].size, "formats": {}}
    print(f"{found['run']}: {found['tokens']:,} tokens", flush=True)
    for name, (fields, dtype) in FORMATS.items():
        params = model.params
        if dtype is not None:
            params = quantize(model.architecture, params, dtype)
        config = dataclasses.replace(model.architecture, **fields)
        value = loss(config, params, tokens)
        first = found["formats"].get("float32", {"loss": value})["loss"]
        found["formats"][name] = {
            "loss": round(value, 4),
            "perplexity": round(math.exp(value), 3),
            "added_percent": round(100 * math.expm1(value - first), 3),
        }
        print(f"  {name:<24}{found['formats'][name]}", flush=True)
    return found


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run directories")
    parser.add_argument("--max-tokens", type=int, help="tokens of text, by default all")
    parser.add_argument("--output", type=Path, help="output JSON file")
    given = parser.parse_args()
    start = machine()
    records = [measure(run, given.max_tokens) for run in given.runs]
    if given.output is not None:
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        result = {"date": date, "machine": start, "runs": records}
        given.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
