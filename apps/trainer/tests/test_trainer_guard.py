"""Non-finite steps, fp16 loss scaling and every optimizer, through the trainer."""

import contextlib
import json
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import pytest
from jax.tree_util import tree_leaves_with_path as leaves_with_path
from one_device import ALL_DEVICES, one_device  # noqa: F401

import tjx_ckpt
from tjx_optim.optimizer_config import OptimizerName
from tjx_trainer import main as program
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.tasks.registry import open_task
from tjx_trainer.training.build import Job, build_job, build_step_components
from tjx_trainer.training.train_state import TrainState

TINY = """
--model.n_layer=2 --model.n_head=2 --model.d_model=16 --model.max_seq_len=16 --data.seq_len=16
--data.tokenizer=char --data.holdout=tail --train.max_steps=8 --train.batch_size=16
--train.eval_every=8 --train.sample_tokens=0 --train.accumulation=2
""".split()  # noqa: SIM905  a list of words reads worse


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    text = folder / "text.txt"
    text.write_text("".join(f"{n} sheep and {'more ' * (n % 5)}\n" for n in range(300)))
    return [*TINY, f"--data.path={text}", f"--data.cache_dir={folder / 'cache'}"]


def open_job(words: list[str], *more: str, learning_rate: str = "1e-2") -> Job:
    config = resolve([*words, f"--optimizer.learning_rate={learning_rate}", *more])
    return build_job(*open_task(config))


@pytest.fixture(scope="module")
def plain(words: list[str]) -> Job:
    return open_job(words, "--schedule.warmup_steps=50", "--log.layer_norms_every=1")


@pytest.fixture(scope="module")
def fp16(words: list[str]) -> Job:
    scaling = ("--train.precision=fp16", "--guard.growth_interval=3")
    return open_job(words, "--schedule.warmup_steps=50", *scaling)


def step_of(job: Job, state: TrainState, step: int) -> tuple[TrainState, Any]:
    return job.train_step(state, job.put(job.task.train_data.batch(step)))


def with_nan(state: TrainState) -> TrainState:
    """Return the state with one parameter that is no number: so is every gradient then."""
    with jax.transfer_guard("allow"):
        scale = state.params["ln_f"]["scale"].at[3].set(np.nan)
        ln_f = {**state.params["ln_f"], "scale": scale}
        return state._replace(params={**state.params, "ln_f": ln_f})


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(jax.device_get(tree))]


def test_a_step_that_is_not_finite_changes_no_bit_and_is_counted(plain: Job) -> None:
    state, _ = step_of(plain, plain.initial_state(), 0)
    state = with_nan(state)
    before = bits((state.params, state.opt_state))

    for count in (1, 2):
        state, metrics = step_of(plain, state, count)
        assert bits((state.params, state.opt_state)) == before
        assert int(jax.device_get(metrics["skipped"])) == count
        assert not np.isfinite(jax.device_get(metrics["loss"]))
    assert int(jax.device_get(state.step)) == 3


def test_the_logged_learning_rate_is_the_one_used(words: list[str]) -> None:
    job = open_job(words, "--schedule.warmup_steps=4")
    state, first = step_of(job, job.initial_state(), 0)
    good = state.params
    with jax.transfer_guard("allow"):
        good = jax.tree.map(lambda leaf: leaf.copy(), good)
    state, skipped = step_of(job, with_nan(state), 1)
    _, second = step_of(job, state._replace(params=good), 2)
    rates = [float(jax.device_get(m["learning_rate"])) for m in (first, skipped, second)]
    # The update that was skipped is made up for by the next step, at the same rate.
    np.testing.assert_allclose(rates, [0.002, 0.004, 0.004], rtol=1e-6)


def test_an_overflow_halves_the_scale_and_training_recovers(fp16: Job) -> None:
    state = fp16.initial_state()
    with jax.transfer_guard("allow"):
        scale = 2.0**24 * state.guard.loss_scale
        state = state._replace(guard=state.guard._replace(loss_scale=scale))
    scales, losses, skipped = [], [], 0
    for step in range(40):
        before = bits((state.params, state.opt_state))
        state, metrics = step_of(fp16, state, step)
        scales.append(float(jax.device_get(metrics["loss_scale"])))
        losses.append(float(jax.device_get(metrics["loss"])))
        was_skipped = int(jax.device_get(metrics["skipped"])) > skipped
        skipped += was_skipped
        assert (bits((state.params, state.opt_state)) == before) == was_skipped
        if was_skipped:
            assert float(jax.device_get(state.guard.loss_scale)) == scales[-1] / 2
    assert scales[:4] == [2.0**40, 2.0**39, 2.0**38, 2.0**37]
    assert 5 < skipped < 30
    # The scale could be halved each time: such steps do not bring the end nearer.
    assert int(jax.device_get(state.guard.skipped_in_a_row)) <= 1
    assert losses[-1] < losses[0] - 0.2


def test_fp16_trains_as_fp32_does(plain: Job, fp16: Job) -> None:
    losses: list[list[float]] = []
    norms: list[list[float]] = []
    for job in (plain, fp16):
        state = job.initial_state()
        losses.append([])
        norms.append([])
        for step in range(6):
            state, metrics = step_of(job, state, step)
            losses[-1].append(float(jax.device_get(metrics["loss"])))
            norms[-1].append(float(jax.device_get(metrics["grad_norm"])))
        assert int(jax.device_get(metrics["skipped"])) == 0
    np.testing.assert_allclose(losses[0], losses[1], rtol=3e-3)
    # What is clipped is the gradient itself, not the scaled one.
    np.testing.assert_allclose(norms[0], norms[1], rtol=3e-2)
    # It grew after three good steps, twice.
    assert float(jax.device_get(state.guard.loss_scale)) == 65536.0 * 2**2
    assert "loss_scale" not in step_of(plain, plain.initial_state(), 0)[1]


def test_scale_and_count_survive_a_checkpoint(fp16: Job, tmp_path: Path) -> None:
    state, _ = step_of(fp16, fp16.initial_state(), 0)
    state, _ = step_of(fp16, with_nan(state), 1)
    with contextlib.closing(tjx_ckpt.Checkpointer(tmp_path)) as checkpointer:
        checkpointer.save(2, state)
        checkpointer.wait()
        restored = checkpointer.restore(fp16.abstract)
    assert bits(restored) == bits(state)
    assert float(jax.device_get(restored.guard.loss_scale)) == 32768.0
    assert int(jax.device_get(restored.guard.skipped)) == 1


def test_norms_of_layers_are_those_of_the_model(plain: Job) -> None:
    state = plain.initial_state()
    params = jax.device_get(state.params)
    _, metrics = step_of(plain, state, 0)
    norms = jax.device_get(metrics["norms"])
    kernel = params["blocks"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(
        norms["parameter"]["blocks/mlp/up/kernel"],
        [np.linalg.norm(layer) for layer in kernel],
        rtol=1e-6,
    )
    parts = sum((np.square(each).sum()) for each in norms["gradient"].values())
    np.testing.assert_allclose(np.sqrt(parts), jax.device_get(metrics["grad_norm"]), rtol=1e-5)
    assert all((each > 0).all() for each in norms["update"].values())


def test_a_run_that_diverges_ends_and_names_the_last_good_checkpoint(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    flags = [
        # The first update makes parameters whose products are beyond float32.
        "--schedule.name=constant", "--guard.max_skipped=3",
        "--checkpoint.every=1", "--checkpoint.keep=9", "--log.every=100",
    ]  # fmt: skip

    rate = "--optimizer.learning_rate=1e25"
    assert program.main([*words, *flags, rate, f"--run_dir={run_dir}"]) == 3

    told = capsys.readouterr().err
    assert "not finite 3 steps in a row, up to step 4;" in told
    assert "restarting from step 1\n" in told
    assert f"the last good checkpoint is step 1 in {run_dir / 'checkpoints'};" in told
    # Each skipped step is logged, whatever the interval.
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    skipped = {r["step"]: r["train/skipped"] for r in records if "train/skipped" in r}
    assert skipped == {1: 0.0, 2: 1.0, 3: 2.0, 4: 3.0}
    with contextlib.closing(tjx_ckpt.Checkpointer(run_dir / "checkpoints")) as checkpointer:
        abstract = open_job(words, *flags, learning_rate="1e25").abstract
        last = checkpointer.restore(abstract)
        assert checkpointer.steps() == [1]  # nothing is saved in the midst of them
    assert int(jax.device_get(last.guard.skipped_in_a_row)) == 0


def path_of(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def test_evaluation_uses_the_averaged_parameters(words: list[str]) -> None:
    job = open_job(words, "--optimizer.ema_decay=0.5")
    state = job.initial_state()
    seen = []
    for step in range(3):
        state, _ = step_of(job, state, step)
        seen.append(jax.device_get(state.params["blocks"]["mlp"]["up"]["kernel"]))

    params = job.eval_params(state)

    mean = (0.25 * seen[0] + 0.5 * seen[1] + seen[2]) / 1.75
    np.testing.assert_allclose(
        jax.device_get(params["blocks"]["mlp"]["up"]["kernel"]), mean, rtol=1e-5, atol=1e-7
    )
    trained, average = job.evaluate(state.params), job.evaluate(params)
    assert trained.tokens == average.tokens
    assert abs(trained.loss_sum - average.loss_sum) > 1e-3 * trained.loss_sum


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_every_optimizer_trains_with_its_state_spread_as_the_parameters_are(
    words: list[str], name: str
) -> None:
    flags = [f"--optimizer.name={name}", "--mesh.data=1", "--mesh.fsdp=8"]
    config = resolve([*words, "--schedule.name=constant", *flags]).with_vocabulary(64)
    abstract = build_step_components(config, ALL_DEVICES).abstract
    params = {path_of(path): leaf for path, leaf in leaves_with_path(abstract.params)}
    seen = set()
    for path, leaf in leaves_with_path(abstract.opt_state):
        param = next((p for p in params if path_of(path).endswith(f"/{p}")), None)
        if param is not None and leaf.shape == params[param].shape:
            assert leaf.sharding == params[param].sharding
            seen.add(param)
    if name != "adafactor":  # whose matrices have factored moments, small ones whole
        assert seen == params.keys()
    assert not params["blocks/mlp/up/kernel"].sharding.is_fully_replicated


@pytest.mark.parametrize(
    "name", [pytest.param("muon", marks=pytest.mark.slow), "schedule_free_adamw"]
)
def test_an_optimizer_chosen_by_its_flag_learns(words: list[str], name: str) -> None:
    job = open_job(words, f"--optimizer.name={name}", "--schedule.name=constant")
    state = job.initial_state()
    before = job.evaluate(job.eval_params(state)).metrics()["loss"]
    for step in range(12):
        state, _ = step_of(job, state, step)
    assert job.evaluate(job.eval_params(state)).metrics()["loss"] < before - 0.1
