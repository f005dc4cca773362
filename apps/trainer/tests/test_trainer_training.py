"""Training in this process: steps, evaluations and whole runs."""

import contextlib
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from process_harness import records
from small_text import flags_of_sheep

import tjx_ckpt
import tjx_data
import tjx_metrics
import tjx_nn
import tjx_optim
from tjx_nn.models.gpt_config import GPTConfig
from tjx_trainer import main as program
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.runtime.exit_codes import ExitCode
from tjx_trainer.runtime.preemption import PreemptionSync
from tjx_trainer.runtime.signals import SignalHandler
from tjx_trainer.runtime.watchdog import Watchdog
from tjx_trainer.tasks.causal_lm import CausalLMTask
from tjx_trainer.tasks.registry import open_task
from tjx_trainer.tasks.sampling import generate_text, max_new_tokens_for
from tjx_trainer.tasks.task import HostBatch
from tjx_trainer.training.build import Job, build_job
from tjx_trainer.training.checkpointing import CheckpointSaver
from tjx_trainer.training.evaluation import evaluate, make_eval_step
from tjx_trainer.training.loop import train_loop
from tjx_trainer.training.metrics_logger import MetricsLogger
from tjx_trainer.training.step_timer import Elapsed, StepTimer
from tjx_trainer.training.train_state import Batch, TrainState
from tjx_trainer.training.train_step import make_loss_sum

TINY = """
--model.n_layer=1 --model.n_head=2 --model.d_model=16 --model.max_seq_len=16 --data.seq_len=16
--data.tokenizer=char --data.holdout=tail --train.max_steps=12 --train.batch_size=16
--train.eval_every=6 --train.sample_tokens=6 --log.every=1 --optimizer.learning_rate=1e-2
--schedule.warmup_steps=2 --checkpoint.every=6
""".split()  # noqa: SIM905  a list of words reads worse


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*TINY, *flags_of_sheep(tmp_path_factory.mktemp("data"))]


@pytest.fixture(scope="module")
def job(words: list[str]) -> Job:
    # The z-loss is part of the objective, and of no evaluation below.
    flags = ["--train.accumulation=2", "--model.dropout=0.1", "--model.z_loss=0.01"]
    config = resolve([*words, *flags])
    return build_job(*open_task(config))


def gpt_of(job: Job) -> GPTConfig:
    assert isinstance(job.config.model, GPTConfig)
    return job.config.model


def task_of(job: Job) -> CausalLMTask:
    assert isinstance(job.task, CausalLMTask)
    return job.task


def run(words: list[str], run_dir: Path, *more: str) -> int:
    return program.main([*words, f"--run_dir={run_dir}", *more])


def test_a_step_trains_and_is_a_function_of_seed_and_step(job: Job) -> None:
    finals = []
    for _ in range(2):
        state = job.initial_state()
        losses = []
        for step in range(8):
            state, metrics = job.train_step(state, job.put(job.task.train_data.batch(step)))
            losses.append(float(jax.device_get(metrics["loss"])))
        finals.append(jax.device_get(state.params))
        assert losses[-1] < losses[0] - 0.2
        assert int(jax.device_get(state.step)) == 8
        assert int(jax.device_get(metrics["tokens"])) == 16 * 16
    chex.assert_trees_all_equal(*finals, strict=True)


def test_z_loss_is_a_mean_over_labels_of_all_microbatches(job: Job) -> None:
    model, params = gpt_of(job), job.initial_state().params
    batch = {name: np.array(rows) for name, rows in job.task.train_data.batch(0).items()}
    batch["labels"][:4, 1:] = batch["labels"][4:8] = -100  # 4 and no labels of a microbatch

    @partial(jax.jit, static_argnums=2)
    def compute(params: Any, batch: Any, accumulation: int) -> Any:
        loss_sum = make_loss_sum(job.config, tjx_nn.Layout())
        return tjx_optim.accumulate_gradients(
            loss_sum, params, tjx_optim.split_microbatches(batch, accumulation), loss_scale=None
        )

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def reference(params: Any, batch: Any) -> Any:
        logits = tjx_nn.bind(model, params)(batch["tokens"])
        counts = batch["labels"] >= 0
        targets = jax.nn.one_hot(batch["labels"], logits.shape[-1])  # of -100: zeros
        cross_entropy = -(targets * jax.nn.log_softmax(logits)).sum() / counts.sum()
        squares = jnp.square(jax.nn.logsumexp(logits, -1))
        z_loss = jnp.where(counts, squares, 0).sum() / counts.sum()
        return cross_entropy + 0.01 * z_loss, (cross_entropy, z_loss)

    placed = job.put(batch)
    (loss, (cross_entropy, z_loss)), expected = jax.device_get(reference(params, placed))
    for accumulation in (1, 4):
        found = jax.device_get(compute(params, placed, accumulation))
        assert found.loss == pytest.approx(loss, rel=1e-5)
        assert found.means["loss"] == pytest.approx(cross_entropy, rel=1e-5)
        assert found.means["z_loss"] == pytest.approx(z_loss, rel=1e-5)
        chex.assert_trees_all_close(found.gradients, expected, rtol=1e-4, atol=1e-6)


def test_evaluation_sums_are_exact_for_any_batch_size(job: Job) -> None:
    model, params = gpt_of(job), job.initial_state().params
    lengths = task_of(job).tokenizer.token_byte_lengths
    found = {}
    (folder,) = task_of(job).folders.values()
    for batch_size in (8, 24):
        loader = tjx_data.TokenLoader(folder, split="validation", seq_len=16, batch_size=batch_size)
        found[batch_size] = evaluate(
            make_eval_step(model, ks=(1, 5), token_byte_lengths=lengths),
            params,
            [job.put(batch) for batch in loader.evaluation_batches(500)],
        )
    # The same by NumPy in float64, window after window.
    tokens = loader.read(0, 501).astype(np.int32)
    logits_of = jax.jit(lambda params, tokens: tjx_nn.bind(model, params)(tokens))
    losses, top = [], []
    for start in range(0, 500, 16):
        window = tokens[start : min(start + 16, 500)]
        padded = np.zeros((8, 16), np.int32)
        padded[0, : len(window)] = window
        row = np.asarray(
            jax.device_get(logits_of(params, job.put({"tokens": padded})["tokens"])), np.float64
        )[0]
        targets = tokens[start + 1 : start + 1 + len(window)]
        for position, target in enumerate(targets):
            logits = row[position]
            losses.append(math.log(np.exp(logits - logits.max()).sum()) + logits.max())
            losses[-1] -= logits[target]
            top.append(int((logits > logits[target]).sum()))
    for evaluation in found.values():
        assert evaluation.tokens == 500
        assert evaluation.text_bytes == int(lengths[tokens[1:]].sum())
        assert evaluation.loss_sum == pytest.approx(math.fsum(losses), rel=1e-6)
        assert evaluation.correct == {k: sum(rank < k for rank in top) for k in (1, 5)}
        metrics = evaluation.metrics()
        assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
        assert metrics["top1_accuracy"] <= metrics["top5_accuracy"]


def test_a_run_resumed_is_the_same_run(
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run(words, tmp_path / "whole") == 0
    printed = capsys.readouterr()
    assert "bits per byte" in printed.out
    assert (tmp_path / "whole" / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")

    beat = Watchdog.beat

    def stop_at_eight(self: Watchdog, phase: str, step: int) -> None:
        if (phase, step) == ("train", 7):  # the eighth is about to be made
            signal.raise_signal(signal.SIGTERM)
        beat(self, phase, step)

    monkeypatch.setattr(Watchdog, "beat", stop_at_eight)
    assert run(words, tmp_path / "halves") == 143
    assert "stopped by SIGTERM after saving step 8;" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(words, tmp_path / "halves") == 0
    assert "from step 8" in capsys.readouterr().err
    assert records(tmp_path / "halves") == records(tmp_path / "whole")


def loop(job: Job, folder: Path, before_batch: Callable[[int], object]) -> list[float]:
    """Run the loop on batches that something is done before; return the shares of waiting."""
    folder.mkdir()
    batch = job.task.train_data.batch

    def batch_after(step: int) -> HostBatch:
        before_batch(step)
        return batch(step)

    tracker = tjx_metrics.JsonlTracker(folder / "metrics.jsonl")
    step_timer = StepTimer(job.config, job.mesh, start_step=0, elapsed=Elapsed())
    logger = MetricsLogger(tracker, step_timer, tjx_metrics.LogConfig(every=2), max_skipped=1)
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.closing(tjx_ckpt.Checkpointer(folder / "checkpoints")) as checkpointer,
        Watchdog(folder, job.config.watchdog) as watchdog,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(tracker.finish)
        patch.setattr(job.task.train_data, "batch", batch_after)
        train_loop(
            job,
            job.initial_state(),
            logger=logger,
            saver=CheckpointSaver(
                checkpointer,
                tracker,
                on_error="stop",
                describe=lambda _: {},
                flush_records=lambda: None,
            ),
            preemption=PreemptionSync(SignalHandler()),
            watchdog=watchdog,
            profiler=tjx_metrics.Profiler(None, folder),
        )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    spent = [{k: v for k, v in line.items() if k.startswith("time/")} for line in lines]
    return [each["time/data_wait"] / sum(each.values()) for each in spent if each]


def no_thread_is_left() -> bool:
    return all(thread.name != "tjx-data-prefetch" for thread in threading.enumerate())


def test_the_fraction_of_time_waiting_for_data_is_reported(job: Job, tmp_path: Path) -> None:
    quick = loop(job, tmp_path / "quick", lambda _: None)
    slow = loop(job, tmp_path / "slow", lambda _: time.sleep(0.3))
    assert len(quick) == len(slow) == 7  # of steps 1, 2, 4, ..., 12
    assert all(0 <= share <= 1 for share in quick + slow)
    assert np.median(slow) > 0.6
    assert np.median(quick) < 0.3
    assert no_thread_is_left()


@pytest.mark.parametrize("inline", [False, True])
def test_steps_are_counted_when_their_programs_end(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inline: bool
) -> None:
    events = []
    step, record = job.train_step, StepTimer.record_step

    def recorded_step(state: TrainState, batch: Batch) -> Any:
        events.append("run")
        return step(state, batch)

    def recorded_count(timer: StepTimer, tokens: int) -> None:
        events.append("count")
        record(timer, tokens)

    monkeypatch.setattr("tjx_trainer.training.loop.programs_run_inline", lambda: inline)
    monkeypatch.setattr(StepTimer, "record_step", recorded_count)
    loop(dataclasses.replace(job, train_step=recorded_step), tmp_path / "run", lambda _: None)
    assert events[:4] == (["run", "count"] * 2 if inline else ["run", "run", "count", "run"])
    assert events.count("count") == events.count("run") == job.config.train.max_steps


def test_a_recompiled_step_is_reported(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = job.task.train_data.batch

    def batch(step: int) -> HostBatch:
        return {name: x[:, :8] if step == 2 else x for name, x in whole(step).items()}

    monkeypatch.setattr(job.task.train_data, "batch", batch)
    with pytest.warns(tjx_metrics.RecompileWarning, match="the training step was compiled again"):
        loop(job, tmp_path / "run", lambda _: None)


def test_an_error_while_loading_a_batch_ends_the_run(job: Job, tmp_path: Path) -> None:
    def fail(step: int) -> None:
        if step == 3:
            raise OSError("shard 7 is gone")

    with pytest.raises(OSError, match="shard 7 is gone") as error:
        loop(job, tmp_path / "error", fail)
    assert error.value.__notes__ == ["while step 3 was loaded in the background"]
    assert no_thread_is_left()
    # Implicit transfers are errors in the loading thread, too.
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        loop(job, tmp_path / "transfer", lambda _: jnp.add(np.ones(3), 1))
    assert no_thread_is_left()


def test_data_that_changed_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "own.txt"
    text.write_text("the first text " * 300)
    own = [word for word in words if not word.startswith("--data.path=")]
    own.append(f"--data.path={text}")
    own = [word for word in own if not word.startswith("--train.max_steps=")]
    own.append("--schedule.decay_steps=12")
    assert run(own, tmp_path / "run", "--train.max_steps=2") == 0
    tokenizer = (tmp_path / "run" / "tokenizer.json").read_bytes()
    text.write_text("another text" + "the first text " * 300)
    with pytest.raises(SystemExit) as stop:
        run(own, tmp_path / "run", "--train.max_steps=4")
    assert stop.value.code == 2
    refused = capsys.readouterr().err
    assert "changed since this run" in refused
    assert "tokens was" in refused
    assert "seed was" not in refused
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == tokenizer


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"", "empty"), (b"caf\xe9 " * 100, "UTF-8"), (None, "no such file")],
    ids=["empty", "latin-1", "missing"],
)
def test_text_that_cannot_be_used_is_refused_by_name(
    content: bytes | None,
    complaint: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "bad.txt"
    if content is not None:
        text.write_bytes(content)
    others = [word for word in words if not word.startswith("--data.path=")]
    with pytest.raises(SystemExit) as stop:
        run([*others, f"--data.path={text}"], tmp_path / "run")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert "bad.txt" in error
    assert not (tmp_path / "run").exists(), "a refused run leaves nothing behind"


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(words, tmp_path / "run", "--model.vocab_size=5")
    assert stop.value.code == 2
    assert "model.vocab_size: got 5" in capsys.readouterr().err


def test_samples_continue_the_prompt_and_know_the_longest(job: Job) -> None:
    params = job.initial_state().params
    room = max_new_tokens_for(gpt_of(job), task_of(job).tokenizer, "12")
    with jax.transfer_guard("allow"):
        texts = generate_text(
            gpt_of(job),
            params,
            task_of(job).tokenizer,
            "12",
            samples=2,
            max_new_tokens=room,
            temperature=1.0,
            top_k=500,
            seed=3,
        )
    assert len(texts) == 2
    assert texts[0] != texts[1]
    with pytest.raises(ValueError, match="at most 16 tokens in all"):
        generate_text(
            gpt_of(job),
            params,
            task_of(job).tokenizer,
            "12",
            max_new_tokens=room + 1,
            temperature=0.0,
            top_k=None,
            seed=0,
        )


def test_a_prompt_that_the_tokenizer_cannot_encode_is_dropped_before_training(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = open_task(resolve([*words, "--train.sample_prompt=π"]))
    assert config.train.sample_prompt is None
    assert "samples start without train.sample_prompt 'π': text: got the" in capsys.readouterr().err
    assert open_task(resolve([*words, "--train.sample_prompt=1"]))[0].train.sample_prompt == "1"


def test_damaged_data_are_refused_before_training(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "own.txt"
    text.write_text("a text of words " * 300)
    own = [word for word in words if not word.startswith(("--data.path=", "--data.cache_dir="))]
    own += [f"--data.path={text}", f"--data.cache_dir={tmp_path / 'cache'}"]
    config = resolve(own)
    folder = tjx_data.open_or_prepare(config.data)
    shard = folder / "train_00000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1  # size and header are unchanged
    shard.write_bytes(content)
    assert run(own, tmp_path / "run") == ExitCode.DATA_DAMAGED
    assert "train_00000.bin: SHA-256 is" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_tokens_that_the_tokenizer_does_not_have_are_seen(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = task_of(job).tokenizer
    sheep = tokenizer.encode("sheep")
    beyond = tokenizer.vocab_size + 3  # of a model with a larger vocabulary
    row = np.array([[*sheep, beyond, beyond, *sheep]], np.int32)
    monkeypatch.setattr("tjx_nn.generate", lambda *_, **__: row)
    texts = generate_text(
        gpt_of(job), {}, tokenizer, "1", max_new_tokens=1, temperature=1.0, top_k=None, seed=0
    )
    assert texts == ["sheep" + 2 * "\N{REPLACEMENT CHARACTER}" + "sheep"]


def test_packed_documents_do_not_see_each_other(words: list[str], tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("<|endoftext|>".join(f"{n} sheep" for n in range(300)))
    own = [word for word in words if not word.startswith("--data.path=")]
    config = resolve([*own, f"--data.path={text}", "--data.packing=documents"])
    job = build_job(*open_task(config))
    row = {name: values[:1] for name, values in job.task.train_data.batch(0).items()}
    other = {**row, "tokens": row["tokens"].copy()}
    first = row["segment_ids"][0] == 1
    other["tokens"][0, first] = other["tokens"][0, first][::-1]
    assert row["segment_ids"].max() > 1

    @jax.jit
    def losses(params: dict[str, Any], batch: dict[str, np.ndarray]) -> jax.Array:
        return (
            tjx_nn.bind(gpt_of(job), params)
            .losses(
                batch["tokens"],
                batch["labels"],
                positions=batch["positions"],
                segment_ids=batch["segment_ids"],
            )
            .tokens
        )

    params = job.initial_state().params
    with jax.transfer_guard("allow"):  # a row that is not spread over the devices
        before, after = (np.asarray(losses(params, rows)) for rows in (row, other))
    np.testing.assert_array_equal(before[0, ~first], after[0, ~first])
    assert (before[0, first] != after[0, first]).any()
