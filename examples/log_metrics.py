"""Log a training loop of your own: JSON lines, a progress line, throughput, and a plot.

Run: `./pants run examples/log_metrics.py`, or `python examples/log_metrics.py` with tjx-metrics
installed. It prints the recorded evaluations and the files that it wrote.
"""

import math
import tempfile
import time
from pathlib import Path

from tjx_metrics import (
    CompositeTracker,
    ConsoleTracker,
    JsonlTracker,
    Throughput,
    bits_per_byte,
    perplexity,
    plot_loss,
    read_metrics,
)

STEPS, TOKENS_PER_STEP = 40, 4096

run = Path(tempfile.mkdtemp())
throughput = Throughput(max_steps=STEPS, warmup_steps=2)
console = ConsoleTracker(STEPS, throughput=throughput)
# `resume_step` is the step of the restored checkpoint: later lines are removed. -1: a new run.
tracker = CompositeTracker([JsonlTracker(run / "metrics.jsonl", resume_step=-1), console])
tracker.log_hyperparameters({"learning_rate": 6e-4, "batch_size": 8})

for step in range(1, STEPS + 1):
    time.sleep(0.002)  # a training step
    loss = 1.0 + 4.0 * math.exp(-step / 20)
    throughput.update(tokens=TOKENS_PER_STEP)
    console.update(step)
    if step % 5 == 0:
        speed = throughput.tokens_per_sec or math.nan  # None during the warm-up
        tracker.log({"train/loss": loss, "train/tokens_per_sec": speed}, step)
    if step % 20 == 0:
        with throughput.paused():  # an evaluation of 1,000 tokens that are 4,100 bytes of text
            nll, tokens, n_bytes = 1000 * (loss + 0.1), 1000, 4100
        evaluation = {
            "eval/loss": nll / tokens,
            "eval/perplexity": perplexity(nll / tokens),
            "eval/bits_per_byte": bits_per_byte(nll, n_bytes),
        }
        tracker.log(evaluation, step)
tracker.finish()

plot_loss(run / "metrics.jsonl", run / "loss.png")
for record in read_metrics(run / "metrics.jsonl"):
    if "eval/loss" in record:
        print({name: round(value, 3) for name, value in record.items() if name != "time"})
print("files:", sorted(path.name for path in run.iterdir()))
