"""Running out of memory: how it is known, and what is said where nothing of the run is known.

Nothing here imports JAX: the program's start reads it. See `tjx_trainer.runtime.memory_report`.
"""

_GENERAL = (
    "a smaller --train.device_batch_size (or a larger --train.accumulation): the same result",
    "--model.remat full: the same result, about a third slower",
    "--optimizer.moment_dtype bfloat16, --train.precision bf16: another run",
    "a smaller --train.batch_size, --data.seq_len or model: another run",
)


class OutOfMemoryError(RuntimeError):
    """A device or the host has too little memory for the run; the message says what would help."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is that of memory that was not to be had, on a device or the host."""
    if isinstance(error, (OutOfMemoryError, MemoryError)):
        return True
    # By its name: to import the class is to import JAX. What was already dispatched when memory
    # ran out has another status, and the same words.
    is_jax = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    said = str(error)
    return is_jax and ("RESOURCE_EXHAUSTED" in said or "out of memory" in said.lower())


def headline(error: BaseException) -> str:
    """Say in a line what could not be had."""
    said = (str(error).splitlines() or [type(error).__name__])[0][:300]
    return f"out of memory: {said}"


def explain(error: BaseException) -> str:
    """Say in lines what failed and what takes less, cheapest first."""
    if isinstance(error, OutOfMemoryError):
        return str(error)
    return "\n".join(
        [headline(error), "What takes less, cheapest first:", *(f"  {line}" for line in _GENERAL)]
    )
