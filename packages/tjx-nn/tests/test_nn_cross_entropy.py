"""Cross-entropy on masked labels equals the loss of fine-tuning in TRL."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from tjx_kernels import linear_cross_entropy
from tjx_nn import cross_entropy
from tjx_nn.id_checks import IGNORE_INDEX


def test_mean_over_labels_is_the_loss_of_sft_in_trl() -> None:
    with np.load(Path(__file__).parent / "golden" / "trl_sft.npz") as file:
        golden = dict(file)
    is_label = golden["mask"] > 0
    labels = jax.device_put(np.where(is_label, golden["ids"], IGNORE_INDEX).astype(np.int32))
    logits = golden["logits"].astype(np.float32)
    n_labels = int(is_label.sum())
    rows = logits.reshape(-1, logits.shape[-1])

    def of_logits(logits: Any) -> Any:
        return cross_entropy(logits, labels).sum() / n_labels

    def as_in_training(rows: Any) -> Any:
        # An identity as the output head: the hidden states are the logits.
        head: Any = np.eye(rows.shape[-1], dtype=np.float32)
        return linear_cross_entropy(rows, head, labels.reshape(-1)).sum() / n_labels

    for loss, x in ((of_logits, logits), (as_in_training, rows)):
        value, gradient = jax.jit(jax.value_and_grad(loss))(jax.device_put(x))
        np.testing.assert_allclose(value, golden["sft_loss"], rtol=1e-6)
        np.testing.assert_allclose(
            np.asarray(gradient).reshape(logits.shape), golden["sft_gradient"], atol=1e-6
        )
