"""Roofline estimates against hand calculations: kernels, bytes, FLOPs, seconds, regions."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tjx_parallel.planning.chips import CHIPS
from tjx_parallel.roofline import Assumptions, Estimate, Kernel, assumptions_for, estimate, report

# bf16 products take FLOPs / 1e12 s, traffic bytes / 1e9 s, a launch 0.1 us.
CHIP = CHIPS["h200"]._replace(flops=1e12, memory_bandwidth=1e9)
PLAIN = Assumptions(1.0, 1.0, 1e-7, 0.5, "by hand")
F32, BF16 = 4, 2


def program(*lines: str, computations: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m\n\n{computations}\nENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def computation(name: str, *lines: str) -> str:
    return f"%{name} (x: f32[8]) -> f32[8] {{\n" + "\n".join(f"  {x}" for x in lines) + "\n}\n\n"


def named(op_name: str) -> str:
    return f'metadata={{op_name="jit(step)/{op_name}"}}'


def found(hlo: str, **options: Any) -> Estimate:
    return estimate(hlo, CHIP, PLAIN, **options)


def only(hlo: str) -> Kernel:
    (kernel,) = found(hlo).kernels
    return kernel


X = "%x = f32[8,16]{1,0} parameter(0)"


def test_a_product_takes_compute_or_memory_time_plus_launch() -> None:
    w = "%w = f32[16,4]{1,0} parameter(1)"
    dims = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    dot = f"ROOT %y = f32[8,4]{{1,0}} dot(%x, %w), {dims}, {named('jvp(mlp)/dot_general')}"
    kernel = only(program(X, w, dot))
    assert kernel.flops == 2 * 8 * 4 * 16
    assert kernel.bytes == (8 * 16 + 16 * 4 + 8 * 4) * F32
    assert (kernel.bound, kernel.region) == ("memory", ("MLP", "forward"))
    assert kernel.seconds == pytest.approx(kernel.bytes / 1e9 + 1e-7)
    # float32 is rounded to TF32, at half the rate; "highest" keeps it, at that of no tensor cores.
    exact = dot.replace(dims, f"{dims}, operand_precision={{highest,highest}}")
    fast_memory = PLAIN._replace(bandwidth_share=1e9, launch_seconds=0.0)
    for text, rate in ((dot, 1e12 / 2), (exact, CHIP.float32_flops)):
        (compute,) = estimate(program(X, w, text), CHIP, fast_memory).kernels
        assert compute.bound == "compute"
        assert compute.seconds == pytest.approx(compute.flops / rate)


def test_library_calls_are_products_and_their_workspace_is_no_traffic() -> None:
    config = (
        '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"]}}}'
    )
    call = (
        "%c = (bf16[16,4]{1,0}, s8[4194304]{0}) custom-call(%x, %w), "
        f'custom_call_target="__cublas$lt$matmul", backend_config={config}'
    )
    kernel = only(program("%x = bf16[8,16] parameter(0)", "%w = bf16[8,4] parameter(1)", call))
    assert (kernel.kind, kernel.flops) == ("product bf16", 2 * 16 * 4 * 8)
    assert kernel.bytes == (8 * 16 + 8 * 4 + 16 * 4) * BF16


def test_8_bit_products_have_their_own_rate() -> None:
    config = '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":[1]}}}'
    call = (
        "%c = bf16[8,4]{1,0} custom-call(%x, %w), "
        f'custom_call_target="__cublas$lt$matmul$f8", backend_config={config}'
    )
    lines = ("%x = f8e5m2[8,16] parameter(0)", "%w = f8e4m3fn[4,16] parameter(1)", call)
    fast_memory = PLAIN._replace(bandwidth_share=1e9, launch_seconds=0.0)
    (kernel,) = estimate(program(*lines), CHIP, fast_memory).kernels
    assert (kernel.kind, kernel.flops) == ("product f8e5m2", 2 * 8 * 4 * 16)
    assert kernel.bytes == 8 * 16 + 4 * 16 + 8 * 4 * BF16
    assert kernel.seconds == pytest.approx(kernel.flops / CHIP.float8_flops)


def test_random_bits_count_integer_operations() -> None:
    """One addition, one rotation and one comparison an element; floats and shapes are free."""
    bits = computation(
        "bits",
        "%p = u32[8,16]{1,0} parameter(0)",
        "%c = u32[8,16]{1,0} broadcast(%k)",
        "%a = u32[8,16]{1,0} add(%p, %c)",
        "%l = u32[8,16]{1,0} shift-left(%a, %c)",
        "%r = u32[8,16]{1,0} shift-right-logical(%a, %c)",
        "%o = u32[8,16]{1,0} or(%l, %r)",
        "%f = f32[8,16]{1,0} convert(%o)",
        "%m = f32[8,16]{1,0} multiply(%f, %f)",
        "ROOT %g = pred[8,16]{1,0} compare(%o, %c), direction=GE",
    )
    call = "ROOT %y = pred[8,16]{1,0} fusion(%x), kind=kLoop, calls=%bits"
    hlo = program("%x = u32[8,16]{1,0} parameter(0)", call, computations=bits)
    slow = CHIP._replace(integer_ops=1e6)
    (kernel,) = estimate(hlo, slow, PLAIN._replace(integer_share=0.5)).kernels
    assert (kernel.bound, kernel.flops) == ("integers", 0)
    assert kernel.seconds == pytest.approx(3 * 8 * 16 / 0.5e6 + 1e-7)
    (kernel,) = estimate(hlo, CHIP, PLAIN).kernels
    assert kernel.bound == "memory"
    said = "\n".join(PLAIN.lines(CHIPS["h200"]) + PLAIN.lines(CHIPS["v5e"]))
    assert "sustain 13.4 T/s" in said
    assert "as of random bits, hide behind the memory traffic" in said


def test_a_convolution_counts_its_window_and_input_features() -> None:
    call = (
        "ROOT %y = f32[2,6,6,32] convolution(%x, %w), window={size=3x3}, dim_labels=b01f_01io->b01f"
    )
    lines = ("%x = f32[2,8,8,5] parameter(0)", "%w = f32[3,3,5,32] parameter(1)", call)
    assert only(program(*lines)).flops == 2 * (2 * 6 * 6 * 32) * (3 * 3 * 5)


SLICED = computation(
    "sliced",
    "%p = f32[12,8,16]{2,1,0} parameter(0)",
    "%i = s32[] parameter(1)",
    "%c = bf16[12,8,16]{2,1,0} convert(%p)",
    "ROOT %s = bf16[1,8,16]{2,1,0} dynamic-slice(%c, %i, %i, %i), dynamic_slice_sizes={1,8,16}",
)
STACKED = computation(
    "stacked",
    "%p = f32[12,8,16]{2,1,0} parameter(0)",
    "%u = f32[8,16]{1,0} parameter(1)",
    "%i = s32[] parameter(2)",
    "%b = f32[1,8,16]{2,1,0} bitcast(%u)",
    "ROOT %s = f32[12,8,16]{2,1,0} dynamic-update-slice(%p, %b, %i, %i, %i)",
)


def test_a_sliced_buffer_counts_with_its_slice() -> None:
    stack, index = "%w = f32[12,8,16]{2,1,0} parameter(0)", "%i = s32[] parameter(1)"
    read = "%r = bf16[1,8,16]{2,1,0} fusion(%w, %i), kind=kLoop, calls=%sliced"
    assert only(program(stack, index, read, computations=SLICED)).bytes == (
        8 * 16 * (F32 + BF16) + 4
    )
    write = (
        "%d = ((f32[12,8,16]{2,1,0}, f32[8,16]{1,0}, s32[]), f32[12,8,16]{2,1,0}, u32[]) "
        "fusion-start(%w, %x, %i), kind=kLoop, calls=%stacked"
    )
    done = "ROOT %e = f32[12,8,16]{2,1,0} fusion-done(%d)"
    lines = (stack, index, X, write, done)
    assert only(program(*lines, computations=STACKED)).bytes == 2 * 8 * 16 * F32 + 4
    # Outside a fusion, too; a buffer that is read as a whole counts as a whole.
    plain = "ROOT %s = f32[1,8,16]{2,1,0} dynamic-slice(%w, %i, %i, %i)"
    assert only(program(stack, index, plain)).bytes == 2 * 8 * 16 * F32 + 4
    whole = SLICED.replace("ROOT ", "").replace(
        "\n}", "\n  ROOT %t = (bf16[1,8,16], bf16[12,8,16]) tuple(%s, %c)\n}"
    )
    assert only(program(stack, index, read, computations=whole)).bytes == (
        12 * 8 * 16 * (F32 + BF16) + 8 * 16 * BF16 + 4
    )


def test_operands_in_a_start_tuple_are_not_results() -> None:
    call = (
        "%d = ((f32[8,16]{1,0}), f32[4,16]{1,0}, u32[]) custom-call-start(%x), "
        'custom_call_target="kernel"'
    )
    done = "ROOT %e = f32[4,16]{1,0} custom-call-done(%d)"
    estimated = found(program(X, call, done))
    (kernel,) = estimated.kernels
    assert kernel.bytes == (8 * 16 + 4 * 16) * F32
    assert estimated.notes == ("of kernel the bytes count, not the FLOPs",)
    copy = "%c = (f32[8,16]{1,0}, f32[8,16]{1,0}, u32[]) copy-start(%x)"
    assert only(program(X, copy)).bytes == 2 * 8 * 16 * F32


def test_a_scatter_reads_and_writes_the_rows_that_it_touches() -> None:
    rows = (
        "%t = f32[1000,16]{1,0} parameter(0)",
        "%ids = s32[8,1]{1,0} parameter(1)",
        "%u = f32[8,16]{1,0} parameter(2)",
    )
    scatter = "ROOT %s = f32[1000,16]{1,0} scatter(%t, %ids, %u), to_apply=%add"
    assert only(program(*rows, scatter)).bytes == 3 * 8 * 16 * F32
    gather = "ROOT %g = f32[8,16]{1,0} gather(%t, %ids), offset_dims={1}"
    assert only(program(*rows[:2], gather)).bytes == 2 * 8 * 16 * F32 + 8 * 4


def loop(trips: str) -> str:
    body = computation(
        "body",
        "%b = f32[8,16]{1,0} parameter(0)",
        f"ROOT %n = f32[8,16]{{1,0}} add(%b, %b), {named('jvp()/while/body/mlp/add')}",
    )
    until = computation("until", "ROOT %u = pred[] constant(true)")
    start = f"ROOT %l = f32[8,16]{{1,0}} while(%x), condition=%until, body=%body{trips}"
    return program(X, start, computations=body + until)


def test_loops_count_their_trip_count() -> None:
    known = found(loop(', backend_config={"known_trip_count":{"n":"3"}}'))
    assert known.total() == pytest.approx((3, 3 * 2 * 8 * 16 * F32, 0, 3 * (1024e-9 + 1e-7)))
    assert not known.notes
    unknown = found(loop(""))
    assert unknown.total().kernels == 1
    assert unknown.notes == ("the loop l has an unknown number of runs: counted once",)


def test_the_costliest_branch_counts() -> None:
    branches = computation("small", "ROOT %s = f32[2] negate(%s)") + computation(
        "large", "%a = f32[8,16]{1,0} parameter(0)", "ROOT %n = f32[8,16]{1,0} negate(%a)"
    )
    choice = "ROOT %c = f32[8] conditional(%i, %x, %x), branch_computations={%small, %large}"
    assert only(program(X, choice, computations=branches)).name == "n"


KINDS = {
    "cudnn": ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward", 311, 0.87 * 311),
    "triton": ("__gpu$xla.gpu.triton", "__gpu$xla.gpu.triton", 218, 190),
    "mosaic": ("mosaic_gpu_v2", "mosaic_gpu_v2", 272, 209),
}
BTNH = "bf16[2,1024,3,64]{3,2,1,0}"


@pytest.mark.parametrize("implementation", KINDS)
def test_attention_kernels_take_flops_by_formula_at_a_measured_rate(implementation: str) -> None:
    forward, backward, rate, rate_backward = KINDS[implementation]
    operands = [f"%{name} = {BTNH} parameter({n})" for n, name in enumerate("qkvo")]

    def call(name: str, results: list[str], target: str, where: str) -> str:
        return (
            f"%{name} = ({', '.join([*results, 'f32[2,3,1024]'])}) custom-call(%q, %k, %v, %o), "
            f'custom_call_target="{target}", {named(f"{where}/attention_layer/attention/kernel")}'
        )

    hlo = program(
        *operands,
        call("out", [BTNH], forward, "jvp()"),
        call("dq", [BTNH], backward, "transpose(jvp())"),
        call("dkv", [BTNH] * 2, backward, "transpose(jvp())"),
        call("other", [], forward, "jvp()").replace("attention/kernel", "mlp"),
    )
    estimated = found(hlo)
    out, dq, dkv, other = estimated.kernels
    # Two products of the visible half, each 2 FLOPs a pair and feature; backward 5 products.
    once = 2 * 2 * (2 * 3 * 1024 * 1024 * 64) / 2
    assert out.flops == once
    assert (dq.flops, dkv.flops) == pytest.approx((2.5 * once / 3, 2.5 * once * 2 / 3))
    assert {each.kind for each in (out, dq, dkv)} == {f"{implementation} attention"}
    assert [each.region.phase for each in (out, dq)] == ["forward", "backward"]
    for kernel, share in ((out, rate / 989), (dq, rate_backward / 989)):
        by_hand = max(kernel.flops / (share * 1e12), kernel.bytes / 1e9) + 1e-7
        assert kernel.seconds == pytest.approx(by_hand)
    assert other.flops == 0
    assert any(
        f"{implementation} attention forward: {rate / 989:.0%}" in x for x in estimated.notes
    )
    again = hlo.replace("transpose(jvp())/att", "transpose(jvp())/rematted_computation/att")
    if implementation != "cudnn":  # whose target says which pass it is
        assert found(again).kernels[1].flops == once


def test_collectives_are_separate_and_need_the_mesh() -> None:
    reduced = "ROOT %r = f32[8,16]{1,0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%sum"
    add = computation("sum", "ROOT %s = f32[] add(%a, %b)")
    hlo = program(
        X, f"%n = f32[8,16]{{1,0}} negate(%x), {named('optimizer/neg')}", reduced, computations=add
    )
    both = found(hlo, mesh_shape={"data": 2})
    sums = {region.name: total for region, total in both.by_region().items()}
    assert sums["collectives"] == (1, 512, 0, 512 / CHIP.fast_bandwidth)
    assert both.total() == sums["optimizer"]
    assert both.compute_time() == (0, sums["optimizer"].seconds)
    with pytest.raises(ValueError, match="mesh_shape: got None; expected the mesh of a program"):
        found(hlo)


def compiled(function: Callable[..., Any], *shapes: tuple[int, ...]) -> str:
    abstract: Any = jax.ShapeDtypeStruct
    arguments = [abstract(shape, jnp.float32) for shape in shapes]
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert text is not None
    return text


LAYERS, ROWS, WIDTH = 3, 32, 64


@pytest.mark.parametrize("unroll", [1, LAYERS])
def test_a_compiled_step_has_the_flops_of_the_formula_in_each_region(unroll: int) -> None:
    @jax.named_scope("mlp")
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ w), None

    def loss(weights: jax.Array, x: jax.Array) -> jax.Array:
        with jax.named_scope("embedding"):
            x = jnp.sin(x)
        return jax.lax.scan(layer, x, weights, unroll=unroll)[0].sum()

    def step(weights: jax.Array, x: jax.Array) -> jax.Array:
        gradients: jax.Array = jax.grad(loss)(weights, x)
        with jax.named_scope("optimizer"):
            return weights - 0.1 * gradients

    hlo = compiled(step, (LAYERS, WIDTH, WIDTH), (ROWS, WIDTH))
    estimated = found(hlo)
    assert not estimated.notes
    flops = {
        (name, direction): total.flops
        for (name, direction), total in estimated.by_region().items()
        if total.flops
    }
    product = 2 * ROWS * WIDTH * WIDTH
    assert flops["MLP", "forward"] == LAYERS * product
    # A scan differentiates the first layer's input too, unless the compiler sees no use of it.
    backward = flops["MLP", "backward"] / product
    assert backward == (2 * LAYERS if unroll == 1 else 2 * LAYERS - 1)
    regions = {name for name, _ in estimated.by_region()}
    assert regions >= {"MLP", "embedding", "optimizer"}
    # The update reads weights and gradients and writes weights; other copies are the CPU's.
    weights = LAYERS * WIDTH * WIDTH * F32
    (update,) = (x for r, x in estimated.by_region().items() if r.name == "optimizer")
    assert weights <= update.bytes <= 4 * weights


def test_bytes_and_flops_of_a_compiled_product() -> None:
    estimated = found(compiled(lambda x, w: x @ w, (24, 48), (48, 96)))
    (product,) = (each for each in estimated.kernels if each.flops)
    assert product.flops == 2 * 24 * 48 * 96
    assert product.bytes == (24 * 48 + 48 * 96 + 24 * 96) * F32


def test_the_report_has_every_region_and_states_its_assumptions() -> None:
    lines = report(found(loop(', backend_config={"known_trip_count":{"n":"3"}}')))
    assert any(line.split()[:3] == ["MLP", "forward", "3"] for line in lines)
    assert "  matrix products sustain 100% of the peak: bf16 1" in "\n".join(lines)
    assert "  source: by hand" in lines
    with pytest.raises(
        ValueError, match=r"attention_visible: got 0.0; expected a share in \(0, 1\]"
    ):
        assumptions_for(CHIP, attention_visible=0.0)
    with pytest.raises(ValueError, match="expected the text of an optimized HLO module"):
        found("not a program")


def test_a_file_is_estimated_without_jax(tmp_path: Path) -> None:
    file = tmp_path / "step.hlo.txt"
    file.write_text(loop(', backend_config={"known_trip_count":{"n":"3"}}'))
    code = (
        "import runpy, sys; sys.argv = ['roofline', sys.argv[1], '--chip', 'h100'];"
        "runpy.run_module('tjx_parallel.roofline', run_name='__main__');"
        "assert 'jax' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": ":".join(str(Path(p).resolve()) for p in sys.path if p)},
    )  # fmt: skip
    assert "MLP" in done.stdout
