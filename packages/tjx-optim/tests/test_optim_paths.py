"""Roles of parameters: weight decay and hidden matrices by path."""

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tjx_optim import decay_mask, path_strings
from tjx_optim.param_rules import is_hidden_matrix

KINDS = {
    "kernel": True,
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
def test_the_name_decides_for_any_rank(ranks: Any) -> None:
    params = jax.tree.map(lambda rank: np.zeros((2,) * rank), ranks)
    mask = decay_mask(params)
    for module, leaves in ranks.items():
        for name in leaves:
            assert mask[module][name] is KINDS[name]


@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_embeddings_decay_optionally(decay_embeddings: bool) -> None:
    params = {"wte": {"embedding": 0.0}, "position_embedding": 0.0, "embedding": {"kernel": 0.0},
              "cls": 0.0}  # fmt: skip
    assert decay_mask(params, decay_embeddings=decay_embeddings) == {
        "wte": {"embedding": decay_embeddings},
        "position_embedding": decay_embeddings,
        "cls": decay_embeddings,
        # A projection inside a module called embedding is a matrix.
        "embedding": {"kernel": True},
    }


def test_paths_of_dicts_and_sequences() -> None:
    assert path_strings({"a": [0.0, {"b": 0.0}]}) == {"a": ["a/0", {"b": "a/1/b"}]}


@pytest.mark.parametrize(
    ("path", "axes", "is_hidden"),
    [
        ("blocks/mlp/up/kernel", 2, True),
        ("blocks/experts/up_kernel", 2, True),
        ("head/dense/kernel", 2, True),
        ("head/kernel", 2, False),
        ("lm_head/kernel", 2, False),
        ("wte/embedding", 2, False),
        ("kernel/bias", 1, False),
        ("norm/scale", 1, False),
        ("linear/w", 2, True),
        ("linear/b", 1, False),
        ("layers/0/weight", 2, True),
        ("norm/weight", 1, False),
        ("embedding/weight", 2, False),
        ("head/weight", 2, False),
    ],
)
def test_hidden_matrices_are_recognized_by_path(path: str, axes: int, is_hidden: bool) -> None:
    assert is_hidden_matrix(path, axes) is is_hidden


def test_the_rank_decides_only_for_names_that_frameworks_use_for_several_roles() -> None:
    params = {
        name: {"matrix": {name: np.zeros((3, 2))}, "norm": {name: np.zeros(3)}}
        for name in ("w", "weight")
    }
    for name, mask in decay_mask(params).items():
        assert mask == {"matrix": {name: True}, "norm": {name: False}}
