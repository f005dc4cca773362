"""An optimizer: the sign of the momentum (Bernstein et al. 2018, "signSGD")."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from tjx_optim import register_optimizer


def make_direction(settings: Mapping[str, float | bool]) -> optax.GradientTransformation:
    """Return the direction; clipping, weight decay and learning rate are applied around it."""
    sign = optax.stateless(lambda updates, _: jax.tree.map(jnp.sign, updates))
    return optax.chain(optax.trace(decay=settings["momentum"]), sign)


register_optimizer(__name__, make_direction, defaults={"momentum": 0.9})
