"""Distillation: the divergence of a decoder's next tokens from those of a teacher.

Axes in names: B batch, T time, D d_model, V vocabulary.
"""

from typing import NamedTuple, Unpack

import jax
from jaxtyping import Array, Float, Float32

from tjx_kernels import linear_kl_divergence
from tjx_nn.inputs import GPTInputs, Ids
from tjx_nn.layers.scan_layers import AuxLosses
from tjx_nn.layout import gather_sequence
from tjx_nn.losses import Losses, combine_losses, head_losses
from tjx_nn.models.gpt import GPT
from tjx_nn.models.multi_token import multi_token_losses


class DistillationLosses(NamedTuple):
    """Losses of a student.

    Attributes
    ----------
    student
        As of `GPT.losses`.
    divergences
        KL(teacher || student) of the next token at each position in nats, float32 [batch, tokens],
        also where the label is ignored.
    """

    student: Losses
    divergences: Float32[Array, "B T"]


def distillation_losses(
    student: GPT,
    teacher: GPT,
    tokens: Ids,
    labels: Ids,
    *,
    temperature: float = 1.0,
    **inputs: Unpack[GPTInputs],
) -> DistillationLosses:
    """Compute the losses of a student and its divergence from a teacher, without all logits.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2: train on
    the sum of the cross-entropy and the divergence times temperature^2, which keeps the size of its
    gradient.

    Parameters
    ----------
    student, teacher
        Decoders of one vocabulary, bound to parameters. The teacher is not differentiated, and has
        no dropout and no capacity of experts.
    tokens, labels, **inputs
        As for `GPT.losses`.
    temperature
        Divisor of the logits of both models in the divergence.

    Returns
    -------
    DistillationLosses
        Losses and divergences of each token.

    Raises
    ------
    ValueError
        If the vocabularies have different sizes.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from tjx_nn import GPTConfig, bind, distillation_losses, init
    >>> config = GPTConfig(vocab_size=11, max_seq_len=8, n_layer=2, n_head=2, d_model=4)
    >>> make = jax.jit(init, static_argnums=0)
    >>> model, other = (bind(config, make(config, jax.random.key(seed))) for seed in (0, 1))
    >>> tokens = jnp.array([[1, 2, 3, 4]])
    >>> losses = distillation_losses(model, other, tokens[:, :-1], tokens[:, 1:], temperature=2.0)
    >>> losses.divergences.shape
    (1, 3)
    """
    head, aux_losses = _head(student, tokens, labels, **inputs)
    inputs.pop("dropout_key", None)
    target, _ = _head(teacher, tokens, None, **inputs)
    if head.vocab_size != target.vocab_size:
        raise ValueError(
            f"teacher: got a vocabulary of {target.vocab_size}; expected {head.vocab_size}, that "
            "of the student; give models of the same tokenizer"
        )
    layout = student.layout
    token_losses, z_loss = head_losses(
        head.hidden,
        head.rows,
        layout.reorder(labels),
        soft_cap=head.soft_cap,
        vocab_size=head.vocab_size,
        token_shards=layout.token_shards,
        keep_logits=layout.keep_logits,
        z_loss=student.config.z_loss,
    )
    with jax.named_scope("distillation"):
        divergences = linear_kl_divergence(
            head.hidden,
            head.rows,
            jax.lax.stop_gradient(target.hidden),
            jax.lax.stop_gradient(target.rows),
            temperature=temperature,
            vocab_size=head.vocab_size,
            soft_cap=head.soft_cap,
            teacher_soft_cap=target.soft_cap,
            token_shards=layout.token_shards,
        )
    losses = combine_losses(student.config, layout.restore(token_losses), [*aux_losses, z_loss])
    return DistillationLosses(losses, layout.restore(divergences))


class _Head(NamedTuple):
    """Inputs of an output head: hidden states in device order, and rows of the table."""

    hidden: Float[Array, "B T D"]
    rows: Float[Array, "V D"]
    soft_cap: float | None
    vocab_size: int


def _head(
    model: GPT, tokens: Ids, labels: Ids | None, **inputs: Unpack[GPTInputs]
) -> tuple[_Head, list[AuxLosses]]:
    """Return the inputs of the output head, and the other auxiliary losses of a student.

    A teacher, which has no labels, has no capacity of experts either.
    """
    # Gather a tied table once: its gradient is also reduced once.
    rows = model.wte.rows()
    x = model.embed_tokens(tokens, rows, **inputs)
    x, aux_losses = model.run_blocks(x, tokens, drop_tokens=labels is not None, **inputs)
    if labels is not None and model.multi_token is not None:
        aux_losses += multi_token_losses(model, x, tokens, labels, rows, **inputs)
    x = x if model.ln_f is None else model.ln_f(x)
    hidden = gather_sequence(model.layout, x) * model.logit_scale
    rows = rows if model.head is None else model.head.rows()
    size = model.config.tokenizer_size or model.config.vocab_size
    return _Head(hidden, rows, model.config.logit_soft_cap, size), aux_losses
