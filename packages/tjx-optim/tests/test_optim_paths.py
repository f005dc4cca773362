"""Decay is decided by what a parameter is, not by its rank."""

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tjx_optim import decay_mask, path_strings
from tjx_optim.param_paths import is_hidden_matrix

KINDS = {
    "kernel": True,
    "weight": True,
    "bias": False,
    "qkv_bias": False,
    "scale": False,
    "layer_scale": False,
    "scale_1": False,
    "kernel_1": True,
    "rescale": True,
    "unbias": True,
}


@given(
    st.dictionaries(
        st.sampled_from(["blocks", "bias", "scale", "mlp"]),
        st.dictionaries(st.sampled_from(sorted(KINDS)), st.integers(0, 4), min_size=1),
        min_size=1,
    )
)
def test_the_last_part_of_the_path_decides_whatever_the_rank(ranks: Any) -> None:
    params = jax.tree.map(lambda rank: np.zeros((2,) * rank), ranks)
    mask = decay_mask(params)
    for module, leaves in ranks.items():
        for name in leaves:
            assert mask[module][name] is KINDS[name]


@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_embeddings_decay_by_option(decay_embeddings: bool) -> None:
    params = {"wte": {"embedding": 0.0}, "position_embedding": 0.0, "embedding": {"kernel": 0.0},
              "cls": 0.0}  # fmt: skip
    assert decay_mask(params, decay_embeddings=decay_embeddings) == {
        "wte": {"embedding": decay_embeddings},
        "position_embedding": decay_embeddings,
        "cls": decay_embeddings,
        # A projection inside a module called embedding is a matrix.
        "embedding": {"kernel": True},
    }


def test_paths_name_dicts_and_sequences() -> None:
    assert path_strings({"a": [0.0, {"b": 0.0}]}) == {"a": ["a/0", {"b": "a/1/b"}]}


@pytest.mark.parametrize(
    ("path", "is_hidden"),
    [
        ("blocks/mlp/up/kernel", True),
        ("blocks/experts/up_kernel", True),
        ("head/dense/kernel", True),
        ("head/kernel", False),
        ("lm_head/kernel", False),
        ("wte/embedding", False),
        ("kernel/bias", False),
        ("norm/scale", False),
    ],
)
def test_matrices_of_hidden_layers_are_told_from_their_paths(path: str, is_hidden: bool) -> None:
    assert is_hidden_matrix(path) is is_hidden
