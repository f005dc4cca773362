"""Low-rank adapters: merging, gradients, logical axes, and PEFT's files.

`tools/golden/make_peft_golden.py` wrote the golden folders peft_*.
"""

import functools
import json
import math
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from tjx_nn import GPTConfig, LoRAConfig, bind, hf, init, logical_axes, lora
from tjx_nn.binding import Params
from tjx_nn.lora.adapter import column_norms

GOLDEN = pathlib.Path(__file__).parent / "golden"
TINY = GPTConfig(vocab_size=23, max_seq_len=16, n_layer=2, n_head=4, n_kv_head=2, d_model=24)
TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, TINY.max_seq_len), np.int32)
flatten: Any = flatten_dict
unflatten: Any = unflatten_dict
LORA = LoRAConfig(rank=3, alpha=6.0, targets="attention.*,blocks.mlp.up")
DORA = LoRAConfig(rank=2, targets="query,mlp.*", dora=True)


@functools.partial(jax.jit, static_argnames=("config", "low_rank"))
def adapted_logits(
    config: Any, low_rank: Any, params: Params, adapters: Any, tokens: Any
) -> jax.Array:
    found: jax.Array = lora.bind(config, low_rank, params, adapters)(tokens)
    return found


@functools.partial(jax.jit, static_argnames="config")
def plain_logits(config: Any, params: Params, tokens: Any) -> jax.Array:
    found: jax.Array = bind(config, params)(tokens)
    return found


@pytest.fixture(scope="module")
def params() -> Params:
    made: Params = jax.jit(lambda: init(TINY, jax.random.key(0)))()
    return made


@functools.partial(jax.jit, static_argnames="low_rank")
def merged(params: Params, adapters: Any, low_rank: LoRAConfig) -> Params:
    return lora.merge(params, adapters, low_rank)


@functools.partial(jax.jit, static_argnames="low_rank")
def new_adapters(low_rank: LoRAConfig, params: Params) -> Any:
    return lora.init(TINY, low_rank, jax.random.key(1), params)


@functools.cache
def shapes_of(low_rank: LoRAConfig, config: Any = TINY) -> Any:
    weights = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return jax.eval_shape(lambda p: lora.init(config, low_rank, jax.random.key(1), p), weights)


def random_adapters(low_rank: LoRAConfig, params: Params) -> Any:
    """Return adapters without zeros, of the size of the kernels."""
    rng = np.random.default_rng(3)
    first = jax.device_get(new_adapters(low_rank, params))

    def noisy(path: Any, x: np.ndarray) -> np.ndarray:
        noise = rng.standard_normal(x.shape).astype(np.float32)
        return x * (1 + 0.1 * noise) if path[-1].key == "magnitude" else 0.05 * noise

    return jax.device_put(jax.tree.map_with_path(noisy, first))


@pytest.mark.parametrize("low_rank", [LORA, DORA], ids=["lora", "dora"])
def test_merged_equals_unmerged_and_new_adapters_change_nothing(
    low_rank: LoRAConfig, params: Params
) -> None:
    adapters = random_adapters(low_rank, params)
    found = jax.device_get(adapted_logits(TINY, low_rank, params, adapters, jax.device_put(TOKENS)))
    expected = jax.device_get(
        plain_logits(TINY, merged(params, adapters, low_rank), jax.device_put(TOKENS))
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    plain = jax.device_get(plain_logits(TINY, params, jax.device_put(TOKENS)))
    assert np.abs(found - plain).max() > 1e-3
    new = new_adapters(low_rank, params)
    unchanged = jax.device_get(adapted_logits(TINY, low_rank, params, new, jax.device_put(TOKENS)))
    np.testing.assert_allclose(unchanged, plain, rtol=0, atol=1e-6)


def test_unmerge_recovers_the_parameters(params: Params) -> None:
    adapters = random_adapters(LORA, params)
    both = jax.jit(lambda p, a: lora.unmerge(lora.merge(p, a, LORA), a, LORA))
    for found, expected in zip(
        jax.tree.leaves(both(params, adapters)), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match=r"lora\.dora: got True; expected LoRA"):
        lora.unmerge(params, adapters, DORA)


def test_gradient_equals_that_of_merged_parameters(params: Params) -> None:
    adapters = random_adapters(DORA, params)
    labels = np.roll(TOKENS, -1, 1)

    def loss(model: Any) -> jax.Array:
        total: jax.Array = model.losses(TOKENS, labels).tokens.mean()
        return total

    def with_constant_norms(adapters: Any) -> Any:
        # Merging divides by the norms of kernel + change, which DoRA does not differentiate.
        flat = flatten(adapters)
        low_rank = {path: x for path, x in flat.items() if path[-1] != "magnitude"}
        changed = flatten(lora.merge(params, unflatten(low_rank), DORA))
        for path in flat.keys() - low_rank.keys():
            norms = column_norms(changed[*path[:-1], "kernel"])
            flat[path] = flat[path] * norms / jax.lax.stop_gradient(norms)
        return unflatten(flat)

    @jax.jit
    def gradients(adapters: Any) -> Any:
        through_layers = jax.grad(lambda a: loss(lora.bind(TINY, DORA, params, a)))
        through_merge = jax.grad(
            lambda a: loss(bind(TINY, lora.merge(params, with_constant_norms(a), DORA)))
        )
        return through_layers(adapters), through_merge(adapters)

    found, expected = jax.device_get(gradients(adapters))
    for path, x in jax.tree_util.tree_leaves_with_path(expected):
        assert np.abs(x).max() > 1e-6, path
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7), found, expected
    )


def test_base_in_bfloat16_gives_float32_gradients(params: Params) -> None:
    adapters = random_adapters(DORA, params)

    def loss(adapters: Any) -> jax.Array:
        narrow = jax.tree.map_with_path(
            lambda path, x: x.astype(jnp.bfloat16) if path[-1].key == "kernel" else x, params
        )
        model = lora.bind(TINY, DORA, narrow, adapters)
        total: jax.Array = model.losses(TOKENS, TOKENS).tokens.mean()
        return total

    gradients = jax.device_get(jax.jit(jax.grad(loss))(adapters))
    assert {str(x.dtype) for x in jax.tree.leaves(gradients)} == {"float32"}
    assert all(np.isfinite(x).all() and np.abs(x).max() > 0 for x in jax.tree.leaves(gradients))


def test_axes_and_stacks_are_those_of_the_kernels() -> None:
    axes, kernels = lora.logical_axes(TINY, DORA), logical_axes(TINY)
    query = axes["blocks"]["attention"]["query"]
    assert kernels["blocks"]["attention"]["query"]["kernel"] == ("layers", "embed", "heads")
    assert query == {
        "a": ("layers", "embed", None), "b": ("layers", None, "heads"),
        "magnitude": ("layers", "heads"),
    }  # fmt: skip
    shapes = shapes_of(DORA)
    jax.tree.map(lambda shape, depth: (shape, depth), shapes, lora.stack_axes(TINY, DORA))
    assert set(jax.tree.leaves(lora.stack_axes(TINY, DORA))) == {1}
    assert set(shapes["blocks"]["mlp"]) == {"up", "down"}
    assert shapes["blocks"]["mlp"]["down"]["a"].shape == (2, 96, 2)


def test_adapters_of_gpt2_small_are_small() -> None:
    config = GPTConfig(vocab_size=50257, max_seq_len=1024, n_layer=12, n_head=12, d_model=768)

    def count(tree: Any) -> int:
        return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))

    full = count(jax.eval_shape(lambda: init(config, jax.random.key(0))))
    assert 3 * count(shapes_of(LoRAConfig(rank=8), config)) <= 0.03 * 2 * full


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: got 0; expected an integer of at least 1"),
        ({"rank": 1, "alpha": 0.0}, r"alpha: got 0\.0; expected a finite number above 0"),
        ({"rank": 1, "targets": " , "}, "targets: got ' , '; expected patterns"),
    ],
)
def test_invalid_values_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**options)


def test_patterns_without_a_layer_and_wrong_adapters_are_refused() -> None:
    wrong = LoRAConfig(rank=2, targets="query,wte,gate")
    with pytest.raises(ValueError, match=r"lora\.targets: got wte, gate; expected .*mlp\.up"):
        shapes_of(wrong)
    with pytest.raises(ValueError, match="params: got None; DoRA needs"):
        jax.eval_shape(lambda: lora.init(TINY, DORA, jax.random.key(0)))
    shapes = shapes_of(LORA)
    moved = {"blocks": {"attention": {**shapes["blocks"]["attention"], "gate": {"a": TOKENS}}}}
    with pytest.raises(ValueError, match=r"mlp\.up\.a: got none; .*[\s\S]*gate\.a: got one"):
        lora.bind(TINY, LORA, {}, moved)


def assert_equal_merged(base: Params, *pairs: tuple[Any, LoRAConfig]) -> None:
    both = [jax.device_get(merged(base, adapters, low_rank)) for adapters, low_rank in pairs]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), *both)


def load_golden(name: str) -> tuple[Any, Params, LoRAConfig, Any]:
    config, base = hf.load(GOLDEN / name.split("_")[1])
    low_rank, adapters = lora.load(GOLDEN / name, config)
    return config, base, low_rank, adapters


@pytest.mark.parametrize("name", ["peft_llama", "peft_llama_dora", "peft_gpt2"])
def test_adapters_of_peft_give_the_same_logits_and_are_saved_as_they_are(
    name: str, tmp_path: pathlib.Path
) -> None:
    config, base, low_rank, adapters = load_golden(name)
    with np.load(GOLDEN / name / "golden.npz") as file:
        tokens, expected = file["tokens"].astype(np.int32), file["logits"]
    base, adapters, tokens = jax.device_put((base, adapters, tokens))
    found = jax.device_get(adapted_logits(config, low_rank, base, adapters, tokens))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    lora.save(tmp_path, config, low_rank, adapters)
    again, read = lora.load(tmp_path, config)
    assert again.scale == low_rank.scale
    assert_equal_merged(base, (adapters, low_rank), (jax.device_put(read), again))
    if name != "peft_gpt2":  # its fused layers and patterns are written in another form
        theirs, ours = (load_file(f / lora.peft.WEIGHTS) for f in (GOLDEN / name, tmp_path))
        assert theirs.keys() == ours.keys()
        assert all(np.array_equal(theirs[key], ours[key]) for key in theirs)


def test_query_alone_of_a_fused_layer_is_saved(tmp_path: pathlib.Path) -> None:
    config, base = hf.load(GOLDEN / "gpt2")
    low_rank = LoRAConfig(rank=2, targets="query,value")
    shapes = shapes_of(low_rank, config)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype("f"), shapes)
    lora.save(tmp_path, config, low_rank, adapters)
    content = json.loads((tmp_path / lora.peft.CONFIG).read_text())
    assert content["rank_pattern"] == dict.fromkeys(content["target_modules"], 4)
    low, read = lora.load(tmp_path, config)
    base, adapters, read = jax.device_put((base, adapters, read))
    assert_equal_merged(base, (adapters, low_rank), (read, low))
    dora = LoRAConfig(rank=2, targets="query", dora=True)
    ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes_of(dora, config))
    with pytest.raises(ValueError, match="expected all of them with DoRA"):
        lora.save(tmp_path, config, dora, ones)


def test_layers_without_an_adapter_get_zeros(tmp_path: pathlib.Path) -> None:
    folder = shutil.copytree(GOLDEN / "peft_llama", tmp_path / "some")
    tensors = load_file(folder / lora.peft.WEIGHTS)
    n_before = len(tensors)
    tensors = {name: x for name, x in tensors.items() if ".layers.0.mlp.up_proj" not in name}
    assert len(tensors) == n_before - 2
    save_file(tensors, folder / lora.peft.WEIGHTS)
    _, adapters = lora.load(folder, hf.load(GOLDEN / "llama")[0])
    assert not adapters["blocks"]["mlp"]["up"]["b"][0].any()
    assert adapters["blocks"]["mlp"]["up"]["b"][1].any()


Change = Callable[[dict[str, Any], dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, _: c.update(peft_type="IA3"), "got peft_type 'IA3'; expected 'LORA'"),
        (lambda c, _: c.update(bias="all"), "bias: got 'all'; expected 'none'"),
        (lambda c, _: c.update(modules_to_save=["head"]), r"modules_to_save: got \['head'\]"),
        (lambda c, _: c.update(r="3"), "got r '3'"),
        (lambda c, _: c.update(alpha_pattern={"(.*)+x": 1}), "not regular expressions"),
        (lambda _, t: t.popitem(), r"lora_[AB]\.weight is missing"),
        (lambda _, t: t.update(x=np.zeros(2, np.float32)), "got the tensor x; expected adapters"),
        (lambda _, t: t.clear(), "holds no adapter"),
        (lambda _, t: t.update({n: np.zeros((3, 5), "f") for n in t if "lora_A" in n}),
         "got an adapter of .* from 5 to"),
    ],
)  # fmt: skip
def test_malformed_adapters_are_refused(
    change: Change, message: str, tmp_path: pathlib.Path
) -> None:
    folder = shutil.copytree(GOLDEN / "peft_llama", tmp_path / "changed")
    content = json.loads((folder / lora.peft.CONFIG).read_text())
    tensors = load_file(folder / lora.peft.WEIGHTS)
    change(content, tensors)
    (folder / lora.peft.CONFIG).write_text(json.dumps(content))
    save_file(tensors, folder / lora.peft.WEIGHTS)
    with pytest.raises(ValueError, match=message):
        lora.load(folder, hf.load(GOLDEN / "llama")[0])
