"""Measure sampling in slots that are refilled, relative to all responses at once.

16 prompts have 8 responses each, of up to 192 tokens, by a model that is not trained: each token
ends a response with a probability of about 3 %, so lengths vary as those of a geometric
distribution. Both ways take turns in one process and sample the same responses. CPU time is that of
all threads.

    python tools/bench/slots.py --turns 8 --out results.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from turns import Json, machine, summary

import tjx_nn
from tjx_nn.generation.slots import slot_steps

CONFIG = tjx_nn.GPTConfig(vocab_size=256, max_seq_len=256, n_layer=4, n_head=4, d_model=256)
PROMPTS, SAMPLES, LENGTH, NEW, SLOTS = 16, 8, 16, 192, 32
STOP = tuple(range(8))


def measure(turns: int) -> Json:
    """Let both ways take turns; return their times and the median ratios."""
    params: Any = jax.jit(lambda: tjx_nn.init(CONFIG, jax.random.key(0)))()
    prompts = np.ones((PROMPTS, LENGTH), np.int32), np.full(PROMPTS, LENGTH, np.int32)
    rows, seconds = PROMPTS * SAMPLES, {"at_once": ([], []), "slots": ([], [])}  # type: ignore[var-annotated]
    tokens: dict[str, np.ndarray] = {}
    for number in range(turns + 1):
        for name in seconds if number % 2 else reversed(seconds):
            slots = SLOTS if name == "slots" else None
            wall, cpu = time.perf_counter(), time.process_time()
            tokens[name] = jax.device_get(
                tjx_nn.generate(
                    CONFIG, params, *prompts, max_new_tokens=NEW, samples=SAMPLES, temperature=1.0,
                    seeds=np.arange(rows), stop_token=STOP, slots=slots,
                )
            )  # fmt: skip
            if number:  # the first compiles
                seconds[name][0].append(time.perf_counter() - wall)
                seconds[name][1].append(time.process_time() - cpu)
    is_end = np.isin(tokens["at_once"], STOP)
    lengths = np.where(is_end.any(1), is_end.argmax(1) + 1, NEW)
    steps = {"at_once": int(lengths.max()) - 1, "slots": slot_steps(lengths.tolist(), SLOTS)}
    found: Json = {
        "rows": rows,
        "slots": SLOTS,
        "mean_length": float(lengths.mean()),
        "longest": int(lengths.max()),
        "equal_tokens": bool((tokens["slots"] == tokens["at_once"]).all()),
        "steps": steps,
        "decoded_rows_ratio": round(rows * steps["at_once"] / (SLOTS * steps["slots"]), 3),
    }
    for clock, name in enumerate(("wall", "cpu")):
        pairs = zip(seconds["at_once"][clock], seconds["slots"][clock], strict=True)
        found[name] = {
            **{way: summary(spans[clock]) for way, spans in seconds.items()},
            "ratio": round(statistics.median(a / b for a, b in pairs), 3),
        }
    return found


def main() -> None:
    """Measure from the command line, print and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    text = json.dumps({**measure(options.turns), "machine": machine()}, indent=2) + "\n"
    print(text, end="")
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
