r"""Export the forward pass of a model to ONNX, and check it with ONNX Runtime.

The model is read by `tjx_nn.hf` from a transformers folder; its weights go into the ONNX file,
which holds at most 2 GB. Sizes of inputs are fixed. jax2onnx needs an older orbax than this
repository, so this runs in an environment of its own, made of tools/locks/onnx.txt:

    PYTHONPATH=packages/tjx-kernels/src:packages/tjx-nn/src \
        python tools/export_onnx.py MODEL_FOLDER model.onnx --length 128
"""

import argparse
import pathlib
from typing import Any

import jax
import numpy as np

from tjx_nn import (
    BertConfig,
    EncoderDecoderConfig,
    GPTConfig,
    TransformerConfig,
    ViTConfig,
    bind,
    hf,
)

ATOL = 1e-4


def example_inputs(config: TransformerConfig, batch: int, length: int) -> dict[str, np.ndarray]:
    """Return random inputs by name, in the order of the ONNX model's."""
    rng = np.random.default_rng(0)
    if isinstance(config, ViTConfig):
        shape = (batch, *config.height_width, config.channels)
        return {"images": rng.standard_normal(shape, np.float32)}
    assert isinstance(config, GPTConfig | BertConfig | EncoderDecoderConfig)
    tokens = rng.integers(0, config.vocab_size, (batch, length), np.int32)
    mask = np.ones((batch, length), np.int32)
    mask[-1, length - length // 4 :] = 0
    if isinstance(config, BertConfig):
        return {"tokens": tokens, "token_types": np.zeros_like(tokens), "mask": mask}
    if isinstance(config, EncoderDecoderConfig):
        return {"source": tokens, "source_mask": mask, "tokens": tokens}
    return {"tokens": tokens}


def export(folder: pathlib.Path, path: pathlib.Path, batch: int, length: int) -> float:
    """Write the ONNX file; return by how much ONNX Runtime's logits differ from ours."""
    config: Any  # each kind of configuration is bound to its own kind of model
    config, params = hf.load(folder)
    inputs = example_inputs(config, batch, length)

    def forward(*values: Any) -> jax.Array:
        logits: jax.Array = bind(config, params)(**dict(zip(inputs, values, strict=True)))
        return logits

    expected = np.asarray(jax.jit(forward)(*inputs.values()))
    # What was traced before would keep jax2onnx from tracing it in its own way.
    jax.clear_caches()  # type: ignore[no-untyped-call]  # as jax is

    import jax2onnx  # type: ignore[import-not-found]  # pants: no-infer-dep
    import onnxruntime  # type: ignore[import-not-found]  # pants: no-infer-dep

    shapes = [jax.typeof(x) for x in inputs.values()]
    model = jax2onnx.to_onnx(
        forward, shapes, model_name=folder.name, input_names=list(inputs), output_names=["logits"]
    )
    path.write_bytes(model.SerializeToString())
    onnxruntime.set_default_logger_severity(3)
    (found,) = onnxruntime.InferenceSession(path).run(None, inputs)
    return float(np.abs(found - expected).max())


def main() -> None:
    """Export the model that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="config.json and safetensors")
    parser.add_argument("output", type=pathlib.Path, help="the ONNX file")
    parser.add_argument("--batch", type=int, default=1, help="rows (default 1)")
    parser.add_argument("--length", type=int, default=16, help="tokens of a row (default 16)")
    arguments = parser.parse_args()
    difference = export(arguments.folder, arguments.output, arguments.batch, arguments.length)
    size = arguments.output.stat().st_size
    print(f"{arguments.output}: {size} bytes, logits differ from ours by {difference:.1e}")
    if not difference < ATOL:
        raise SystemExit(f"that is more than {ATOL}")


if __name__ == "__main__":
    main()
