"""Export a model's forward pass to ONNX, checked by ONNX Runtime against the model."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tjx_eval.errors import EvalError
from tjx_eval.load_model import TrainedModel
from tjx_nn import BertConfig, EncoderDecoderConfig, GPTConfig, TransformerConfig, ViTConfig, bind

FILE = "model.onnx"
DATA_FILE = FILE + ".data"
ATOL = 1e-4
# A protocol buffer file is limited to 2 GiB, including the graph.
_MAX_BYTES = (2 << 30) - (64 << 20)


def export_onnx(model: TrainedModel, folder: Path, *, batch: int, length: int) -> float:
    """Write model.onnx with fixed input shapes, and tokenizer.json.

    Parameters of more bytes than a protocol buffer holds are written to model.onnx.data.

    Parameters
    ----------
    model : TrainedModel
        A model of any family.
    folder : Path
        An existing folder. After an error, it may contain files; the caller deletes them.
    batch, length : int
        Rows, and tokens per row.

    Returns
    -------
    float
        Maximum absolute difference between the logits of ONNX Runtime and of the model.

    Raises
    ------
    EvalError
        If the export libraries are not installed or the logits differ by more than `ATOL`.
    """
    params = jax.device_get(model.params)
    jax2onnx, onnx_ir, onnxruntime = _import()
    # The file must not contain GPU kernels, and the check needs float32.
    dense = model.architecture.sparse.top_k is None  # sparse attention has a single backend
    config: Any = dataclasses.replace(
        model.architecture, attention_implementation="xla" if dense else None, dtype="float32"
    )
    inputs = example_inputs(config, batch, length)

    def forward(*values: Any) -> jax.Array:
        constants = jax.tree.map(jnp.asarray, params)
        logits: jax.Array = bind(config, constants)(**dict(zip(inputs, values, strict=True)))
        return logits

    on_device = jax.device_put(list(inputs.values()))
    # Clear the caches, because JAX and jax2onnx must not reuse each other's traces.
    with jax.transfer_guard("allow"), _restore_attributes(jnp, jax.lax, jax.nn):
        expected = np.asarray(jax.jit(forward)(*on_device))
        jax.clear_caches()  # type: ignore[no-untyped-call]  # JAX has no annotation
        converted = jax2onnx.to_onnx(
            forward,
            [jax.typeof(x) for x in on_device],
            model_name=model.path.resolve().name,
            input_names=list(inputs),
            output_names=["logits"],
            return_mode="ir",  # a protocol buffer would copy the parameters
        )
        jax.clear_caches()  # type: ignore[no-untyped-call]  # JAX has no annotation
    # The initializers: a parameter may have a transposed copy.
    size = sum(value.const_value.nbytes for value in converted.graph.initializers.values())
    onnx_ir.save(converted, folder / FILE, external_data=DATA_FILE if size > _MAX_BYTES else None)
    onnxruntime.set_default_logger_severity(3)
    (found,) = onnxruntime.InferenceSession(folder / FILE).run(None, inputs)
    difference = float(np.abs(found - expected).max())
    if not difference < ATOL:
        raise EvalError(
            f"{model.path}: ONNX Runtime's logits differ from the model's by {difference:.1e}, "
            f"more than {ATOL}; nothing was written"
        )
    if model.text_tokenizer is not None:
        model.text_tokenizer.save(folder / "tokenizer.json")
    return difference


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
        import onnx_ir  # pants: no-infer-dep  (jax2onnx requires it)
        import onnxruntime
    except ImportError as error:
        raise EvalError(
            f"ONNX needs jax2onnx and onnxruntime ({error}): pip install 'tjx-eval[onnx]'"
        ) from error
    return jax2onnx, onnx_ir, onnxruntime
