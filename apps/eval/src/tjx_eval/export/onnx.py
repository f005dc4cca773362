"""Export a model's forward pass to ONNX, checked by ONNX Runtime against the model."""

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from tjx_eval.errors import EvalError
from tjx_eval.load_model import TrainedModel
from tjx_nn import BertConfig, EncoderDecoderConfig, GPTConfig, TransformerConfig, ViTConfig, bind

FILE = "model.onnx"
DATA_FILE = FILE + ".data"
ATOL = 1e-4
_PATCHED_MODULES = (jnp, jax.lax, jax.nn)
# A protocol buffer file is limited to 2 GiB, including the graph.
_MAX_BYTES = (2 << 30) - (64 << 20)
# With --length any, the longest sequence of the check.
_CHECKED_LENGTH = 128


def export_onnx(
    model: TrainedModel, folder: Path, *, batch: int | None, length: int | None
) -> float:
    """Write model.onnx with fixed or symbolic input shapes, and tokenizer.json.

    Parameters of more bytes than a protocol buffer holds are written to model.onnx.data.

    Parameters
    ----------
    model : TrainedModel
        A model of any family.
    folder : Path
        An existing folder. After an error, it may contain files; the caller deletes them.
    batch, length : int or None
        Rows, and tokens per row; None for any number, of tokens at most `max_seq_len`. ONNX Runtime
        is then checked at two shapes, and the exported attention holds all scores.

    Returns
    -------
    float
        Maximum absolute difference between the logits of ONNX Runtime and of the model.

    Raises
    ------
    EvalError
        If the export libraries are not installed, the logits differ by more than `ATOL`, or the
        model cannot have symbolic shapes.
    """
    params = jax.device_get(model.params)
    jax2onnx, onnx_ir, onnxruntime = _import()
    # The file must not contain GPU kernels, and the check needs float32.
    dense = model.architecture.sparse.top_k is None  # sparse attention has a single backend
    config: Any = dataclasses.replace(
        model.architecture, attention_implementation="xla" if dense else None, dtype="float32"
    )
    symbolic = None in (batch, length)
    # Chunked attention has loops over a static length; the dense reference has none.
    exported = (
        dataclasses.replace(config, attention_implementation="reference")
        if symbolic and dense
        else config
    )
    examples = [example_inputs(config, *shape) for shape in _checked_shapes(config, batch, length)]
    names = list(examples[0])
    native = [(module, dict(vars(module))) for module in _PATCHED_MODULES]

    def forward(config: Any, *values: Any) -> jax.Array:
        constants = jax.tree.map(jnp.asarray, params)
        logits: jax.Array = bind(config, constants)(**dict(zip(names, values, strict=True)))
        return logits

    def traced(*values: Any) -> jax.Array:
        if symbolic:  # jax2onnx's own functions have static shapes; it lowers JAX's primitives
            for module, attributes in native:
                vars(module).update(attributes)
        return forward(exported, *values)

    # Clear the caches, because JAX and jax2onnx must not reuse each other's traces.
    with jax.transfer_guard("allow"), _restore_attributes(*_PATCHED_MODULES):
        compute = jax.jit(functools.partial(forward, config))
        expected = [np.asarray(compute(*inputs.values())) for inputs in examples]
        jax.clear_caches()  # type: ignore[no-untyped-call]  # JAX has no annotation
        try:
            converted = jax2onnx.to_onnx(
                traced,
                _input_types(config, examples[0], batch, length),
                model_name=model.path.resolve().name,
                input_names=names,
                output_names=["logits"],
                return_mode="ir",  # a protocol buffer would copy the parameters
            )
        except Exception as error:
            if not symbolic:
                raise
            reason, _, _ = str(error).partition("\n")
            raise EvalError(
                f"{model.path}: the model cannot be traced with --batch or --length any "
                f"({type(error).__name__}: {reason}); give numbers"
            ) from error
        jax.clear_caches()  # type: ignore[no-untyped-call]  # JAX has no annotation
    # The initializers: a parameter may have a transposed copy.
    size = sum(value.const_value.nbytes for value in converted.graph.initializers.values())
    onnx_ir.save(converted, folder / FILE, external_data=DATA_FILE if size > _MAX_BYTES else None)
    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(folder / FILE)
    found = [session.run(None, inputs)[0] for inputs in examples]
    difference = max(float(np.abs(x - y).max()) for x, y in zip(found, expected, strict=True))
    if not difference < ATOL:
        raise EvalError(
            f"{model.path}: ONNX Runtime's logits differ from the model's by {difference:.1e}, "
            f"more than {ATOL}; nothing was written"
        )
    if model.text_tokenizer is not None:
        model.text_tokenizer.save(folder / "tokenizer.json")
    return difference


def _checked_shapes(
    config: TransformerConfig, batch: int | None, length: int | None
) -> list[tuple[int, int]]:
    """Return the batch sizes and lengths at which ONNX Runtime is compared with the model."""
    longest = min(_CHECKED_LENGTH, config.max_seq_len) if length is None else length
    shapes = [(batch or 1, longest), (batch or 3, length or longest // 2 + 1)]
    return list(dict.fromkeys(shapes))


def _input_types(
    config: TransformerConfig, inputs: dict[str, np.ndarray], batch: int | None, length: int | None
) -> list[Any]:
    """Return shapes and dtypes of the inputs, with a symbol for each size that is None."""
    scope = export.SymbolicScope([] if length else [f"length <= {config.max_seq_len}"])
    symbols = {
        axis: export.symbolic_shape(name, scope=scope)[0]
        for axis, (name, size) in enumerate((("batch", batch), ("length", length)))
        if size is None
    }
    return [
        jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]  # JAX has no annotation
            tuple(symbols.get(axis, size) for axis, size in enumerate(x.shape)), x.dtype
        )
        for x in inputs.values()
    ]


@contextmanager
def _restore_attributes(*modules: ModuleType) -> Iterator[None]:
    """Undo patches that jax2onnx leaves in JAX's modules (jnp.cumsum in version 0.17)."""
    before = [(module, dict(vars(module))) for module in modules]
    try:
        yield
    finally:
        for module, names in before:
            vars(module).update(names)


def example_inputs(config: TransformerConfig, batch: int, length: int) -> dict[str, np.ndarray]:
    """Return random inputs by name, in the order of the ONNX model's inputs."""
    rng = np.random.default_rng(0)
    if isinstance(config, ViTConfig):
        shape = (batch, *config.height_width, config.channels)
        return {"images": rng.standard_normal(shape, np.float32)}
    assert isinstance(config, GPTConfig | BertConfig | EncoderDecoderConfig)
    tokens = rng.integers(0, config.vocab_size, (batch, length), np.int32)
    mask = np.ones((batch, length), np.int32)
    mask[-1, length - length // 4 :] = 0
    if isinstance(config, BertConfig):
        types = {"token_types": np.zeros_like(tokens)} if config.n_token_types else {}
        return {"tokens": tokens, **types, "mask": mask}
    if isinstance(config, EncoderDecoderConfig):
        return {"source": tokens, "source_mask": mask, "tokens": tokens}
    return {"tokens": tokens}


def _import() -> tuple[Any, Any, Any]:
    try:
        import jax2onnx
        import onnxruntime
        from jax2onnx.user_interface import ir as onnx_ir  # of the version that it uses
    except ImportError as error:
        raise EvalError(
            f"ONNX needs jax2onnx and onnxruntime ({error}): pip install 'tjx-eval[onnx]'"
        ) from error
    return jax2onnx, onnx_ir, onnxruntime
