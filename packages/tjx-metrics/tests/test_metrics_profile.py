"""Profiles: readable by Perfetto and XProf, with the time by kind of operation."""

import gzip
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tjx_metrics import ProfileConfig, Profiler, profile_report
from tjx_metrics.profiling.hlo import KINDS, instructions
from tjx_metrics.profiling.trace_events import read_events

# Shortened HLO text of a GPU program.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused_product (p0: f32[8,8], p1: f32[8,8]) -> f32[8,8] {
  %p0 = f32[8,8]{1,0} parameter(0)
  %p1 = f32[8,8]{1,0} parameter(1)
  %dot.1 = f32[8,8]{1,0} dot(%p0, %p1), metadata={op_name="jit(step)/jvp(mlp)/dot_general"}
  ROOT %tanh.1 = f32[8,8]{1,0} tanh(%dot.1), metadata={op_name="jit(step)/jvp(mlp)/tanh"}
}

%fused_sum (p2: f32[8,8]) -> f32[8,8] {
  %p2 = f32[8,8]{1,0} parameter(0)
  ROOT %add.1 = f32[8,8]{1,0} add(%p2, %p2), metadata={op_name="jit(step)/add"}
}

ENTRY %main (w: f32[8,8]) -> f32[8,8] {
  %w = f32[8,8]{1,0} parameter(0)
  %loop = (s32[], f32[8,8]{1,0}) while(%w), condition=%c, body=%b
  %gemm_fusion.2 = f32[8,8]{1,0} fusion(%w, %w), kind=kCustom, calls=%fused_product
  %cublas.3 = (f32[8,8]{1,0}, s8[4]{0}) custom-call(%w), custom_call_target="__cublas$gemm"
  %cudnn.4 = bf16[8,8]{1,0} custom-call(%w), custom_call_target="__cudnn$fmhaSoftmax"
  %kernel.5 = f32[8,8]{1,0} custom-call(%w), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(step)/transpose(jvp(attention))/pallas_call"}
  %head.6 = f32[8,8]{1,0} dot(%w, %w), metadata={op_name="jit(step)/jvp(loss)/dot_general"}
  %all-reduce-start.7 = f32[8,8]{1,0} all-reduce-start(%w), \
metadata={op_name="jit(step)/optimizer/psum"}
  %update.8 = f32[8,8]{1,0} fusion(%w), kind=kLoop, calls=%fused_sum, \
metadata={op_name="jit(step)/optimizer/sub"}
  %not_loss.9 = f32[8,8]{1,0} negate(%w), metadata={op_name="jit(step)/jit(lossless)/neg"}
  ROOT %loop_add_fusion.10 = f32[8,8]{1,0} fusion(%w), kind=kLoop, calls=%fused_sum
}
"""


def test_instructions_are_classified_by_scope_or_opcode() -> None:
    module, found = instructions(PROGRAM)
    assert module == "jit_step"
    assert {name: found[name].kind for name in found if "." in name and "1" not in name} == {
        "gemm_fusion.2": "matmul",
        "cublas.3": "matmul",
        "cudnn.4": "attention",
        "kernel.5": "attention",
        "head.6": "loss",
        "all-reduce-start.7": "communication",
        "update.8": "optimizer",
        "not_loss.9": "other",
    }
    assert found["loop_add_fusion.10"].kind == "other"
    assert found["kernel.5"].source == "jit(step)/transpose(jvp(attention))/pallas_call"


def xspace(lines: dict[str, list[tuple[str, int, int, str]]], plane: str) -> bytes:
    """Write a trace: by line (kernel, start in ns, duration in ns, instruction or "")."""
    names = sorted({event[0] for events in lines.values() for event in events})
    written = []
    for number, (line, events) in enumerate(lines.items()):
        shown = []
        for kernel, begin, length, instruction in events:
            stats = "".join(
                f'stats {{ metadata_id: {i} str_value: "{value}" }} '
                for i, value in ((1, instruction), (2, instruction and "jit_step"))
                if value
            )
            shown.append(
                f"events {{ metadata_id: {names.index(kernel) + 1} offset_ps: {begin * 1000} "
                f"duration_ps: {length * 1000} {stats} }}"
            )
        written.append(f'lines {{ id: {number} name: "{line}" {" ".join(shown)} }}')
    metadata = [
        f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}'
        for i, name in enumerate(names, 1)
    ] + [
        f'stat_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}'
        for i, name in enumerate(("hlo_op", "hlo_module"), 1)
    ]
    text = f'planes {{ name: "{plane}" {" ".join(written + metadata)} }}'
    data: bytes = jax.profiler.ProfileData.text_proto_to_serialized_xspace(text)
    return data


def test_gpu_kernels_are_matched_to_instructions(tmp_path: Path) -> None:
    streams = {
        "Stream #1(Compute)": [
            ("gemm_fusion_2_kernel", 0, 4000, "gemm_fusion.2"),
            ("nvjet_tst_128x256", 4000, 3000, "cublas.3"),
            ("kernel_5", 8000, 1000, ""),  # launched by a graph: only the name is known
            ("update_8", 9000, 500, "update.8"),
            ("sm90_xmma_gemm", 9500, 250, ""),
            ("memset", 9750, 250, ""),
        ],
        "Stream #2(NCCL)": [("ncclDevKernel_AllReduce", 0, 1000, "all-reduce-start.7")],
        "XLA Ops": [("gemm_fusion.2", 0, 4000, "gemm_fusion.2")],  # the same once more
    }
    trace = tmp_path / "vm.xplane.pb"
    trace.write_bytes(xspace(streams, "/device:GPU:0"))
    report = profile_report(trace, [PROGRAM])
    assert report.seconds == pytest.approx(10e-6)
    assert report.shares == pytest.approx({
        "attention": 0.1, "matmul": 0.725, "loss": 0.0, "optimizer": 0.05, "communication": 0.1,
        "other": 0.025,
    })  # fmt: skip
    assert [each.name for each in report.operations[:3]] == [
        "gemm_fusion.2",
        "cublas.3",
        "kernel_5",
    ]
    content = json.loads(report.to_json(2))
    assert content["seconds"] == report.seconds
    assert content["shares"] == report.shares
    assert content["operations"] == [each._asdict() for each in report.operations[:2]]
    without = profile_report(trace).shares  # by the names of kernels alone
    assert without["matmul"] == pytest.approx(0.425 + 0.3)
    assert without["optimizer"] == 0


def test_tpu_operations_have_self_time(tmp_path: Path) -> None:
    ops = {
        "XLA Ops": [
            ("%loop = (s32[]) while(%w)", 0, 9000, "loop"),
            ("%head.6 = f32[8,8] dot(%w, %w)", 1000, 4000, ""),
            ("%head.6 = f32[8,8] dot(%w, %w)", 5000, 2000, ""),
        ],
        "XLA Modules": [("jit_step(123)", 0, 9000, "")],
    }
    trace = tmp_path / "vm.xplane.pb"
    trace.write_bytes(xspace(ops, "/device:TPU:0"))
    assert sum(event.seconds for event in read_events(trace)) == pytest.approx(9e-6)
    (head,) = profile_report(trace, [PROGRAM]).operations  # the loop only waited for it
    assert (head.kind, head.runs) == ("loss", 2)
    assert head.seconds == pytest.approx(6e-6)


def train(w: Any, x: Any) -> Any:
    """Return a step of a small transformer with named scopes."""

    def loss(w: Any) -> Any:
        h = x @ w
        with jax.named_scope("attention"):
            scores = jax.nn.softmax(jnp.einsum("btd,bsd->bts", h, x), axis=-1)
            h = jnp.einsum("bts,bsd->btd", scores, h)
        h = jnp.tanh(h @ w)
        with jax.named_scope("loss"):
            return jax.nn.logsumexp(h @ w, axis=-1).mean()

    gradient = jax.grad(loss)(w)
    with jax.named_scope("optimizer"):
        return w - 0.1 * gradient / jnp.sqrt((gradient**2).sum())


@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")
def test_a_training_trace_has_all_kinds_and_is_readable(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    w, x = jax.device_put((rng.normal(size=(96, 96)), rng.normal(size=(4, 64, 96))))
    step = jax.jit(train)
    profiler = Profiler((3, 4), tmp_path / "profile")

    def wait() -> None:
        jax.block_until_ready(w)  # type: ignore[no-untyped-call]  # as jax is

    for number in range(1, 7):
        with profiler.step(number, wait=wait):
            w = step(w, x)
        assert profiler.done == (number >= 4)
    report = profiler.report()

    assert sum(report.shares.values()) == pytest.approx(1)
    assert tuple(report.shares) == KINDS
    for kind in ("attention", "matmul", "loss", "optimizer"):
        assert report.shares[kind] > 0, kind
    assert report.shares["communication"] == 0
    assert {each.runs for each in report.operations} == {2}  # of two steps, and of no other
    assert sum(each.seconds for each in report.operations) == pytest.approx(report.seconds)
    lines = report.text(10).splitlines()
    assert len(lines) <= 13
    assert max(map(len, lines)) <= 80

    data = jax.profiler.ProfileData.from_file(str(profiler.trace))
    steps = [
        dict(event.stats)["step_num"]
        for plane in data.planes if plane.name == "/host:CPU"
        for line in plane.lines for event in line.events if event.name == "step"
    ]  # fmt: skip
    assert steps == [3, 4]
    (perfetto,) = profiler.trace.parent.glob("*.trace.json.gz")
    with gzip.open(perfetto) as file:
        events = json.load(file)["traceEvents"]
    named = {event["name"] for event in events if event.get("ph") == "X"}
    assert {each.name for each in report.operations} <= named


def test_a_run_that_ends_early_has_a_trace(tmp_path: Path) -> None:
    profiler = Profiler((2, 9), tmp_path)
    with pytest.raises(FileNotFoundError, match="was a step profiled"):
        _ = profiler.trace
    with profiler.step(5, wait=int):  # gone on with in the midst of them
        pass
    for _ in range(2):
        profiler.close()
    assert profiler.trace.is_file()
    with pytest.raises(ValueError, match="no operation of a device"):
        profiler.report()
    for steps in (None, (7, 8)):
        idle = Profiler(steps, tmp_path / "none")
        with idle.step(5, wait=int):
            pass
        idle.close()
        assert not idle.done
        assert not (tmp_path / "none").exists()


def test_steps_are_a_number_or_a_range() -> None:
    assert ProfileConfig().range is None
    assert ProfileConfig(steps="10").range == (10, 10)
    assert ProfileConfig(steps="10-15").range == (10, 15)
    for steps in ("", "0", "15-10", "a-b", "3-", "-3", "1 - 2", "٣", "9" * 99):
        with pytest.raises(ValueError, match="such as 10-15"):
            ProfileConfig(steps=steps)
