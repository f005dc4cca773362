"""Training loss of a model in the parts that pipeline stages compute: embedding, blocks, head."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from tjx_nn.binding import Params, bind
from tjx_nn.config import TransformerConfig
from tjx_nn.functional import init, logical_axes
from tjx_nn.id_checks import IGNORE_INDEX
from tjx_nn.layers.scan_layers import LayerRange
from tjx_nn.layout import SINGLE_DEVICE, Layout
from tjx_nn.losses import weighted_sum

Microbatch = Mapping[str, jax.Array]


class PipelineParts(NamedTuple):
    """Functions of one model for `tjx_parallel.pipeline_gradients`.

    Attributes
    ----------
    begin
        (outer parameters, microbatch) -> residual stream before the first block.
    run_stage
        (parameters of blocks, index of the first, residual stream, microbatch) -> (residual stream
        after them, (auxiliary loss, sums by name)).
    finish
        (outer parameters, residual stream, microbatch, selection of tokens) -> (sum of the losses,
        (number of labels, sums by name)).
    split
        Parameters -> (outer parameters, parameters of the blocks), with None for the others.
    merge
        Inverse of `split`, also for gradients.
    """

    begin: Callable[[Any, Microbatch], jax.Array]
    run_stage: Callable[[Any, jax.Array, jax.Array, Microbatch], Any]
    finish: Callable[[Any, jax.Array, Microbatch, Callable[[jax.Array], jax.Array]], Any]
    split: Callable[[Params], tuple[Any, Any]]
    merge: Callable[[Any, Any], Params]


def pipeline_parts(
    config: TransformerConfig, layout: Layout = SINGLE_DEVICE, *, chunks: int
) -> PipelineParts:
    """Divide the training loss of a model with one stack of blocks into pipeline stages.

    Parameters
    ----------
    config
        Configuration of the model; `config.pipeline_problems(chunks)` must be empty.
    layout
        Layout of the model on the mesh.
    chunks
        Number of equal parts of the blocks: stages times chunks per stage.

    Returns
    -------
    PipelineParts
        Functions for `tjx_parallel.pipeline_gradients`, and the split of the parameters.

    Examples
    --------
    >>> from tjx_nn import GPTConfig
    >>> config = GPTConfig(vocab_size=11, max_seq_len=8, n_layer=2, n_head=2, d_model=4)
    >>> parts = pipeline_parts(config, chunks=2)
    >>> outer, blocks = parts.split(init(config, jax.random.key(0)))
    >>> outer["blocks"]["ln_1"]["scale"] is None, blocks["blocks"]["ln_1"]["scale"].shape
    (True, (2, 4))
    """
    length = config.n_layer // chunks
    is_block = jax.tree.map(
        lambda axes: axes[:1] == ("layers",),
        logical_axes(config),
        is_leaf=lambda node: isinstance(node, tuple),
    )
    # Abstract blocks: `embed_tokens` and `token_losses` do not read them.
    abstract = jax.eval_shape(lambda: init(config, jax.random.key(0)))

    def split(params: Params) -> tuple[Any, Any]:
        outer, blocks = (
            jax.tree.map(lambda is_in, x, w=which: x if is_in == w else None, is_block, params)
            for which in (False, True)
        )
        return outer, blocks

    def merge(outer: Any, blocks: Any) -> Params:
        merged: Params = jax.tree.map(
            lambda is_in, a, b: b if is_in else a, is_block, outer, blocks,
            is_leaf=lambda node: node is None,
        )  # fmt: skip
        return merged

    def model_of(outer: Any, blocks: Any, n_layer: int | None = None) -> Any:
        return bind(config, merge(outer, blocks), layout=layout, n_layer=n_layer)

    def begin(outer: Any, microbatch: Microbatch) -> jax.Array:
        x: jax.Array = model_of(outer, abstract).embed_tokens(**_inputs(microbatch))
        return x

    def run_stage(blocks: Any, first: jax.Array, x: jax.Array, microbatch: Microbatch) -> Any:
        x, [aux_losses] = model_of(abstract, blocks, length).run_blocks(
            x, **_inputs(microbatch), layers=LayerRange(first, length)
        )
        count = (microbatch["labels"] != IGNORE_INDEX).sum()
        sums = {name: count * each.sum() / config.n_layer for name, each in aux_losses.items()}
        return x, (weighted_sum(config, sums), sums)

    def finish(
        outer: Any, x: jax.Array, microbatch: Microbatch, take: Callable[[jax.Array], jax.Array]
    ) -> Any:
        labels = microbatch["labels"]
        if labels.ndim > 1:
            labels = take(layout.reorder(labels))
        losses, head_losses = model_of(outer, abstract).token_losses(x, labels)
        cross_entropy, count = losses.sum(), (labels != IGNORE_INDEX).sum()
        sums = {name: count * value.mean() for name, value in head_losses.items()}
        loss = cross_entropy + weighted_sum(config, sums) if sums else cross_entropy
        return loss, (count, {"loss": cross_entropy, **sums})

    return PipelineParts(begin, run_stage, finish, split, merge)


def _inputs(microbatch: Microbatch) -> dict[str, jax.Array]:
    """Return the model inputs of a microbatch: all entries but the labels."""
    return {name: x for name, x in microbatch.items() if name != "labels"}
