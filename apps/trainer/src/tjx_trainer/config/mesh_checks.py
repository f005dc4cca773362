"""Whether model, data and batch can be divided as the mesh says: told before anything is compiled.

Nothing here imports JAX.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict

from tjx_nn.config import TransformerConfig
from tjx_nn.models.bert_config import BertConfig
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.models.vit_config import ViTConfig
from tjx_parallel.config import AXES, MeshConfig
from tjx_trainer.config.train_config import TrainConfig


def known_axis_sizes(mesh: MeshConfig) -> dict[str, int]:
    """Return the size of each axis; what the number of devices decides counts as 1."""
    return {axis: max(1, size) for axis, size in asdict(mesh).items() if axis in AXES}


def mesh_problems(
    model: TransformerConfig,
    train: TrainConfig,
    mesh: MeshConfig,
    sizes: Mapping[str, int],
    *,
    tokens: int | None,
    vocabulary_known: bool,
) -> list[str]:
    """Say what a mesh does not divide, or cannot do, a line each.

    Parameters
    ----------
    model, train, mesh
        Sections of the configuration.
    sizes
        Of each axis of the mesh.
    tokens
        Of a row that the model reads; None where the data decide.
    vocabulary_known
        Whether the model's vocabulary is already that of its data.
    """
    checks = (
        _batch(train, mesh, sizes),
        _widths(model, mesh, sizes, vocabulary_known=vocabulary_known),
        _key_heads(model, sizes["tensor"]),
        _tokens(model, mesh, sizes, tokens),
        _context(model, mesh, sizes),
        _experts(model, sizes["expert"]),
        _stages(model, mesh, sizes["stage"]),
        _numbers(train, mesh, sizes["stage"]),
    )
    return [problem for check in checks for problem in check]


def batch_shards(sizes: Mapping[str, int]) -> int:
    """Return over how many places the rows of a batch are spread."""
    return math.prod(sizes[axis] for axis in ("data", "fsdp", "expert"))


def _batch(train: TrainConfig, mesh: MeshConfig, sizes: Mapping[str, int]) -> Iterator[str]:
    try:
        train.accumulation_for(
            batch_shards(sizes),
            stages=sizes["stage"],
            whole_rounds=mesh.pipeline == "interleaved_1f1b",
        )
    except ValueError as error:
        yield str(error)


def _widths(
    model: TransformerConfig,
    mesh: MeshConfig,
    sizes: Mapping[str, int],
    *,
    vocabulary_known: bool,
) -> Iterator[str]:
    rows = mesh.rows()
    vocabulary = {}
    if isinstance(model, GPTConfig):
        vocabulary = {"vocab_size": model.vocab_rows}
    elif isinstance(model, BertConfig | EncoderDecoderConfig):
        vocabulary = {"vocab_size": model.vocab_size}
    divided = {
        "tensor": {
            "n_head": ("heads", model.n_head),
            "d_ff": ("mlp", model.ff_dim),
            **({"experts.d_ff": ("mlp", model.expert_dim)} if model.experts.count else {}),
            **{name: ("vocab", size) for name, size in vocabulary.items() if vocabulary_known},
        },
        "fsdp": {"d_model": ("embed", model.d_model)},
    }
    for axis, dimensions in divided.items():
        for name, (logical, size) in dimensions.items():
            if logical not in rows and size % sizes[axis]:
                whole = f", or --mesh.rules {logical}= to keep it whole"
                yield (
                    f"mesh.{axis} {sizes[axis]} does not divide model.{name} {size}: give "
                    f"--mesh.{axis} {math.gcd(sizes[axis], size)} or another --model.{name}"
                    f"{whole if logical == 'vocab' else ''}"
                )


def _key_heads(model: TransformerConfig, tensor: int) -> Iterator[str]:
    if model.n_kv_head is None:
        return  # as many as there are heads
    heads = model.kv_heads
    if (heads % tensor and tensor % heads) or heads * model.head_dim % tensor:
        yield (
            f"mesh.tensor {tensor} and model.n_kv_head {heads}: one must be a multiple of the "
            f"other; give --mesh.tensor {math.gcd(tensor, heads)} or another --model.n_kv_head"
        )


def _tokens(
    model: TransformerConfig, mesh: MeshConfig, sizes: Mapping[str, int], tokens: int | None
) -> Iterator[str]:
    if tokens is None:
        return
    context, tensor = sizes["context"], sizes["tensor"]
    chunks = 2 * context if context > 1 and mesh.context_kind == "ring" else context
    if tokens % chunks:
        yield (
            f"mesh.context {context} does not divide {tokens} tokens of a row"
            f"{f' (in {chunks} pieces, as a ring wants)' if chunks > context else ''}: give a "
            f"--data.seq_len that is a multiple of {chunks}"
        )
    elif mesh.sequence_parallel and "residual" not in mesh.rows() and tokens % (context * tensor):
        yield (
            f"mesh.context {context} x mesh.tensor {tensor} does not divide {tokens} tokens of a "
            f"row: give {_other_length(model, context * tensor)}or --mesh.sequence_parallel false"
        )


def _other_length(model: TransformerConfig, unit: int) -> str:
    if isinstance(model, ViTConfig):
        return ""
    return f"a --data.seq_len that is a multiple of {unit}, "


def _context(model: TransformerConfig, mesh: MeshConfig, sizes: Mapping[str, int]) -> Iterator[str]:
    context, tensor = sizes["context"], sizes["tensor"]
    if context == 1:
        return
    if isinstance(model, ViTConfig):
        yield f"mesh.context {context}: patches of an image are not divided; give --mesh.context 1"
    if model.sparse.top_k is not None:
        yield (
            f"mesh.context {context} and model.sparse.top_k {model.sparse.top_k}: the indexer "
            "reads whole sequences; give --mesh.context 1"
        )
    if mesh.context_kind == "all_to_all":
        if model.n_head % (context * tensor):
            yield (
                f"mesh.context {context} x mesh.tensor {tensor} does not divide model.n_head "
                f"{model.n_head}, and all_to_all exchanges heads: give --mesh.context_kind ring"
            )
        return
    for name, given in (
        ("model.attention_dropout", model.attention_dropout or None),
        ("model.positions", "alibi" if model.positions == "alibi" else None),
    ):
        if given is not None:
            yield (
                f"mesh.context {context} and {name} {given}: a ring knows none; give "
                "--mesh.context_kind all_to_all"
            )


def _experts(model: TransformerConfig, places: int) -> Iterator[str]:
    if places == 1:
        return
    count = model.experts.count
    if count % places or not count:
        yield (
            f"mesh.expert {places} does not divide model.experts.count {count}: give --mesh.expert "
            f"{math.gcd(places, count) if count else 1}"
        )
    elif model.experts.capacity_factor is None:
        yield (
            f"mesh.expert {places} and model.experts.capacity_factor none: experts on other "
            "devices take a fixed number of tokens; give --model.experts.capacity_factor 1.25"
        )


def _stages(model: TransformerConfig, mesh: MeshConfig, stages: int) -> Iterator[str]:
    if stages == 1:
        return
    if isinstance(model, EncoderDecoderConfig):
        yield (
            f"mesh.stage {stages}: a pipeline takes one stack of blocks, and an encoder-decoder "
            "has two; give --mesh.stage 1"
        )
        return
    parts = stages * mesh.chunks_per_stage
    for problem in model.pipeline_problems(parts):
        yield f"mesh.stage {stages} with pipeline {mesh.pipeline}: {problem}"


def _numbers(train: TrainConfig, mesh: MeshConfig, stages: int) -> Iterator[str]:
    if mesh.reduce_dtype == "bfloat16" and train.precision not in ("bf16", "fp8"):
        yield (
            f"mesh.reduce_dtype bfloat16 and train.precision {train.precision}: gradients are "
            "summed at least as exactly as they are computed; give --train.precision bf16 or fp8"
        )
    if train.precision == "fp8" and stages > 1:
        yield (
            f"mesh.stage {stages} and train.precision fp8: a pipeline has no scale of a whole "
            "tensor; give --mesh.stage 1 or --train.precision bf16"
        )
