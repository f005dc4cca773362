"""Other attention for a trained decoder: latent attention by SVD, and the top-k keys by score."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax

import tjx_nn
import tjx_parallel
from tjx_eval.errors import EvalError
from tjx_nn.models.gpt_config import GPTConfig

if TYPE_CHECKING:
    from tjx_eval.load_model import TrainedModel


@dataclass(frozen=True)
class AttentionOptions:
    """Changes to the attention of a loaded decoder; None keeps a setting.

    Attributes
    ----------
    use_mla : int or None
        Rank of the latent of `tjx_nn.to_latent_attention`.
    mla_rope_heads : int or None
        Mixed key heads that keep their rotary embeddings; None is all.
    sparse_top_k : int or None
        Keys that each query attends to: the keys with the highest attention scores, of each head;
        in a model with a trained indexer, the selection of the indexer.
    """

    use_mla: int | None = None
    mla_rope_heads: int | None = None
    sparse_top_k: int | None = None


def convert_attention(model: "TrainedModel", options: AttentionOptions) -> "TrainedModel":
    """Change the attention of a decoder, before its kernels are quantized.

    Raises
    ------
    EvalError
        If the model is no decoder, or its attention cannot be converted; the message names the
        reason.
    """
    if options.mla_rope_heads is not None and options.use_mla is None:
        raise EvalError("--mla_rope_heads: got a number without --use_mla; give --use_mla too")
    if options == AttentionOptions():
        return model
    if not isinstance(model.architecture, GPTConfig):
        raise EvalError(
            f"--use_mla, --sparse_top_k: got a {model.architecture.family} model in {model.path}; "
            "expected a decoder; leave them out"
        )
    if options.use_mla is not None:
        model = _as_latent(model, options.use_mla, options.mla_rope_heads)
    if options.sparse_top_k is None:
        return model
    trained = model.gpt.sparse
    indexer = trained.top_k is not None and trained.indexer
    sparse = dataclasses.replace(trained, top_k=options.sparse_top_k, indexer=indexer)
    try:
        architecture = dataclasses.replace(model.gpt, sparse=sparse)
    except ValueError as error:
        raise EvalError(f"--sparse_top_k: {' '.join(str(error).split())}") from error
    return dataclasses.replace(model, architecture=architecture)


def _as_latent(model: "TrainedModel", rank: int, rope_heads: int | None) -> "TrainedModel":
    if jax.process_count() > 1:
        raise EvalError("--use_mla: got several processes; expected one; export the model first")
    try:
        architecture, params = tjx_nn.to_latent_attention(
            model.gpt, model.params, rank, rope_heads=rope_heads
        )
    except ValueError as error:
        raise EvalError(f"--use_mla: {'; '.join(str(error).splitlines())}") from error
    shardings = tjx_parallel.param_shardings(
        model.mesh,
        tjx_parallel.ShardingRules(),
        tjx_nn.logical_axes(architecture),
        jax.eval_shape(lambda: params),
    )
    return dataclasses.replace(
        model, architecture=architecture, params=jax.device_put(params, shardings)
    )
