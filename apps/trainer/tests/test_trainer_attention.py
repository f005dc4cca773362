"""The log names the attention implementation; a failing kernel is one error that names the next."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import pytest

import tjx_trainer.main as program
from tjx_kernels import flash_attention
from tjx_kernels.attention.backends import xla
from tjx_kernels.attention.call import AttentionCall, Operands
from tjx_kernels.attention.registry import register_backend, unregister_backend
from tjx_kernels.target import deterministic_ops
from tjx_trainer.runtime.attention_report import report_attention
from tjx_trainer.runtime.exit_codes import ExitCode, KernelError
from tjx_trainer.runtime.xla_flags import DETERMINISTIC, request_determinism

WORDS = [
    *("--model.n_layer=1", "--model.n_head=2", "--model.d_model=8", "--model.max_seq_len=8"),
    *("--data.seq_len=8", "--data.tokenizer=char", "--data.holdout=tail", "--train.max_steps=2"),
    *("--train.batch_size=8", "--schedule.warmup_steps=1", "--train.sample_tokens=0"),
]
type Break = Callable[[jax.Array], jax.Array]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    text = tmp_path / "rhyme.txt"
    text.write_text("".join(f"{n % 10} and over the wall they run\n" for n in range(100)))
    return [*WORDS, f"--data.path={text}", f"--run_dir={tmp_path / 'run'}"]


@pytest.fixture
def first_choice() -> Iterator[Callable[[Break], None]]:
    """Put an implementation before all others: XLA's, whose queries pass through a function."""
    names = []

    def put(broken: Break) -> None:
        @jax.custom_vjp
        def through(q: Any) -> Any:
            return broken(q)

        through.defvjp(lambda q: (broken(q), None), lambda _, dq: (dq,))

        def run(call: AttentionCall, operands: Operands) -> tuple[jax.Array, jax.Array]:
            return xla.BACKEND.run(call, operands._replace(q=through(operands.q)))

        register_backend("fake", xla.BACKEND._replace(run=run), before="cudnn")
        names.append("fake")

    yield put
    for name in names:
        unregister_backend(name)


def never_compiles(q: jax.Array) -> jax.Array:
    called: jax.Array = jax.ffi.ffi_call("no_such_kernel", q)(q)
    return called


def test_a_kernel_that_does_not_compile_ends_with_one_error(
    words: list[str],
    first_choice: Callable[[Break], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    first_choice(never_compiles)
    assert program.main([*words, "--dry_run"]) == ExitCode.KERNEL_FAILED
    said = capsys.readouterr().err
    assert "attention      fake (the first that supports this call on cpu)\n" in said
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: --model.attention_implementation: got fake")
    assert "no_such_kernel" in error
    assert error.endswith("give --model.attention_implementation xla, the next choice")
    assert "Traceback" not in said


LOST = jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure")


def trace_and_raise(error: Exception, implementation: str | None = None) -> None:
    """Trace attention as a run does, and raise what then happens to the run."""
    x: Any = jax.ShapeDtypeStruct((1, 8, 2, 4), "float32")  # type: ignore[no-untyped-call]
    with report_attention():
        jax.eval_shape(partial(flash_attention, implementation=implementation), x, x, x)
        raise error


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_a_kernel_that_fails_on_the_device_is_one_error(
    implementation: str | None, first_choice: Callable[[Break], None]
) -> None:
    """Not where XLA made the kernels: the next choice would not help."""
    first_choice(lambda q: q)
    expected = KernelError if implementation is None else jax.errors.JaxRuntimeError
    with pytest.raises(expected, match="CUDA_ERROR_LAUNCH_FAILED") as caught:
        trace_and_raise(LOST, implementation)
    if implementation is None:
        assert "give --model.attention_implementation xla, the next choice" in str(caught.value)


def test_other_errors_pass(first_choice: Callable[[Break], None]) -> None:
    first_choice(never_compiles)
    with pytest.raises(KeyError):
        trace_and_raise(KeyError("no error of JAX"))


def test_an_implementation_that_does_not_support_the_model_is_a_mistake_of_the_command_line(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        program.main([*words, "--dry_run", "--model.attention_implementation=triton"])
    assert caught.value.code == ExitCode.USER_ERROR
    said = capsys.readouterr().err
    assert "--model.attention_implementation: implementation 'triton' cannot serve" in said
    assert "needs an NVIDIA GPU" in said


def test_a_run_logs_its_attention_implementation(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And `--train.deterministic` tells XLA."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    given = ["--dry_run", "--model.attention_implementation=xla", "--train.deterministic=true"]
    assert program.main([*words, *given]) == 0
    assert capsys.readouterr().err.count("attention      xla (requested by name)\n") == 1
    assert os.environ["XLA_FLAGS"] == DETERMINISTIC


def test_determinism_keeps_other_flags_and_is_the_last_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x --xla_gpu_deterministic_ops=false")
    assert not deterministic_ops()
    for _ in range(2):
        request_determinism()
        assert os.environ["XLA_FLAGS"].split()[0] == "--xla_dump_to=x"
        assert os.environ["XLA_FLAGS"].count(DETERMINISTIC) == 1
        assert deterministic_ops()
