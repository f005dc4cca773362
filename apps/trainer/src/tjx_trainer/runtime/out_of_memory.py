"""Detection and generic explanation of out-of-memory errors, without importing JAX."""

_GENERAL = (
    "a smaller --train.device_batch_size (or a larger --train.accumulation): the same result",
    "--model.remat full: the same result, about a third slower",
    "--optimizer.moment_dtype bfloat16, --train.precision bf16: needs a new run",
    "a smaller --train.batch_size, --data.seq_len or model: needs a new run",
)


class OutOfMemoryError(RuntimeError):
    """A device or the host has too little memory for the run; the message lists remedies."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is an out-of-memory error of a device or the host."""
    if isinstance(error, (OutOfMemoryError, MemoryError)):
        return True
    # Compare the class name, because importing the class imports JAX. Work that was already
    # dispatched fails with another status but the same words.
    is_jax = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    text = str(error)
    return is_jax and ("RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower())


def headline(error: BaseException) -> str:
    """Return the first line of an out-of-memory error."""
    text = (str(error).splitlines() or [type(error).__name__])[0][:300]
    return f"out of memory: {text}"


def explain(error: BaseException) -> str:
    """Return the error with generic advice, cheapest first."""
    if isinstance(error, OutOfMemoryError):
        return str(error)
    return "\n".join(
        [
            headline(error),
            "Flags that reduce memory, cheapest first:",
            *(f"  {a}" for a in _GENERAL),
        ]
    )
