"""Plans: figures equal to hand calculations, and advice that fits."""

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import pytest

from tjx_parallel.planning.chips import CHIPS
from tjx_parallel.planning.step_time import StepProfile, plan, scale_step
from tjx_parallel.roofline import assumptions_for, estimate
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.planning import parameter_table, plan_command
from tjx_trainer.planning.compiled_step import (
    PlannedStep,
    abstract_batch,
    attention_visible,
    bubble,
    lower_step,
    plan_step,
)
from tjx_trainer.planning.plan_command import PlanFlags, device_count, read_flags
from tjx_trainer.planning.report import fit_report, page, summary
from tjx_trainer.tasks.registry import open_task
from tjx_trainer.tasks.task import DataShard

GIB = 2**30
# XLA has no description of it here: the CPU's compiler makes the program, installed or not.
CPU_MADE = CHIPS["h100"]._replace(name="b200")
L, D, T, V, ROWS = 2, 32, 32, 512, 16
WORDS = [
    *(f"--model.n_layer={L}", "--model.n_head=2", f"--model.d_model={D}"),
    *(f"--model.vocab_size={V}", f"--model.max_seq_len={T}", "--model.tied_head=false"),
    *(f"--data.seq_len={T}", "--data.tokenizer=byte", f"--train.batch_size={ROWS}"),
    *("--train.max_steps=10", "--schedule.warmup_steps=1"),
]
# Blocks of 12 d**2 and 13 d with biases; tokens, their head, positions, the last norm.
MULTIPLIED = L * (12 * D**2 + 13 * D) + V * D + 2 * D
PARAMETERS = MULTIPLIED + V * D + T * D


@cache
def planned(*words: str) -> PlannedStep:
    _, config = read_flags([*WORDS, *words], PlanFlags)
    return plan_step(config, CPU_MADE, device_count(None, config))


def alone() -> StepProfile:
    return planned("--mesh.data=1").step


TWO = ("--mesh.data=2", "--train.accumulation=2", "--train.phases=5:model.window=8")


def two() -> StepProfile:
    return planned(*TWO).step


def test_one_device_by_hand() -> None:
    step = alone()
    assert step.parameters == step.gradients == 4 * PARAMETERS
    # Adam's two numbers for each parameter, and how many updates there were.
    assert step.optimizer == pytest.approx(8 * PARAMETERS, abs=16)
    assert step.batch == 2 * ROWS * T * 4
    assert step.tokens == ROWS * T
    # Six for each parameter in a product, and 12 d for each layer and token seen, as of PaLM.
    assert step.flops == (6 * MULTIPLIED + 12 * L * T * D) * ROWS * T
    # What the backward pass needs at least: gradients, and the head's input for each token.
    assert step.temporaries > step.gradients + 4 * ROWS * T * D
    assert not step.exchanges


def test_data_parallel_by_hand() -> None:
    step, chip = two(), CHIPS["h100"]
    assert (step.parameters, step.microbatches) == (4 * PARAMETERS, 2)
    assert step.batch == alone().batch / 2
    # 2 x 1/2 of the gradients, in each of two microbatches, over NVLink; all but a few are these.
    sent = 2 * 4 * PARAMETERS
    assert sum(each.wire_bytes for each in step.exchanges) == pytest.approx(sent, rel=0.05)
    found = plan(step, chip)
    computing = step.flops / 2 / (0.41 * 989e12) + 2 * 12 * PARAMETERS / 3.35e12
    assert found.compute == pytest.approx(computing, rel=1e-3)
    sending = sent / 450e9
    by_hand = computing / (computing + sending), computing / max(computing, sending)
    assert found.efficiency == pytest.approx(by_hand, rel=0.05)
    assert any("step before the first phase" in note for note in planned(*TWO).notes)


@pytest.mark.parametrize("words", [(), ("--model.scan_layers=false",)], ids=["scan", "unrolled"])
def test_the_program_has_the_flops_of_the_formula(words: tuple[str, ...]) -> None:
    made = planned("--mesh.data=1", *words)
    assert made.estimate is None
    assert any("compiled for the CPU" in note and "time by formula" in note for note in made.notes)
    found = estimate(made.hlo, CHIPS["h100"], assumptions_for(CHIPS["h100"]))
    assert not found.notes
    flops = {
        (region.name, region.phase): total.flops / (ROWS * T)
        for region, total in found.by_region().items()
    }
    for name, parameters in (("attention projections", 4), ("MLP", 8)):
        assert flops[name, "forward"] == 2 * L * parameters * D**2
        assert flops[name, "backward"] == 2 * flops[name, "forward"]
    assert flops["head loss", "forward"] == 2 * V * D
    # A block of 32 tokens hides nothing of the mask: 4 d a key; the scores are computed again.
    assert flops["attention", "forward"] == 4 * L * T * D
    assert flops["attention", "backward"] in (8 * L * T * D, 10 * L * T * D)
    assert found.total().flops == pytest.approx(made.step.flops, rel=0.03)
    assert flops.keys() >= {("embedding", "forward"), ("optimizer", "update")}
    assert {"normalization", "residual stream"} <= {name for name, _ in flops}


def test_visible_fraction_of_masks() -> None:
    def shown(*words: str) -> float:
        return attention_visible(resolve([*words, "--data.seq_len=4", "--data.tokenizer=byte"]))

    assert shown() == (1 + 2 + 3 + 4) / 16
    window = ["--model.n_layer=2", "--model.window=2", "--model.n_head=2"]
    assert shown(*window) == pytest.approx((1 + 2 + 2 + 2) / 16)
    assert shown("--model.family=bert") == 1
    both = resolve(["--config=seq2seq_toy"])
    causal = (both.data.seq_len + 1) / 2 / both.data.seq_len
    assert attention_visible(both) == pytest.approx((causal + 1 + 1) / 3)


def test_the_compiler_of_the_chip_gives_the_time() -> None:
    if (
        importlib.util.find_spec("jax_plugins") is None
        or importlib.util.find_spec("jax_plugins.xla_cuda13") is None
    ):
        pytest.skip("the CUDA plugin (jax-cuda13-plugin, jax-cuda13-pjrt) is not installed")
    # In a process of its own: this one has the devices of a CPU alone.
    program = (
        "import json, sys; from tjx_trainer.planning import plan_command as p; p.run(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *WORDS, "--mesh.data=1", "--chip=h200"],
        capture_output=True, text=True, check=True, env=environment(),
    )  # fmt: skip
    assert "estimated from the compiled program" in done.stdout
    assert re.search(r"MLP +forward +\d+", done.stdout)
    assert "Costliest operations:" in done.stdout
    assert "matrix products sustain 61% of the peak" in done.stdout


def environment() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(str(Path(p).resolve()) for p in sys.path if p)}


def test_extrapolation_matches_compilation() -> None:
    two_of_one = scale_step(replace(alone(), microbatches=2), 2, strong=False)
    assert two_of_one is not None
    sent = [sum(each.wire_bytes for each in step.exchanges) for step in (two_of_one, two())]
    assert sent[0] == pytest.approx(sent[1], rel=0.05)


def test_a_plan_is_printed_written_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--chip=v5e",
        "--mesh.fsdp=2",
        "--compute_efficiency=0.4",
        "--out",
        str(tmp_path / "x"),
    ]
    assert plan_command.run([*WORDS, *words]) == 0
    said = capsys.readouterr().out
    assert "on 2 v5e (fsdp 2), 16 sequences a step in 1 microbatches" in said
    assert "It fits" in said
    assert "compute at 40% of 197 TFLOP/s, as given" in said
    assert re.search(r"all-gather over fsdp: [\d.]+ KiB sent per device", said)
    assert len(re.findall(r"^ +[\d,]+   \d+% to \d+%", said, re.MULTILINE)) == 11
    written = json.loads((tmp_path / "x" / "plan.json").read_text())
    assert written["memory"]["parameters"] * 2 == pytest.approx(4 * PARAMETERS, rel=0.02)
    assert written["memory"]["total"] == sum(
        written["memory"][name] for name in ("parameters", "optimizer", "batch", "temporaries")
    )
    assert written["flags"] == [*WORDS, *words[:-2]]
    assert written["versions"]["jax"] == jax.__version__
    hlo = (tmp_path / "x" / "step.hlo.txt").read_text()
    assert hlo.startswith("HloModule")
    weak = {p["devices"]: p for p in written["scaling"] if p["scaling"] == "weak"}
    assert set(weak) == {2**n for n in range(11)}
    assert weak[2]["efficiency"] == written["efficiency"]
    for name in ("memory.png", "scaling.png"):
        assert (tmp_path / "x" / name).read_bytes().startswith(b"\x89PNG")
        assert str(tmp_path / "x" / name) in said


# GPT-2 XL in fp32 on one A100 with 8 sequences at once, compiled on a CPU: 83 GiB.
XL = StepProfile(
    mesh_shape=dict.fromkeys(("stage", "data", "fsdp", "context", "expert", "tensor"), 1),
    parameters=6_230_746_000, optimizer=12_461_492_000, batch=3_932_160,
    temporaries=int(65.3 * GIB), gradients=6_230_746_000, flops=5.05e15, tokens=480 * 1024,
    sequences=480, microbatches=60,
)  # fmt: skip


def test_a_plan_that_does_not_fit_lists_flags_that_fit() -> None:
    words = ["--config=gpt2_xl", "--train.precision=fp32", "--train.device_batch_size=8"]
    config = resolve([*words, "--model.remat=none"])
    found = plan(XL, CHIPS["a100"])
    lines = fit_report(config, found)
    assert re.match(r"It does not fit: 2\d\.\d GiB are missing", lines[0])
    assert "--train.device_batch_size 4 (now 8): about 50.1 GiB, fits" in lines[1]
    more = fit_report(config, plan(replace(XL, temporaries=150 * GIB), CHIPS["a100"]))
    assert "--train.device_batch_size 2 (now 8): about 54.9 GiB, fits" in more[1]
    # Each flag is one of the trainer's, and each chip one that has the room.
    for name, value in re.findall(r"--((?:train|mesh|model|optimizer)\.\w+) (\w+)", str(lines)):
        resolve([*words[:2], f"--{name}={value}"])
    assert "--chip h200 or b200 or v5p" in lines[-1]
    assert plan(replace(XL, temporaries=XL.temporaries // 2), CHIPS["a100"]).fits
    # A GPU has more than JAX takes of it by itself; where that would do, it comes first.
    tight = plan(replace(XL, temporaries=45 * GIB), CHIPS["a100"])
    assert "XLA_CLIENT_MEM_FRACTION=0.92" in fit_report(config, tight)[1]
    made = PlannedStep(XL, [], None, "")
    said = page(config, found, made)
    assert "It does not fit" in said
    assert "compute at 50% of 312 TFLOP/s: nanoGPT with torch.compile" in said
    assert summary(found, made)["fits"] is False


def test_more_devices_are_advised_where_the_state_is_too_large() -> None:
    config = resolve(["--config=gpt2_xl", "--train.device_batch_size=1"])
    state = replace(XL, parameters=30 * GIB, optimizer=60 * GIB, temporaries=40 * GIB,
                    gradients=30 * GIB, microbatches=480)  # fmt: skip
    (line,) = [line for line in fit_report(config, plan(state, CHIPS["h100"])) if "fsdp" in line]
    # 120 GiB are divided, 10 are not: of 55.9 there is room for 30 beside these, not for 60.
    assert "--mesh.fsdp 4 --chips 4" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--chpi", "h100"], "--chpi: unknown flag; did you mean --chip?"),
        (["--chip", "h10"], "did you mean h100?"),
        (["--chips", "many"], "--chips: got 'many'; expected a whole number"),
        (["--chip"], "--chip: got no value"),
        (["--chip=a100", "--chip=h100"], "--chip: given twice"),
        (["--compute_efficiency=50"], "--compute_efficiency: got 50; expected a fraction"),
        (["--model.n_layers=3"], "did you mean --model.n_layer?"),
        (
            ["--mesh.fsdp=2", "--chips=3"],
            "--chips 3: mesh: got fsdp=2, which needs a multiple",
        ),
    ],
)
def test_mistakes_end_with_code_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        plan_command.run([*words, "--data.tokenizer=byte"])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_a_mistake_is_reported_before_jax_is_imported() -> None:
    program = (
        "import sys\nfrom tjx_trainer.planning import parameter_table, plan_command\n"
        "try: (plan_command if sys.argv[1] == 'p' else parameter_table).run(['--chips', 'x'])\n"
        "except SystemExit: assert 'jax' not in sys.modules; print('told')\n"
    )
    for name in "pt":
        done = subprocess.run(
            [sys.executable, "-c", program, name], capture_output=True, text=True, check=True,
            env=environment(),
        )  # fmt: skip
        assert done.stdout == "told\n"


def test_the_table_of_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert parameter_table.run([*WORDS, "--mesh.fsdp=2", "--mesh.tensor=2"]) == 0
    said = capsys.readouterr().out
    (line,) = re.findall(r"blocks/mlp/up/kernel .*", said)
    cells = re.split(r" {2,}", line)
    assert cells[1:4] == [f"{L} x {D} x {4 * D}", "layers, embed, mlp", "-, fsdp, tensor"]
    assert int(cells[4].replace(",", "")) == L * D * 4 * D * 4 // 4
    assert f"{PARAMETERS:,} parameters on 4 devices" in said
    (total,) = re.findall(r"bytes per device: ([\d,]+) of parameters", said)
    column = re.findall(r"^\S+/\S+ .* ([\d,]+)$", said, re.MULTILINE)
    assert sum(int(each.replace(",", "")) for each in column) == int(total.replace(",", ""))


SMALL = ["--model.n_layer=1", "--model.n_head=2", "--model.d_model=16", "--model.d_ff=16"]
FAMILIES = {
    "gpt": ["--data.packing=documents", "--data.tokenizer=byte", "--data.seq_len=32"],
    "bert": ["--model.family=bert", "--data.tokenizer=bpe", "--data.seq_len=32"],
    "vit": ["--config=vit_mnist", "--data.path=nowhere"],
    "encoder_decoder": ["--config=seq2seq_toy"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_lowered_without_data(family: str) -> None:
    config = resolve([*FAMILIES[family], *SMALL, "--train.batch_size=8", "--mesh.data=2"])
    parts, lowered = lower_step(config, jax.devices()[:2])
    inputs: Any = lowered.in_avals[0][1]
    assert inputs.keys() == abstract_batch(config, parts.mesh).keys() > {"labels"}
    if family == "gpt":  # whole documents see nothing of each other
        assert inputs.keys() > {"segment_ids", "positions"}
    if family == "encoder_decoder":  # the one whose data need not be read
        config, make_task = open_task(config)
        rows = make_task(DataShard(8, 8, 0, 1)).train_data.batch(0)
        assert {name: rows[name].dtype for name in rows} == {
            name: array.dtype for name, array in inputs.items()
        }


def test_the_bubble_of_a_pipeline() -> None:
    config = resolve(["--mesh.pipeline=1f1b"])
    assert bubble(config, 1, 8) == 0
    assert bubble(config, 4, 12) == 3 / 15
    interleaved = resolve(["--mesh.pipeline=interleaved_1f1b", "--mesh.virtual_stages=2"])
    assert bubble(interleaved, 4, 12) == 3 / 27
