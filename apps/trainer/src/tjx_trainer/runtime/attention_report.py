"""Report of the selected attention implementation, and diagnosis of its failures."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from tjx_core import ConfigError
from tjx_kernels.attention.api import UnsupportedCallError
from tjx_kernels.attention.choices import Choice, observe_choices
from tjx_kernels.attention.diagnosis import compile_failure, explain_choice, next_choice
from tjx_trainer.runtime.exit_codes import KernelError
from tjx_trainer.runtime.out_of_memory import is_out_of_memory
from tjx_trainer.runtime.run_logging import log_info

_FLAG = "--model.attention_implementation"
# Implementations in plain JAX, which XLA compiles.
_COMPILED_BY_XLA = ("xla", "reference")
# Errors of launched CUDA and cuDNN kernels. They surface at the next synchronization, without the
# kernel's name.
_LAUNCH = re.compile(r"CUDA_ERROR_\w+|CUDNN_STATUS_\w+|illegal memory access|launch failure", re.I)


@contextmanager
def report_attention() -> Iterator[None]:
    """Log each selected attention implementation once, and diagnose its failures.

    Raises
    ------
    ConfigError
        If the implementation requested by name does not support the model's attention.
    KernelError
        Replaces the error of JAX or a compiler if the implementation alone does not compile either,
        or if a kernel failed on the device. Other errors propagate.
    """
    choices: dict[str, Choice] = {}

    def observe(choice: Choice) -> None:
        if choice.name not in choices:
            log_info(f"attention      {explain_choice(choice)}")
        choices.setdefault(choice.name, choice)

    try:
        with observe_choices(observe):
            yield
    except UnsupportedCallError as error:
        raise ConfigError([f"{_FLAG}: {error}"]) from error
    except Exception as error:
        if not _raised_by_jax(error) or is_out_of_memory(error):
            raise
        if message := _diagnose(error, [*choices.values()]):
            raise KernelError(message) from error
        raise


def _diagnose(error: Exception, choices: list[Choice]) -> str | None:
    """Return the error message if a selected implementation is at fault, else None."""
    for choice in choices:
        if failure := compile_failure(choice):
            return _message(choice, f"fails to compile ({_headline(failure)})")
    launched = [choice for choice in choices if choice.name not in _COMPILED_BY_XLA]
    if launched and (found := _LAUNCH.search(str(error))):
        return _message(
            launched[0],
            f"compiles, and a kernel failed on the device ({found[0]}: {_headline(error)})",
        )
    return None


def _message(choice: Choice, problem: str) -> str:
    call, following = choice.call, next_choice(choice)
    shape = f"q [{call.batch}, {call.q_len}, {call.heads}, {call.head_dim}] {call.dtype}"
    advice = (
        f"give {_FLAG} {following}, the next choice"
        if following
        else "no other implementation supports it"
    )
    return (
        f"{_FLAG}: got {explain_choice(choice)}; expected an implementation that runs here: it "
        f"{problem} for {shape}; {advice}"
    )


def _headline(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or ['no message'])[0][:300]}"


def _raised_by_jax(error: Exception) -> bool:
    """Return whether JAX raised the error, or code that JAX called while tracing or compiling."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return True
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_globals.get("__name__", "").partition(".")[0] in ("jax", "jaxlib"):
            return True
        traceback = traceback.tb_next
    return False
