"""The loss on what a run held out, of any family, as its training measures it."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax

import tjx_parallel
from tjx_eval.commands.tables import Figure
from tjx_eval.load_model import TrainedModel
from tjx_eval.scoring.eval_data import run_text
from tjx_eval.scoring.score import TOP_K, ProgressCallback, nobody
from tjx_parallel.config import MeshConfig
from tjx_trainer.tasks.causal_lm import CausalLMTask
from tjx_trainer.tasks.registry import open_task
from tjx_trainer.tasks.task import DataShard, Task
from tjx_trainer.training.evaluation import evaluate, make_eval_step
from tjx_trainer.training.mesh_layout import make_layout


def measure_validation_loss(
    model: TrainedModel,
    *,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    told: ProgressCallback = nobody,
) -> dict[str, Figure]:
    """Evaluate over a run's validation data, once.

    Parameters
    ----------
    model : TrainedModel
        A run.
    batch_size : int, optional
        Examples at once, over all devices; changes no result. The run's own by default.
    max_tokens : int, optional
        Stop after so many tokens, or whatever the data are counted in.
    told : callable
        Told how many labels were evaluated so far, and 0 for all there are, which nobody knows.

    Returns
    -------
    dict
        Losses in nats a label, and of text in bits a token and a byte; perplexity; shares of labels
        among the likeliest; the number of labels and bytes, and labels a second.
    """
    assert model.config is not None
    config = dataclasses.replace(
        model.config, train=dataclasses.replace(model.config.train, eval_tokens=max_tokens)
    )
    devices = model.mesh.size
    rows = -(-(batch_size or config.train.batch_size) // devices) * devices
    share = DataShard(rows, rows, *tjx_parallel.batch_process(model.mesh))
    task: Task
    if config.model.family == "gpt":
        task = CausalLMTask(config, run_text(model), share)
    else:
        config, make_task = open_task(config)
        task = make_task(share)
    step = make_eval_step(
        model.architecture,
        ks=TOP_K if config.model.family == "gpt" else task.accuracies,
        token_byte_lengths=task.token_byte_lengths,
        layout=make_layout(
            model.architecture, model.mesh, tjx_parallel.ShardingRules(), MeshConfig()
        ),
    )

    def put(batch: Any) -> Any:
        return tjx_parallel.shard_batch(model.mesh, batch)

    def batches(limit: int | None) -> Iterator[Any]:
        done = 0
        for number, batch in enumerate(task.evaluation_batches(put)):
            if number == limit:
                return
            yield batch
            done += batch["labels"].size
            told(done, 0)

    with jax.transfer_guard("allow"):
        evaluate(step, model.params, batches(1))  # compiles, so that the rate is the model's
        started = time.perf_counter()
        found = evaluate(step, model.params, batches(None))
        seconds = time.perf_counter() - started
    figures = found.metrics()
    if config.model.family == "gpt":
        del figures["exact_match"]  # nobody asks a decoder for a whole row
    return {
        **figures,
        "tokens": found.tokens,
        **({} if found.text_bytes is None else {"text_bytes": found.text_bytes}),
        "tokens_per_sec": found.tokens / seconds,
    }
