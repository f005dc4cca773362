"""Kill campaign of pipelines: killed at random moments, they must match an undisturbed pipeline.

    ./pants run tools/campaigns/pipeline_kills.py -- --seed 1 --kills 50 [--output FILE]

A small pipeline (pretraining, SFT, GRPO) is killed by ``kill -9``, with the stage that it runs, and
started again until it finishes. Then every leaf of the last checkpoint of each stage and every
logged number are compared with those of the pipeline without kills.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from campaigns.outcome import Outcome, describe_difference, outcome
from campaigns.tiny_run import clean_environment

PIPELINE = """
common:
  model: {n_layer: 1, n_head: 2, d_model: 16, max_seq_len: 96, dropout: 0.1}
  train: {max_steps: 30, batch_size: 8, eval_every: 15, eval_tokens: 100, sample_tokens: 0}
  optimizer: {learning_rate: 1e-2}
  log: {every: 1, samples_every: 15}
  checkpoint: {every: 3}
stages:
  - name: pretrain
    data: {corpus: tiny-chat, tokenizer: char, chat_tokens: true, seq_len: 16, max_documents: 300}
  - name: sft
    task: sft
    data: {corpus: tiny-chat, seq_len: 80, max_documents: 100}
  - name: grpo
    task: grpo
    data: {corpus: tiny-chat, seq_len: 24}
    rl: {chat: true, max_new_tokens: 4, samples_per_prompt: 4, epochs: 2, eval_prompts: 8}
"""
STAGES = ("pretrain", "sft", "grpo")
MOST_STARTS = 100  # limit of restarts; beyond it a pipeline makes no progress


def start(folder: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a pipeline as the leader of a process group, with its output in a file."""
    folder.mkdir(exist_ok=True)
    file = folder / "pipeline.yaml"
    file.write_text(PIPELINE)
    words = ["pipeline", "--config", str(file), f"--pipeline.dir={folder / 'stages'}"]
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tjx_trainer.main", *words, "--data.cache_dir=prepared"],
            cwd=folder, env=dict(environment), stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip


def outcomes(folder: Path) -> dict[str, Outcome]:
    """Return the outcome of each stage."""
    return {stage: outcome(folder / "stages" / stage) for stage in STAGES}


def finish(folder: Path, environment: Mapping[str, str]) -> float:
    """Run a pipeline to its end; return its seconds."""
    begin = time.monotonic()
    if start(folder, environment).wait() != 0:
        raise AssertionError((folder / "output.txt").read_text())
    return time.monotonic() - begin


def stage_of(folder: Path) -> str:
    """Return the newest stage that has begun, and whether it had saved."""
    begun = [stage for stage in STAGES if (folder / "stages" / stage).is_dir()]
    if not begun:
        return "before the first stage"
    saved = any((folder / "stages" / begun[-1] / "checkpoints").glob("[0-9]*"))
    return f"{begun[-1]}, {'after' if saved else 'before'} its first checkpoint"


def disturb(
    folder: Path,
    environment: Mapping[str, str],
    seconds: float,
    draw: random.Random,
    moments: collections.Counter[str],
) -> None:
    """Kill a pipeline repeatedly until it finishes."""
    for _ in range(MOST_STARTS):
        process = start(folder, environment)
        try:
            # A start skips what is finished, so that later ones reach the later stages.
            code = process.wait(draw.uniform(0, 0.6 * seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            moments[stage_of(folder)] += 1
            continue
        if code != 0:
            raise AssertionError(f"exit code {code}: {(folder / 'output.txt').read_text()[-2000:]}")
        return
    raise AssertionError(f"no end after {MOST_STARTS} starts")


def main() -> int:
    """Run a campaign from the command line; return 1 if a pipeline failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=50, help="at least so many")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    folder, begin = Path(tempfile.mkdtemp(prefix="pipelines-")), time.monotonic()
    environment = clean_environment(folder / "home")
    finish(folder / "first", environment)  # compiles
    seconds = finish(folder / "whole", environment)
    expected = outcomes(folder / "first")
    failures, n_pipelines = [], 0
    moments: collections.Counter[str] = collections.Counter()
    draw = random.Random(options.seed)  # noqa: S311  moments, not secrets
    compared = {"an undisturbed pipeline": folder / "whole"}
    while True:
        for name, place in compared.items():
            found = outcomes(place)
            failures += [
                f"{name}, {stage}: {difference}"
                for stage in STAGES
                for difference in describe_difference(found[stage], expected[stage])
            ]
        print(f"{moments.total()} kills, {n_pipelines} pipelines, {len(failures)} differences")
        sys.stdout.flush()
        if moments.total() >= options.kills:
            break
        n_pipelines += 1
        place = folder / f"pipeline-{n_pipelines}"
        disturb(place, environment, seconds, draw, moments)
        compared = {f"pipeline {n_pipelines}": place}
    results = {
        "seed": options.seed, "kills": moments.total(), "by_moment": dict(sorted(moments.items())),
        "pipelines": n_pipelines, "seconds": round(time.monotonic() - begin), "failures": failures,
    }  # fmt: skip
    text = json.dumps(results, indent=2) + "\n"
    print(text, end="")
    if options.output is not None:
        options.output.write_text(text)
    if failures:
        print(f"the pipelines are in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
