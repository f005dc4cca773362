"""Every tjx_nn model trains on a mesh as on one device; mistakes precede compilation."""

from types import SimpleNamespace

import jax
import pytest
from mesh_runs import Flags, assert_the_same_run, run

from tjx_core import ConfigError
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.tasks.registry import open_task
from tjx_trainer.training.build import build_job

SMALL: Flags = {"model.n_layer": 2}
LATENT: Flags = {
    "model.latent.kv_dim": 16, "model.latent.q_dim": 16, "model.latent.rope_dim": 8,
    "model.positions": "rope", "model.norm": "rmsnorm", "model.tied_head": "false",
}  # fmt: skip
ZOO: dict[str, Flags] = {
    "latent attention, experts and shared ones after a dense block": {
        **LATENT, "model.experts.count": 8, "model.experts.per_token": 2, "model.experts.shared": 1,
        "model.experts.d_ff": 32, "model.experts.first_layer": 1, "optimizer.learning_rate": 1e-3,
        "model.experts.scores": "sigmoid", "model.experts.choice_bias": "true",
        "model.experts.groups": 4, "model.experts.groups_per_token": 2,
        "model.multi_token_loss": 0.3,
    },
    "sparse attention, windows, one key head": {
        "model.sparse.top_k": 8, "model.n_kv_head": 1, "model.positions": "alibi",
        "model.window": 16, "model.global_every": 2, "model.qk_norm": "true",
        "optimizer.learning_rate": 1e-5,
    },
    "parallel blocks, scaled layers, soft caps": {
        "model.parallel_block": "true", "model.layer_scale": 0.1, "model.logit_soft_cap": 30,
        "model.attention_soft_cap": 50, "model.remat": "full", "model.scan_layers": "false",
        "model.attention_gate": 12, "model.embedding_skip": "true", "model.value_mix": "embedding",
    },
    "bert": {"config": "bert_base", "train.precision": "fp32", "model.d_ff": 64},
    "local and global attention on both sides": {
        "config": "bert_base", "train.precision": "fp32", "model.n_layer": 4, "model.d_ff": 64,
        "model.positions": "rope", "model.rope.local_base": 100, "model.norm_position": "pre",
        "model.first_norm": "false", "model.activation": "geglu_erf", "model.bias": "false",
        "model.logit_bias": "true", "model.window": 5, "model.symmetric_window": "true",
        "model.global_every": 3, "model.global_first": "true", "model.n_token_types": 0,
        "model.remat": "full",
    },
    "vit": {
        "config": "vit_mnist", "data.path": "images", "model.d_ff": 64, "train.precision": "fp32",
        "mesh.sequence_parallel": "false", "model.max_seq_len": None, "data.seq_len": None,
    },
    "vit with registers": {
        "config": "vit_mnist", "data.path": "images", "model.d_ff": 64, "train.precision": "fp32",
        "mesh.sequence_parallel": "false", "model.max_seq_len": None, "data.seq_len": None,
        "model.pool": "class_mean", "model.n_registers": 3, "model.layer_scale": 0.5,
    },
    "vit with a probe": {
        "config": "vit_mnist", "data.path": "images", "model.d_ff": 64, "train.precision": "fp32",
        "model.max_seq_len": None, "data.seq_len": None, "model.pool": "map",
    },
    "encoder_decoder": {
        "config": "seq2seq_toy", "data.seq_len": 31, "model.d_ff": 64, "model.vocab_size": 64,
        "model.relative_buckets": 8,
    },
}  # fmt: skip


# These divide nothing that the others do not divide.
NIGHTLY = (
    "bert",
    "local and global attention on both sides",
    "vit",
    "vit with registers",
    "vit with a probe",
    "parallel blocks, scaled layers, soft caps",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in NIGHTLY else name for name in ZOO],
)
def test_every_model_trains_on_a_mesh_as_on_one_device(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = {**SMALL, **ZOO[name]}
    assert_the_same_run(run(flags, {"fsdp": 2, "tensor": 2}), run(flags))
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--mesh.tensor 5", "mesh.tensor: got 5; expected a divisor of model.n_head=12"),
        ("--mesh.fsdp 5 --mesh.data 1 --train.batch_size 5", "a divisor of model.d_model=768"),
        ("--mesh.context 3", "of 6 with ring attention, and a row has 1024 tokens"),
        ("--mesh.stage 5", "n_layer: got 12; expected a multiple of 5 pipeline stages"),
        ("--mesh.stage 2 --train.accumulation 1", "expected at least mesh.stage=2 microbatches"),
        ("--mesh.expert 2", "mesh.expert: got 2; expected a divisor of model.experts.count=0"),
        ("--mesh.context 2 --model.attention_dropout 0.1", "give --mesh.context_kind all_to_all"),
        ("--mesh.context 8 --mesh.context_kind all_to_all", "give --mesh.context_kind ring"),
        ("--mesh.reduce_dtype bfloat16 --train.precision fp32", "give --train.precision bf16"),
        ("--mesh.stage 2 --train.precision fp8", "give --mesh.stage 1 or --train.precision bf16"),
        ("--model.float8 true", "model.float8: got True; expected False"),
        ("--mesh.rules mlp=node", "got 'mlp=node'; expected a row such as"),
    ],
)
def test_what_a_mesh_does_not_divide_is_reported_with_both_numbers(words: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(["--config=gpt2_small", *words.split()])
    assert told in str(caught.value)


def test_ring_attention_without_a_bias_of_scores_is_reported() -> None:
    words = ["--config=seq2seq_toy", "--mesh.context=2", "--model.relative_buckets=8"]
    with pytest.raises(
        ConfigError, match=r"got ring with model\.relative_buckets=8; expected all_to"
    ):
        resolve(words)


def test_checks_that_need_data_and_devices_precede_compilation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A start token precedes strings of 16 bytes: rows of 17.
    words = ["--config=seq2seq_toy", "--mesh.context=2", "--mesh.data=4", "--mesh.fsdp=1"]
    with pytest.raises(ValueError, match=r"mesh\.context: got 2; .* a row has 17 tokens"):
        build_job(*open_task(resolve(words)))
    devices = [SimpleNamespace(device_kind="a chip", addressable_memories=lambda: [])]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    with pytest.raises(
        ValueError, match="expected a device with pinned host memory, and a chip has"
    ):
        build_job(*open_task(resolve(["--config=seq2seq_toy", "--mesh.offload=optimizer"])))
