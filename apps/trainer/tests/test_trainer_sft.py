"""Supervised fine-tuning on conversations, low-rank adapters and distillation of a trained run."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from job_runs import last_state, life
from mesh_runs import Flags, assert_the_same_run, run
from one_device import one_device  # noqa: F401

import tjx_nn
import tjx_optim
from tjx_data import (
    CHAT_TOKENS,
    ChatTemplate,
    ConversationLoader,
    EncodedConversations,
    byte_tokenizer,
    encode_conversation,
    parse_conversation,
)
from tjx_nn.layout import SINGLE_DEVICE
from tjx_nn.models.gpt_config import GPTConfig
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.config.config_compat import incompatible_changes
from tjx_trainer.distillation.teacher import describe_model
from tjx_trainer.run_reader import SavedRun
from tjx_trainer.runtime.memory_report import measure
from tjx_trainer.tasks.registry import open_task
from tjx_trainer.tasks.sft import SFTTask
from tjx_trainer.tasks.task import DataShard
from tjx_trainer.training.build import Job, build_job, build_step_components
from tjx_trainer.training.pretrained import load_pretrained, pretrained_params
from tjx_trainer.training.train_step import make_loss_sum

TINY = """
--task=sft --model.n_layer=2 --model.n_head=2 --model.d_model=16 --model.max_seq_len=64
--data.seq_len=64 --data.holdout_fraction=0.2 --train.max_steps=6 --train.batch_size=8
--train.eval_every=3 --train.sample_tokens=3 --train.sample_prompt=1+1? --log.every=1
--optimizer.learning_rate=1e-2 --schedule.warmup_steps=0 --checkpoint.every=100
""".split()  # noqa: SIM905  a list of words reads worse
LOW_RANK = """
--lora.rank=2 --lora.targets=attention.*,mlp.up --lora.base_dtype=int8 --checkpoint.every=3
""".split()  # noqa: SIM905  a list of words reads worse


def conversations(n: int) -> list[dict[str, Any]]:
    """Return records of one or two questions of several lengths."""
    records = []
    for i in range(n):
        turns = [
            {"role": "user", "content": f"{i}+1?"},
            {"role": "assistant", "content": f"{i}" * (1 + i % 5)},
        ]
        records.append({"messages": turns * (1 + i % 2)})
    return records


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    file.write_text("\n".join(map(json.dumps, conversations(24))))
    return [*TINY, f"--data.path={file}"]


@pytest.fixture(scope="module")
def trained(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a finished run without adapters."""
    path = tmp_path_factory.mktemp("runs") / "base"
    job = build_job(*open_task(resolve([*flags, "--data.tokenizer=byte"])))
    assert life(job, path) == 0
    write_config(job, path)
    return path


def write_config(job: Job, path: Path) -> None:
    """Write what `train` writes before `run_job`."""
    from tjx_trainer.runtime.run_dir import RunDirectory

    RunDirectory(path).write_config(job.config)
    job.task.record(RunDirectory(path))


@cache
def loss_and_gradients() -> Any:
    config = resolve([*TINY, "--data.path=x", "--data.tokenizer=byte", "--model.vocab_size=262"])
    loss_sum = make_loss_sum(config, SINGLE_DEVICE)
    params = jax.jit(lambda: tjx_nn.init(config.model, jax.random.key(0)))()

    @jax.jit
    def compute(batch: Any) -> Any:
        microbatches = tjx_optim.split_microbatches(batch, 1)
        return tjx_optim.accumulate_gradients(loss_sum, params, microbatches)

    return lambda batch: jax.device_get(compute(jax.device_put(batch)))


def test_packed_conversations_equal_unpacked_ones_in_loss_and_gradients() -> None:
    tokenizer = byte_tokenizer(("<|endoftext|>", *CHAT_TOKENS))
    template = ChatTemplate.built_in("tjx", tokenizer)
    encoded = [
        encode_conversation(template, tokenizer, parse_conversation(each))
        for each in conversations(8)
    ]
    loader = ConversationLoader(EncodedConversations.of(encoded), seq_len=64, batch_size=1, seed=3)
    n_rows = loader.rows_per_epoch
    assert n_rows < 8
    rows = loader.rows(np.arange(n_rows))
    packed = {name: np.zeros((8, 64), np.int32) for name in rows}
    packed["labels"][:] = -100
    for name, values in rows.items():
        packed[name][:n_rows] = values
    separate = {"tokens": np.zeros((8, 64), np.int32), "labels": np.full((8, 64), -100, np.int32)}
    for row, (tokens, is_answer) in enumerate(encoded):
        separate["tokens"][row, : len(tokens) - 1] = tokens[:-1]
        separate["labels"][row, : len(tokens) - 1] = np.where(is_answer, tokens, -100)[1:]
    one, other = loss_and_gradients()(packed), loss_and_gradients()(separate)
    assert one.token_count == other.token_count == sum(each.is_answer.sum() for each in encoded)
    np.testing.assert_allclose(one.loss, other.loss, rtol=0, atol=1e-6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6),
        one.gradients, other.gradients,
    )  # fmt: skip


@cache
def hidden_gradients() -> Any:
    model = GPTConfig(n_layer=1, n_head=2, d_model=8, max_seq_len=32, vocab_size=262)
    params = jax.jit(lambda: tjx_nn.init(model, jax.random.key(0)))()

    @jax.jit
    def compute(hidden: Any, labels: Any) -> Any:
        network = tjx_nn.bind(model, params)
        return jax.grad(lambda x: network.token_losses(x, labels)[0].sum())(hidden)

    return lambda *arguments: jax.device_get(compute(*jax.device_put(arguments)))


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.text("ab", min_size=1, max_size=3),
                       st.text("xyz", min_size=1, max_size=4)), min_size=1, max_size=4),
    st.sampled_from(["tjx", "plain"]),
    st.integers(0, 99),
)  # fmt: skip
def test_no_token_outside_of_answers_gets_a_gradient(
    turns: list[tuple[str, str]], name: str, seed: int
) -> None:
    tokenizer = byte_tokenizer(("<|endoftext|>", *CHAT_TOKENS))
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    encoded = encode_conversation(
        ChatTemplate.built_in(name, tokenizer),
        tokenizer,
        parse_conversation({"messages": messages}),
    )
    cut = encoded._replace(tokens=encoded.tokens[-33:], is_answer=encoded.is_answer[-33:])
    loader = ConversationLoader(EncodedConversations.of([cut]), seq_len=32, batch_size=1)
    batch = loader.batch(0)
    hidden = np.random.default_rng(seed).standard_normal((1, 32, 8)).astype(np.float32)
    found = np.abs(hidden_gradients()(hidden, batch["labels"])).max(axis=(0, 2)) > 0
    # The position before a token predicts it.
    n = len(cut.tokens) - 1
    assert found[:n].tolist() == cut.is_answer[1:].tolist()
    assert not found[n:].any()
    # The answers have the bytes of the assistant's texts and the tokens that end them.
    text = tokenizer.decode(encoded.tokens[encoded.is_answer])
    end = {"tjx": "<|end|>", "plain": "<|endoftext|>"}[name]
    space = {"tjx": "", "plain": " "}[name]
    assert text == "".join(f"{space}{answer}{end}" for _, answer in turns)


def test_adapters_resume_bit_for_bit_and_the_base_does_not_change(
    flags: list[str], trained: Path, tmp_path: Path
) -> None:
    kept = [word for word in flags if not word.startswith("--checkpoint.every")]
    config = resolve([*kept, *LOW_RANK, f"--train.init_from={trained}"])
    job = build_job(*open_task(config))
    assert isinstance(job.task, SFTTask)
    assert life(job, tmp_path / "whole") == 0
    assert life(job, tmp_path / "halves", end=4) == 143
    assert life(job, tmp_path / "halves") == 0
    whole = last_state(job, tmp_path / "whole", 6)
    assert last_state(job, tmp_path / "halves", 6) == whole

    before = jax.device_get(job.initial_state())
    leaves = jax.tree_util.tree_leaves_with_path(before)
    first = {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
    base = [path for path in whole if path.startswith(".base")]
    axes = tjx_nn.lora.base_axes(job.config.model, job.config.lora)
    assert len(base) == len(jax.tree.leaves(axes, is_leaf=is_axes))
    assert sum(path.endswith(".values") for path in base) == 6
    assert all(whole[path] == first[path] for path in base)
    adapters = [path for path in whole if path.startswith(".params")]
    assert len(adapters) == 2 * 5
    assert all(whole[path] != first[path] for path in adapters)

    # Another program reads merged parameters: those of evaluations.
    write_config(job, tmp_path / "whole")
    saved = SavedRun(tmp_path / "whole")
    merged, step = saved.load_params(job.mesh)
    assert step == 6
    kernels = jax.device_get(merged)["blocks"]["mlp"]
    int8 = before.base["blocks"]["mlp"]
    changed = [
        not np.array_equal(kernels[name]["kernel"], int8[name]["kernel"].astype(np.float32))
        for name in ("up", "down")
    ]
    assert changed == [True, False]
    metrics = job.evaluate(merged).metrics()
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    logged = [line["eval/loss"] for line in map(json.loads, lines) if "eval/loss" in line]
    assert metrics["loss"] == pytest.approx(logged[-1], abs=1e-6)
    assert logged[-1] < logged[0]
    # Another run starts from the merged parameters.
    train = replace(config.train, init_from=str(tmp_path / "whole"))
    again = replace(job.config, train=train)
    with jax.transfer_guard("allow"):
        jax.tree.map(
            np.testing.assert_array_equal, pretrained_params(again), jax.device_get(merged)
        )


def is_axes(node: Any) -> bool:
    return isinstance(node, tuple)


LORA: Flags = {"lora.rank": 2, "lora.dora": "true", "optimizer.learning_rate": 1e-2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base_dtype", "bound"), [("float32", 5e-6), ("int8", 5e-5), ("int4", 5e-5)]
)
def test_adapters_on_a_mesh_train_as_on_one_device(base_dtype: str, bound: float) -> None:
    """On CPUs inputs of int8 kernels are rounded, which amplifies differences of the last bit."""
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    flags = {**LORA, "lora.base_dtype": base_dtype}
    found, expected = run(flags, mesh, packed=True), run(flags, packed=True)
    # The magnitudes of DoRA are norms, summed in another order on a mesh.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found.initial, expected.initial
    )
    assert_the_same_run(found._replace(initial=expected.initial), expected, bound=bound)


DISTILL = """
--model.n_layer=1 --model.d_model=8 --train.batch_size=16 --train.accumulation=2
--checkpoint.every=3 --distill.temperature=2 --distill.weight=0.7 --model.z_loss=0.01
--model.multi_token_loss=0.1
""".split()  # noqa: SIM905  a list of words reads worse


@pytest.fixture(scope="module")
def distilled(flags: list[str], trained: Path) -> Job:
    names = {word.split("=")[0] for word in DISTILL}
    kept = [word for word in flags if word.split("=")[0] not in names]
    of_teacher = ["--data.tokenizer=byte", f"--distill.teacher={trained}"]
    return build_job(*open_task(resolve([*kept, *DISTILL, *of_teacher])))


@pytest.mark.key_reuse
def test_distillation_resumes_bit_for_bit_with_the_same_teacher(
    distilled: Job, trained: Path, tmp_path: Path
) -> None:
    job, whole, halves = distilled, tmp_path / "whole", tmp_path / "halves"
    assert life(job, whole) == 0
    assert life(job, halves, end=4) == 143
    assert life(job, halves) == 0
    expected = last_state(job, whole, 6)
    assert last_state(job, halves, 6) == expected
    # A checkpoint has the student only, and config.yaml the digest of the teacher.
    assert not any("teacher" in path for path in expected)
    n_params = len(jax.tree.leaves(job.abstract.params))
    assert sum(path.startswith(".params") for path in expected) == n_params
    write_config(job, whole)
    saved = SavedRun(whole).config
    digest = saved.distill.teacher_sha256
    assert digest is not None
    assert len(digest) == 64
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    found = [line for line in map(json.loads, lines) if "train/teacher_kl" in line]
    assert found[-1]["train/teacher_kl"] < found[0]["train/teacher_kl"]
    assert found[0]["train/z_loss"] > 0
    assert found[0]["train/multi_token_loss"] > 1
    assert found[0]["train/loss"] == pytest.approx(
        0.3 * found[0]["train/cross_entropy"] + 0.7 * 4 * found[0]["train/teacher_kl"]
    )
    # The same command resumes; another teacher is another run.
    wanted = replace(saved, distill=replace(saved.distill, teacher_sha256=None))
    assert not incompatible_changes(saved, wanted, steps_done=6)
    changes: list[Any] = [{"teacher_sha256": "0" * 64}, {"teacher": str(tmp_path)}]
    for change in changes:
        other = replace(saved, distill=replace(saved.distill, **change))
        (line,) = incompatible_changes(saved, other, steps_done=6)
        assert line.startswith(f"distill.{next(iter(change))}: got")
    wrong = replace(saved, distill=replace(saved.distill, teacher_sha256="0" * 64))
    with pytest.raises(ValueError, match=f"got {trained} with the SHA-256 {digest}; expected 0000"):
        open_task(wrong)


def test_the_digest_of_a_teacher_has_no_default_values() -> None:
    """So it stays the same when a later version adds a field to the configuration."""
    model = GPTConfig(n_layer=3, rope=tjx_nn.RopeConfig(base=5.0))
    assert describe_model(model) == """[("['n_layer']", 3), ("['rope']['base']", 5.0)]"""
    assert describe_model(GPTConfig()) == "[]"


def test_the_trainer_minimizes_the_loss_of_distillation(distilled: Job, trained: Path) -> None:
    job, state = distilled, distilled.initial_state()
    assert job.complete_batch is not None
    rows = job.task.train_data.batch(0)
    batch, _ = job.complete_batch(0, rows, state)
    config, params = load_pretrained(str(trained))
    inputs = {name: rows[name] for name in ("tokens", "positions", "segment_ids")}
    labels = rows["labels"]

    @jax.jit
    def logits(student: Any, teacher: Any, inputs: Any) -> Any:
        models = tjx_nn.bind(job.config.model, student), tjx_nn.bind(config, teacher)
        return tuple(model(**inputs) for model in models)

    # In float64, from all logits.
    on_device = jax.device_put((jax.device_get(state.params), params, inputs))
    found: Any = jax.device_get(logits(*on_device))
    z, y = (np.asarray(each, np.float64) for each in found)
    log_p, log_q, log_1 = (
        each - np.log(np.exp(each).sum(-1, keepdims=True)) for each in (z / 2, y / 2, z)
    )
    mask = labels >= 0
    kl = (np.exp(log_q) * (log_q - log_p)).sum(-1)[mask].mean()
    picked = np.take_along_axis(log_1, np.maximum(labels, 0)[..., None], -1)[..., 0]
    cross_entropy = -picked[mask].mean()

    @jax.jit
    def gradient(student: Any, teacher: Any, inputs: Any, labels: Any) -> Any:
        def loss(student: Any) -> Any:
            z, y = logits(student, teacher, inputs)
            log_p, log_q = jax.nn.log_softmax(z / 2), jax.nn.log_softmax(y / 2)
            kl = (jnp.exp(log_q) * (log_q - log_p)).sum(-1)
            mask = labels >= 0
            losses = 0.3 * tjx_nn.cross_entropy(z, labels) + 0.7 * 4 * kl
            losses += 0.01 * jnp.square(jax.nn.logsumexp(z, -1))
            model = tjx_nn.bind(job.config.model, student)
            second = model.losses(**inputs, labels=labels).aux_losses["multi_token_loss"]
            return jnp.where(mask, losses, 0).sum() / mask.sum() + 0.1 * second

        return jax.grad(loss)(student)

    expected = jax.device_get(gradient(*on_device, *jax.device_put([labels])))
    norm = np.sqrt(sum(np.vdot(g, g) for g in jax.tree.leaves(expected)))
    _, metrics = job.train_step(state, batch)
    found = jax.device_get(metrics)
    np.testing.assert_allclose(found["teacher_kl"], kl, rtol=1e-4)
    np.testing.assert_allclose(found["cross_entropy"], cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(found["loss"], 0.3 * cross_entropy + 0.7 * 4 * kl, rtol=1e-5)
    np.testing.assert_allclose(found["grad_norm"], norm, rtol=1e-4)
    assert measure(job, strict=True).params > measure(replace(job, teacher=None)).params


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.seq_len=65", "--model.max_seq_len=65"], "at most 64, the max_seq_len of distill"),
        (["--data.tokenizer=OTHER"], "with the tokenizer .* give --data.tokenizer"),
        (["--model.vocab_size=300", "--model.tokenizer_size=280"], "a vocabulary of 262; expected"),
        (["--distill.teacher=EMPTY"], "got a run without a checkpoint"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(
    more: list[str], message: str, flags: list[str], trained: Path, tmp_path: Path
) -> None:
    words = [*flags, "--data.tokenizer=byte", f"--distill.teacher={trained}"]
    if "EMPTY" in more[0]:
        write_config(build_job(*open_task(resolve(words[:-1]))), tmp_path)
    byte_tokenizer(("<|endoftext|>", *CHAT_TOKENS, "<|new|>")).save(tmp_path / "other.json")
    changed = [
        word.replace("OTHER", str(tmp_path / "other.json")).replace("EMPTY", str(tmp_path))
        for word in more
    ]
    names = {word.split("=")[0] for word in more}
    kept = [word for word in words if word.split("=")[0] not in names]
    with pytest.raises(ValueError, match=message):
        open_task(resolve([*kept, *changed]))


@pytest.mark.slow
def test_distillation_on_a_mesh_trains_as_on_one_device(tmp_path: Path) -> None:
    model = GPTConfig(n_layer=2, n_head=2, d_model=16, max_seq_len=32, vocab_size=64)
    with jax.transfer_guard("allow"):
        params = jax.jit(lambda: tjx_nn.init(model, jax.random.key(1)))()
        tjx_nn.hf.save(tmp_path, model, jax.device_get(params))
    flags: Flags = {"distill.teacher": tmp_path, "distill.temperature": 2}
    expected = run(flags, packed=True)
    for mesh in ({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "context": 2}):
        assert_the_same_run(run(flags, mesh, packed=True), expected)


def test_optimizer_state_of_gpt2_small_adapters_is_small() -> None:
    def size(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    flags = ["--config=gpt2_small", "--mesh.data=1", "--train.batch_size=1"]
    lora = "--lora.rank=8"
    full, low, int8, bfloat16 = (
        build_step_components(resolve([*flags, *more]), jax.devices()[:1]).abstract
        for more in (
            [],
            [lora],
            [lora, "--lora.base_dtype=int8"],
            [lora, "--lora.base_dtype=bfloat16"],
        )
    )
    assert size(low.params) + size(low.opt_state) <= 0.03 * size(full.opt_state)
    assert size(low.base) == size(full.params)
    assert size(bfloat16.base) == size(full.params) / 2
    n_weights = 12 * 12 * 768**2  # of the kernels in blocks, 3 bytes less each
    assert size(full.params) - size(int8.base) == pytest.approx(3 * n_weights, rel=1e-2)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        (["--task=sft", "--data.tokenizer=byte"], r"data\.path: got none with task sft"),
        (["--task=sft", "--data.path=x"], r"data\.tokenizer: got bpe with task sft"),
        (["--task=sft", "--data.path=x", "--data.tokenizer=byte", "--data.packing=documents"],
         r"data\.packing: got documents with task sft, which ignores it"),
        (["--task=sft", "--data.path=x", "--data.tokenizer=byte", "--model.family=bert"],
         r"model\.family: got bert with task sft; expected gpt"),
        (["--task=stf"], "task: got 'stf'.*sft"),
        (["--chat.turns=last"], "chat: got one with task none; expected --task sft"),
        (["--chat.truncation=cut"], r"chat\.truncation: got 'cut'"),
        (["--lora.alpha=8"], r"lora\.alpha: got one without lora\.rank"),
        (["--lora.rank=0"], r"rank: got 0"),
        (["--lora.rank=2", "--train.reproducible=mesh"], r"train\.reproducible: got mesh with"),
        (["--lora.rank=2", "--mesh.stage=2"], r"mesh\.stage: got 2 with lora\.rank 2; expected 1"),
        (["--lora.rank=2", "--model.mup_base=64"], r"model\.mup_base: got 64 with lora"),
        (["--distill.weight=0.2"], r"distill\.weight: got one without teacher; expected both"),
        (["--distill.teacher=x", "--distill.weight=0"], r"distill\.weight: got 0\.0; expected abo"),
        (["--distill.teacher=x", "--distill.temperature=0"], r"distill\.temperature: got 0\.0"),
        (["--distill.teacher=x", "--mesh.stage=2"], r"mesh\.stage: got 2 with distill\.teacher"),
        (["--distill.teacher=x", "--task=dpo"], "task: got dpo with distill"),
        (["--distill.teacher=x", "--model.family=bert"], r"model\.family: got bert with distill"),
    ],
)  # fmt: skip
def test_contradictions_are_reported_before_jax_is_imported(
    given_: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(given_)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora.rank=2", "--lora.targets=wte"], r"lora\.targets: got wte; expected patterns"),
        (["--data.seq_len=8"], r"data\.seq_len: got 8; .* conversations are longer"),
        (["--chat.template=missing"], "template: got missing; expected a Jinja file"),
        (["--train.init_from=EMPTY"], "without a checkpoint"),
    ],
)
def test_data_that_do_not_fit_are_refused(
    more: list[str], message: str, flags: list[str], tmp_path: Path
) -> None:
    if more[0].endswith("EMPTY"):
        write_empty = build_job(*open_task(resolve([*flags, "--data.tokenizer=byte"])))
        write_config(write_empty, tmp_path)
        more = [f"--train.init_from={tmp_path}"]
    names = {word.split("=")[0] for word in more}
    kept = [word for word in flags if word.split("=")[0] not in names]
    with pytest.raises(ValueError, match=message):
        build_job(*open_task(resolve([*kept, "--data.tokenizer=byte", *more])))


def test_samples_answer_a_message_of_the_user(flags: list[str]) -> None:
    config, make_task = open_task(resolve([*flags, "--data.tokenizer=byte"]))
    task = make_task(DataShard(8, 8, 0, 1))
    with jax.transfer_guard("allow"):
        params = tjx_nn.init(config.model, jax.random.key(0))
        sample = task.sample(params)
    assert sample is not None
    assert sample.startswith("> 1+1?\n")
    assert "template tjx" in task.data_summary
