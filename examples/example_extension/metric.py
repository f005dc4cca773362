"""An evaluation metric: the entropy of the predictions."""

import jax
import jax.numpy as jnp

from tjx_metrics import register_metric


def entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the entropy of the prediction of each label [nats]; the metric is their mean."""
    del labels
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -(jnp.exp(log_probs) * log_probs).sum(-1)


register_metric(__name__, entropy)
