"""Checks that the mesh divides the model, the data and the batch. Imports no JAX."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict

from tjx_core import Problem, problems_of
from tjx_nn.config import TransformerConfig
from tjx_nn.models.bert_config import BertConfig
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.models.vit_config import ViTConfig
from tjx_parallel.config import AXES, MeshConfig
from tjx_trainer.config.train_config import TrainConfig


def known_axis_sizes(mesh: MeshConfig) -> dict[str, int]:
    """Return the size of each mesh axis; -1, which depends on the devices, counts as 1."""
    return {axis: max(1, size) for axis, size in asdict(mesh).items() if axis in AXES}


def mesh_problems(
    model: TransformerConfig,
    train: TrainConfig,
    mesh: MeshConfig,
    sizes: Mapping[str, int],
    *,
    tokens: int | None,
    vocabulary_known: bool,
) -> list[Problem]:
    """Return everything that a mesh cannot shard or does not support.

    Parameters
    ----------
    model, train, mesh
        Sections of the configuration.
    sizes
        Size of each mesh axis.
    tokens
        Length of a row that the model reads; None if it depends on the data.
    vocabulary_known
        Whether ``model.vocab_size`` is already that of the data.
    """
    checks = (
        _batch(train, mesh, sizes),
        _widths(model, mesh, sizes, vocabulary_known=vocabulary_known),
        _key_heads(model, sizes["tensor"]),
        _tokens(model, mesh, sizes, tokens),
        _context(model, mesh, sizes),
        _experts(model, sizes["expert"]),
        _stages(model, mesh, sizes["stage"]),
        _precision(train, mesh, sizes["stage"]),
        _reproducible(train, mesh, sizes),
    )
    return [problem for check in checks for problem in check]


def batch_shards(sizes: Mapping[str, int]) -> int:
    """Return the number of shards of the batch dimension."""
    return math.prod(sizes[axis] for axis in ("data", "fsdp", "expert"))


def _batch(train: TrainConfig, mesh: MeshConfig, sizes: Mapping[str, int]) -> Iterator[Problem]:
    try:
        train.accumulation_for(
            batch_shards(sizes),
            stages=sizes["stage"],
            whole_rounds=mesh.pipeline == "interleaved_1f1b",
        )
    except ValueError as error:
        yield from problems_of(error)


def _widths(
    model: TransformerConfig,
    mesh: MeshConfig,
    sizes: Mapping[str, int],
    *,
    vocabulary_known: bool,
) -> Iterator[Problem]:
    rows = mesh.rows()
    vocabulary = {}
    if isinstance(model, GPTConfig):
        vocabulary = {"vocab_size": model.vocab_rows}
    elif isinstance(model, BertConfig | EncoderDecoderConfig):
        vocabulary = {"vocab_size": model.vocab_size}
    sharded = {
        "tensor": {
            "n_head": ("heads", model.n_head),
            "d_ff": ("mlp", model.ff_dim),
            **({"experts.d_ff": ("mlp", model.expert_dim)} if model.experts.count else {}),
            **{name: ("vocab", size) for name, size in vocabulary.items() if vocabulary_known},
        },
        "fsdp": {"d_model": ("embed", model.d_model)},
    }
    for axis, dimensions in sharded.items():
        for name, (logical, size) in dimensions.items():
            if logical not in rows and size % sizes[axis]:
                whole = f", or --mesh.rules {logical}= to replicate it"
                yield Problem(
                    f"mesh.{axis}",
                    f"got {sizes[axis]}; expected a divisor of model.{name}={size}; give "
                    f"--mesh.{axis} {math.gcd(sizes[axis], size)} or another --model.{name}"
                    f"{whole if logical == 'vocab' else ''}",
                    (f"model.{name}",),
                )


def _key_heads(model: TransformerConfig, tensor: int) -> Iterator[Problem]:
    if model.n_kv_head is None:
        return  # as many as query heads
    heads = model.kv_heads
    if (heads % tensor and tensor % heads) or heads * model.head_dim % tensor:
        yield Problem(
            "mesh.tensor",
            f"got {tensor}; expected a divisor or a multiple of model.n_kv_head={heads}; give "
            f"--mesh.tensor {math.gcd(tensor, heads)} or another --model.n_kv_head",
            ("model.n_kv_head",),
        )


def _tokens(
    model: TransformerConfig, mesh: MeshConfig, sizes: Mapping[str, int], tokens: int | None
) -> Iterator[Problem]:
    if tokens is None:
        return
    context, tensor = sizes["context"], sizes["tensor"]
    chunks = 2 * context if context > 1 and mesh.context_kind == "ring" else context
    if tokens % chunks:
        ring = f", of {chunks} with ring attention" if chunks > context else ""
        yield Problem(
            "mesh.context",
            f"got {context}; expected rows whose length is a multiple of it{ring}, and a row has "
            f"{tokens} tokens; give a --data.seq_len that is a multiple of {chunks}",
            ("data.seq_len",),
        )
    elif mesh.sequence_parallel and "residual" not in mesh.rows() and tokens % (context * tensor):
        other = f"a --data.seq_len that is a multiple of {context * tensor}, "
        yield Problem(
            "mesh.sequence_parallel",
            f"got true with mesh.context {context} x mesh.tensor {tensor}; expected a divisor of "
            f"the {tokens} tokens of a row; give {'' if isinstance(model, ViTConfig) else other}or "
            "--mesh.sequence_parallel false",
            ("mesh.context", "mesh.tensor", "data.seq_len"),
        )


def _context(
    model: TransformerConfig, mesh: MeshConfig, sizes: Mapping[str, int]
) -> Iterator[Problem]:
    context, tensor = sizes["context"], sizes["tensor"]
    if context == 1:
        return
    if isinstance(model, ViTConfig):
        yield Problem(
            "mesh.context",
            f"got {context}; expected 1, as image patches are not sharded; give --mesh.context 1",
            ("model.family",),
        )
    if model.sparse.top_k is not None:
        yield Problem(
            "mesh.context",
            f"got {context}; expected 1 with model.sparse.top_k={model.sparse.top_k}, whose "
            "indexer reads whole sequences; give --mesh.context 1",
            ("model.sparse.top_k",),
        )
    if mesh.context_kind == "all_to_all":
        if model.n_head % (context * tensor):
            yield Problem(
                "mesh.context_kind",
                f"got all_to_all, which shards heads; expected mesh.context {context} x "
                f"mesh.tensor {tensor} to divide model.n_head={model.n_head}; give "
                "--mesh.context_kind ring",
                ("mesh.context", "mesh.tensor", "model.n_head"),
            )
        return
    for name, value in (
        ("model.attention_dropout", model.attention_dropout or None),
        ("model.positions", "alibi" if model.positions == "alibi" else None),
        ("model.relative_buckets", getattr(model, "relative_buckets", None)),
    ):
        if value is not None:
            yield Problem(
                "mesh.context_kind",
                f"got ring with {name}={value}; expected all_to_all, as ring attention does not "
                "support it; give --mesh.context_kind all_to_all",
                ("mesh.context", name),
            )


def _experts(model: TransformerConfig, shards: int) -> Iterator[Problem]:
    if shards == 1:
        return
    count = model.experts.count
    if count % shards or not count:
        yield Problem(
            "mesh.expert",
            f"got {shards}; expected a divisor of model.experts.count={count}; give --mesh.expert "
            f"{math.gcd(shards, count) if count else 1}",
            ("model.experts.count",),
        )
    elif model.experts.capacity_factor is None:
        yield Problem(
            "mesh.expert",
            f"got {shards} with model.experts.capacity_factor none; expected a number, as experts "
            "on other devices need a fixed capacity; give --model.experts.capacity_factor 1.25",
            ("model.experts.capacity_factor",),
        )


def _stages(model: TransformerConfig, mesh: MeshConfig, stages: int) -> Iterator[Problem]:
    if stages == 1:
        return
    if isinstance(model, EncoderDecoderConfig):
        yield Problem(
            "mesh.stage",
            f"got {stages}; expected 1, as a pipeline supports one stack of blocks and an "
            "encoder-decoder has two; give --mesh.stage 1",
            ("model.family",),
        )
        return
    for problem in model.pipeline_problems(stages * mesh.chunks_per_stage):
        yield Problem("mesh.stage", f"got {stages} with pipeline {mesh.pipeline}; {problem}")


def _precision(train: TrainConfig, mesh: MeshConfig, stages: int) -> Iterator[Problem]:
    if mesh.reduce_dtype == "bfloat16" and train.precision not in ("bf16", "fp8"):
        yield Problem(
            "mesh.reduce_dtype",
            f"got bfloat16 with train.precision={train.precision}; expected a type at least as "
            "precise as that of the gradients; give --train.precision bf16 or fp8",
            ("train.precision",),
        )
    if train.precision == "fp8" and stages > 1:
        yield Problem(
            "train.precision",
            f"got fp8 with mesh.stage={stages}; expected 1 stage, as fp8 needs the scale of whole "
            "tensors; give --mesh.stage 1 or --train.precision bf16",
            ("mesh.stage",),
        )


# Why an axis changes bits: the reason of `_reproducible`.
_OTHER_SUMS = {
    "stage": "a pipeline adds the gradients of its stages in another order",
    "context": "it splits the sums of attention over tokens",
    "expert": "the capacity of an expert depends on the sequences that its devices hold",
    "tensor": "it splits the sums of matrix products",
}


def _reproducible(
    train: TrainConfig, mesh: MeshConfig, sizes: Mapping[str, int]
) -> Iterator[Problem]:
    if train.reproducible == "none":
        return
    related = ("train.reproducible",)
    for axis, reason in _OTHER_SUMS.items():
        if sizes[axis] > 1:
            yield Problem(
                f"mesh.{axis}",
                f"got {sizes[axis]}; expected 1 with train.reproducible=mesh, as {reason}; give "
                f"--mesh.{axis} 1, or --train.reproducible none",
                related,
            )
    shards = sizes["data"] * sizes["fsdp"]
    if train.virtual_shards % shards:
        yield Problem(
            "train.virtual_shards",
            f"got {train.virtual_shards}; expected a multiple of mesh.data x mesh.fsdp = {shards}, "
            f"as each device computes whole virtual shards; give a power of 2 for both",
            ("mesh.data", "mesh.fsdp"),
        )
    if mesh.reduce_dtype != "float32":
        yield Problem(
            "mesh.reduce_dtype",
            f"got {mesh.reduce_dtype}; expected float32 with train.reproducible=mesh, which adds "
            "gradients in float32; leave it out",
            related,
        )
