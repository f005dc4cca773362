"""Parameter counts: published numbers, the formula, and the model that is built agree."""

import jax
import pytest

from tjx_nn import GPTConfig, count_params, flops_per_token, init

PUBLISHED = {
    "gpt2_small": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
}
VARIANTS = [
    GPTConfig(vocab_size=7, max_seq_len=5, n_layer=3, n_head=4, n_kv_head=2, d_model=8, d_ff=20),
    GPTConfig(vocab_size=7, max_seq_len=5, n_layer=1, n_head=4, n_kv_head=1, d_model=8, bias=False),
]


def built_params(config: GPTConfig) -> int:
    with jax.transfer_guard("allow"):
        shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    config = GPTConfig.preset(name)
    assert count_params(config) == PUBLISHED[name]
    assert built_params(config) == PUBLISHED[name]


@pytest.mark.parametrize("config", VARIANTS)
def test_formula_counts_every_variant(config: GPTConfig) -> None:
    assert count_params(config) == built_params(config)


def test_flops_of_a_model_counted_by_hand() -> None:
    config = GPTConfig(vocab_size=3, max_seq_len=4, n_layer=1, n_head=1, d_model=2, bias=False)
    matrices = 4 * 2 * 2 + 2 * 2 * 8 + 3 * 2  # attention, MLP, head
    norms = 3 * 2
    assert flops_per_token(config, 4) == 6 * (matrices + norms) + 12 * 1 * 4 * 2
