"""Equality of runs on all meshes, and the bytes they store and send."""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from mesh_runs import Flags, Run, assert_the_same_run, batch_of, build, bytes_by_path, run

import tjx_optim
import tjx_parallel
from tjx_parallel.planning.collectives import collectives
from tjx_trainer.training.build import StepComponents
from tjx_trainer.training.evaluation import make_eval_step

LLAMA: Flags = {
    "model.n_kv_head": 2, "model.d_ff": 64, "model.positions": "rope", "model.norm": "rmsnorm",
    "model.activation": "swiglu", "model.bias": "false",
}  # fmt: skip
# With a larger step, tokens change their experts for a last digit.
EXPERTS: Flags = {
    "model.experts.count": 4, "model.experts.capacity_factor": 1.0, "model.experts.d_ff": 32,
    "model.experts.balance_loss": 0.01, "optimizer.learning_rate": 1e-3,
    "model.experts.use_bias": "true", "model.attention_sinks": "true", "model.z_loss": 0.01,
}  # fmt: skip
GROUPS: Flags = {
    **EXPERTS, "model.experts.count": 8, "model.experts.scores": "sigmoid",
    "model.experts.choice_bias": "true", "model.experts.groups": 4,
    "model.experts.groups_per_token": 2,
}  # fmt: skip
# Chunks that documents and shards of tokens divide, and stacks of blocks in turn.
LLAMA4: Flags = {
    **EXPERTS, **LLAMA, "model.experts.every": 2, "model.experts.scale_inputs": "true",
    "model.window": 6, "model.chunked_window": "true", "model.qk_norm": "true",
    "model.qk_norm_position": "after_rope", "model.nope_every": 2, "model.nope_temperature": 0.5,
    "model.nope_temperature_length": 3,
}  # fmt: skip
FEATURES: Flags = {"model.dropout": 0.2}
# The same run on one device for two meshes.
DOCUMENTS: Flags = {**LLAMA, **FEATURES, "model.multi_token_loss": 0.3}
PARAMETER_HISTOGRAMS: Flags = {**FEATURES, "model.attention_dropout": 0.2}
CONTEXT: Flags = {"fsdp": 2, "context": 2, "tensor": 2}
WIDE: Flags = {"fsdp": 2, "tensor": 4}
STAGED: Flags = {"stage": 2, "pipeline": "interleaved_1f1b", "fsdp": 2, "tensor": 2}
PIPELINE: Flags = {"train.accumulation": 4, "model.z_loss": 0.01}


@pytest.fixture
def compiler_output(capfd: pytest.CaptureFixture[str]) -> Any:
    """Fail if the compiler replicates an array between two shardings."""
    yield
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


def nightly(*case: Flags) -> Any:
    """Mark a mesh whose features the other cases have too, in other combinations."""
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.usefixtures("compiler_output")
@pytest.mark.parametrize(
    ("flags", "mesh"),
    [
        ({}, {"data": 2, "fsdp": 2, "tensor": 2}),
        ({}, {"data": 2, "fsdp": 4, "zero": 1}),
        nightly({}, {"data": 2, "fsdp": 4, "zero": 2}),
        (DOCUMENTS, {**WIDE, "sequence_parallel": "false", "offload": "optimizer"}),
        (DOCUMENTS, CONTEXT),
        nightly({**LLAMA, **PARAMETER_HISTOGRAMS}, {**CONTEXT, "context_kind": "all_to_all"}),
        (EXPERTS, {"expert": 2, "context": 2, "tensor": 2}),
        nightly(GROUPS, {"expert": 2, "fsdp": 2, "tensor": 2}),
        nightly(LLAMA4, {"expert": 2, "context": 2, "fsdp": 2}),
        nightly(PIPELINE, {"stage": 4, "data": 2, "pipeline": "gpipe"}),
        nightly(PIPELINE, {"stage": 2, "fsdp": 2, "tensor": 2}),
        ({**PIPELINE, **FEATURES}, STAGED),
        nightly({**PIPELINE, **EXPERTS, **LLAMA}, {"stage": 2, "context": 2, "expert": 2}),
    ],
    ids=lambda value: "-".join(f"{n.split('.')[-1]}={v}" for n, v in value.items())[:70],
)
def test_every_mesh_trains_as_one_device_does(flags: Flags, mesh: Flags) -> None:
    # Packed documents where the mesh divides tokens: none may see another's.
    packed = "context" in mesh or "offload" in mesh
    assert_the_same_run(run(flags, mesh, packed=packed), run(flags, packed=packed))


ALL_AT_ONCE = """
from mesh_runs import assert_the_same_run, run
from test_trainer_meshes import EXPERTS, LLAMA, PIPELINE
flags = {**PIPELINE, **EXPERTS, **LLAMA}
mesh = {"stage": 2, "fsdp": 2, "context": 2, "expert": 2, "tensor": 2}
assert_the_same_run(run(flags, mesh, packed=True), run(flags, packed=True))
print("the same run")
"""


@pytest.mark.slow
def test_all_axes_at_once_train_as_one_device_does() -> None:
    found = subprocess.run(
        [sys.executable, "-c", ALL_AT_ONCE],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_NUM_CPU_DEVICES": "32"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.splitlines()[-1:] == ["the same run"], found.stderr
    assert "Involuntary full rematerialization" not in found.stderr


def test_evaluation_goes_through_the_stages_too() -> None:
    flags = {**PIPELINE, **FEATURES}
    staged, alone = run(flags, STAGED), run(flags)
    sums = []
    for found in (staged, alone):
        batch = tjx_parallel.shard_batch(found.parts.mesh, batch_of(found.config, 5, packed=False))

        def through(params: Any, batch: Any, parts: StepComponents = found.parts) -> Any:
            microbatches = tjx_optim.split_microbatches(batch, parts.accumulation)
            return parts.gradients(params, microbatches, None, None)

        step = make_eval_step(
            found.config.model,
            layout=found.parts.layout,
            pipeline_means=through if found is staged else None,
        )
        zero = step.start(found.state.params)
        jitted: Any = step.add
        compiled = jitted.lower(zero, found.state.params, batch).compile()
        of_one = compiled(zero, found.state.params, batch)
        of_two = compiled(of_one, found.state.params, batch)  # sums lie where they are expected
        sums.append((of_one.on_host(), of_two.on_host()))
        exchanges = collectives(compiled.as_text(), found.parts.mesh.shape)
        # No stage gathers the layers of another, and nothing of a gradient is left to be summed.
        for each in exchanges:
            gathers = each.kind == "all-gather" and "stage" in each.axes
            sums_up = each.kind in ("all-reduce", "reduce-scatter") and "fsdp" in each.axes
            assert not (gathers or sums_up) or each.payload < 1024, each
    for one, other in zip(*sums, strict=True):
        np.testing.assert_allclose(one.loss_sum, other.loss_sum, rtol=1e-5)
        assert one.tokens == other.tokens
    np.testing.assert_allclose(sums[0][1].loss_sum, 2 * sums[0][0].loss_sum, rtol=1e-7)


def test_fsdp_shards_by_zero_stage() -> None:
    path = "blocks/mlp/up/kernel"
    whole = 4 * 4 * 32 * 128  # float32 x layers x d_model x d_ff
    for parts, state in (
        (1, run({}, {"data": 2, "fsdp": 4, "zero": 1}).state),
        (1, build({}, {"data": 2, "fsdp": 4, "zero": 2})[1].abstract),
        (4, run({}, {"data": 2, "fsdp": 2, "tensor": 2}).state),
    ):
        assert bytes_by_path(state.params)[path] == {whole // parts}
        moments = bytes_by_path(state.opt_state, lambda name: name.endswith(path))
        assert list(moments.values()) == [{whole // 4}] * 2


def test_each_axis_shards_the_axes_of_its_row() -> None:
    decoder = run(DOCUMENTS, CONTEXT, packed=True)
    bytes_of = bytes_by_path(decoder.state.params)
    assert bytes_of["blocks/attention/query/kernel"] == {4 * 4 * 32 * 32 // 4}
    assert bytes_of["blocks/attention/key/kernel"] == {4 * 4 * 32 * 16 // 4}
    assert bytes_of["blocks/mlp/down/kernel"] == {4 * 4 * 64 * 32 // 4}
    assert bytes_of["blocks/ln_1/scale"] == {4 * 4 * 32 // 2}
    assert bytes_of["wte/embedding"] == {4 * 64 * 32 // 4}
    staged = bytes_by_path(run({**PIPELINE, **FEATURES}, STAGED).state.params)
    assert staged["blocks/mlp/up/kernel"] == {4 * 4 * 32 * 128 // 8}
    routed = run(EXPERTS, {"expert": 2, "context": 2, "tensor": 2}, packed=True)
    experts = bytes_by_path(routed.state.params)
    assert experts["blocks/mlp/up/kernel"] == {4 * 4 * 4 * 32 * 32 // 4}


def test_nothing_larger_than_a_layer_s_weight_or_a_table_is_gathered() -> None:
    found = run({}, {"data": 2, "fsdp": 2, "tensor": 2})
    exchanges = collectives(found.program.as_text(), found.parts.mesh.shape)
    all_gathered = [each for each in exchanges if each.kind == "all-gather"]
    # float32: a layer's MLP, the table of tokens, a device's part of the residual stream.
    largest = 4 * max(32 * 128 // 2, 64 * 32 // 2, 16 * 32 * 32 // 4)
    assert all_gathered
    assert max(each.payload for each in all_gathered) <= largest, all_gathered


def sent(found: Run) -> dict[str, float]:
    """Return the bytes that a device sends in a step, in float32 gradients of the model."""
    exchanges = collectives(found.program.as_text(), found.parts.mesh.shape)
    whole = 4 * sum(each.size for each in found.initial.values())
    total = dict.fromkeys(("all-reduce", "reduce-scatter", "all-gather"), 0.0)
    for each in exchanges:
        total[each.kind] += each.wire_bytes / whole
    return total


def test_collective_bytes_match_theory() -> None:
    # In rings of n devices a reduce-scatter or an all-gather sends (n - 1) / n of the whole.
    data = sent(run({}, {"data": 8}))
    assert data["all-reduce"] == pytest.approx(2 * 7 / 8, rel=0.05)
    assert data["all-gather"] == data["reduce-scatter"] == 0
    # ZeRO-1: gradients are scattered over fsdp and the parts summed over data; then parameters,
    # each of which a device has updated a part of, are gathered.
    zero = sent(run({}, {"data": 2, "fsdp": 4, "zero": 1}))
    assert zero["reduce-scatter"] + zero["all-reduce"] == pytest.approx(3 / 4 + 1 / 4, rel=0.05)
    assert zero["all-gather"] == pytest.approx(3 / 4, rel=0.05)
