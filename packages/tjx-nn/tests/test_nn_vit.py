"""ViT: patches, pooling, image sizes, losses and training."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import pytest

from tjx_nn import ViTConfig, bind, count_params, flops_per_token, init, logical_axes
from tjx_nn.binding import Params
from tjx_nn.models.vit import patches

Run = Callable[..., np.ndarray]
Descend = Callable[..., list[float]]

TINY = ViTConfig(
    image_size=(8, 12), patch_size=4, channels=3, n_classes=5, n_layer=2, n_head=2, d_model=16
)
MEAN = dataclasses.replace(
    TINY, pool="mean", positions="none", norm="rmsnorm", activation="swiglu", bias=False
)
# The vision encoders of DINOv2 (with registers) and SigLIP.
DINOV2 = dataclasses.replace(
    TINY, pool="class_mean", n_registers=3, mask_token=True, layer_scale=0.5, activation="swiglu"
)
SIGLIP = dataclasses.replace(TINY, pool="map", activation="gelu_tanh")


@pytest.fixture(scope="module")
def params(make: Callable[..., Params]) -> Params:
    return make(TINY)


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 8, 12, 3)).astype(np.float32)


def test_the_patch_layer_equals_a_convolution(images: np.ndarray) -> None:
    kernel = np.random.default_rng(1).standard_normal((4 * 4 * 3, 16)).astype(np.float32)

    @jax.jit
    def both(images: jax.Array, kernel: jax.Array) -> tuple[jax.Array, ...]:
        cut = patches(images, 4)
        convolved = jax.lax.conv_general_dilated(
            images, kernel.reshape(4, 4, 3, 16), (4, 4), "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return cut, cut @ kernel, convolved.reshape(2, 6, 16)

    cut, multiplied, convolved = jax.device_get(both(*jax.device_put((images, kernel))))
    np.testing.assert_array_equal(cut[1, 4], images[1, 4:8, 4:8].ravel())  # second row and column
    np.testing.assert_allclose(multiplied, convolved, atol=1e-4)


def test_without_positions_the_order_of_patches_does_not_matter(
    make: Callable[..., Params], params: Params, images: np.ndarray, run: Run
) -> None:
    mixed = np.concatenate([images[:, 4:, 4:8], images[:, :4, 8:], images[:, 4:, :4]], 2)
    mixed = np.concatenate(
        [mixed, np.concatenate([images[:, :4, :4], images[:, 4:, 8:], images[:, :4, 4:8]], 2)], 1
    )
    for config in (dataclasses.replace(TINY, positions="none"), MEAN):
        values = make(config)
        np.testing.assert_allclose(
            run(config, values, mixed), run(config, values, images), atol=1e-5
        )
    assert np.abs(run(TINY, params, mixed) - run(TINY, params, images)).max() > 1e-2


def test_the_mean_over_equal_patches_equals_one_patch(
    make: Callable[..., Params], images: np.ndarray, run: Run
) -> None:
    params, patch = make(MEAN), images[:, :4, :4]
    one = run(dataclasses.replace(MEAN, image_size=4), params, patch)
    np.testing.assert_allclose(run(MEAN, params, np.tile(patch, (1, 2, 3, 1))), one, atol=1e-5)


@pytest.mark.parametrize("config", [TINY, DINOV2], ids=["class", "dinov2"])
def test_losses_are_log_softmax_of_logits(
    config: ViTConfig, make: Callable[..., Params], images: np.ndarray, run: Run
) -> None:
    params = make(config)
    config = dataclasses.replace(config, mup_base=8)  # logits are scaled in both computations
    labels = np.array([3, -100], np.int32)
    losses = jax.jit(lambda p, x, y: bind(config, p).losses(x, y).tokens)(
        params, *jax.device_put((images, labels))
    )
    logits = run(config, params, images).astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(jax.device_get(losses), [-log_probs[0, 3], 0], atol=1e-5)


@pytest.mark.parametrize("config", [TINY, DINOV2, SIGLIP], ids=["class", "dinov2", "siglip"])
def test_scanned_layers_equal_unrolled_layers(
    config: ViTConfig, make: Callable[..., Params], images: np.ndarray, run: Run
) -> None:
    params = make(config)
    unrolled = run(dataclasses.replace(config, scan_layers=False, remat="full"), params, images)
    np.testing.assert_allclose(unrolled, run(config, params, images), atol=1e-5)


def test_patches_are_pooled_without_class_token_and_registers(
    make: Callable[..., Params], images: np.ndarray
) -> None:
    for config in (DINOV2, dataclasses.replace(SIGLIP, n_registers=2)):
        params = make(config)

        @jax.jit
        def compute(params: Params, images: jax.Array) -> tuple[jax.Array, ...]:
            model = bind(config, params)  # noqa: B023  called here
            return model.features(images), model.pooled(images), model(images)

        features, pooled, logits = jax.device_get(compute(params, jax.device_put(images)))
        head = jax.device_get(params["head"])
        expected = pooled.astype(np.float64) @ head["kernel"] + head["bias"]
        np.testing.assert_allclose(logits, expected, atol=1e-5)
        assert features.shape == (2, config.max_seq_len, 16)
        assert config.max_seq_len == config.n_prefix + 6
        if config.pool == "class_mean":
            mean = features[:, 4:].mean(1)
            np.testing.assert_allclose(pooled, np.concatenate([features[:, 0], mean], 1), atol=1e-6)
        else:
            np.testing.assert_allclose(
                pooled, map_of(features[:, 2:], params["attention_pool"]), atol=1e-5
            )


def map_of(x: np.ndarray, params: Params) -> np.ndarray:
    """Attention pooling of two heads in float64: softmax over tokens, then the MLP."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jax.device_get(params))

    def dense(x: np.ndarray, layer: dict[str, np.ndarray]) -> np.ndarray:
        y: np.ndarray = x @ layer["kernel"] + layer["bias"]
        return y

    query = dense(p["probe"], p["attention"]["query"]).reshape(2, 8)
    key, value = (dense(x, p["attention"][name]).reshape(2, -1, 2, 8) for name in ("key", "value"))
    weights = np.exp(np.einsum("nh,btnh->bnt", query, key) / 8**0.5)
    weights /= weights.sum(-1, keepdims=True)
    y = dense(np.einsum("bnt,btnh->bnh", weights, value).reshape(2, 16), p["attention"]["out"])
    h = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    h = dense(h * p["norm"]["scale"] + p["norm"]["bias"], p["mlp"]["up"])
    gelu = 0.5 * h * (1 + np.tanh((2 / np.pi) ** 0.5 * (h + 0.044715 * h**3)))
    pooled: np.ndarray = y + dense(gelu, p["mlp"]["down"])
    return pooled


def test_masked_patches_are_replaced_by_the_mask_token(
    make: Callable[..., Params], images: np.ndarray
) -> None:
    params = make(DINOV2)

    @jax.jit
    def pooled(images: jax.Array, mask: jax.Array) -> jax.Array:
        return bind(DINOV2, params).pooled(images, mask=mask)

    mask = np.zeros((2, 6), bool)
    mask[:, 4] = True  # second row and column
    other = images.copy()
    other[:, 4:, 4:8] += 1
    found = [
        jax.device_get(pooled(*jax.device_put((x, m))))
        for x in (images, other)
        for m in (mask, ~mask)
    ]
    np.testing.assert_array_equal(found[0], found[2])
    assert np.abs(found[1] - found[3]).max() > 1e-3


def test_cropping_ignores_pixels_outside_of_whole_patches(
    params: Params, images: np.ndarray, run: Run
) -> None:
    wider = np.pad(images, ((0, 0), (0, 3), (0, 1), (0, 0)), constant_values=9)
    config = dataclasses.replace(TINY, image_size=(11, 13), crop=True)
    np.testing.assert_array_equal(run(config, params, wider), run(TINY, params, images))


def test_models_without_a_head_or_a_mask_token_say_so(params: Params, images: np.ndarray) -> None:
    config = dataclasses.replace(TINY, n_classes=None)
    headless = {name: leaf for name, leaf in params.items() if name != "head"}
    model = bind(config, headless)
    with pytest.raises(ValueError, match="n_classes: got None, a model without a head"):
        model(images)
    with pytest.raises(ValueError, match="n_classes: got None"):
        model.token_losses(jax.device_put(images[:, :, :, 0]), np.array([3, 1], np.int32))
    with pytest.raises(ValueError, match="mask: got one for a model without a mask token"):
        model.features(images, mask=np.zeros((2, 6), bool))


@pytest.mark.parametrize(
    "config", [TINY, MEAN, DINOV2, SIGLIP], ids=["class", "mean", "dinov2", "siglip"]
)
def test_learns_a_fixed_batch(
    config: ViTConfig, make: Callable[..., Params], images: np.ndarray, descend: Descend
) -> None:
    labels = np.array([3, 1], np.int32)
    losses = descend(lambda p: bind(config, p).losses(images, labels).tokens.mean(), make(config))
    assert losses[0] > losses[10] >= losses[-1]
    assert losses[-1] < 0.5 * losses[0]


def test_dropout_is_a_function_of_its_key(params: Params, images: np.ndarray, run: Run) -> None:
    config = dataclasses.replace(TINY, dropout=0.5)
    with jax.transfer_guard("allow"):
        one, two = jax.random.key(1), jax.random.key(2)
    first = run(config, params, images, dropout_key=one)
    np.testing.assert_array_equal(first, run(config, params, images, dropout_key=one))
    assert np.abs(first - run(config, params, images, dropout_key=two)).max() > 1e-2


def test_invalid_sizes_raise(params: Params, images: np.ndarray) -> None:
    with pytest.raises(
        ValueError, match=r"image_size: got \(30, 28\) with patch_size 7.*\(28, 28\)"
    ):
        ViTConfig.preset("vit_mnist", image_size=(30, 28))
    with pytest.raises(ValueError, match=r"image_size: got \(30, 0\); expected height and width"):
        ViTConfig.preset("vit_mnist", image_size=(30, 0))
    with pytest.raises(ValueError, match=r"images: got .*\(12, 8, 3\).*\(8, 12, 3\)"):
        bind(TINY, params)(images.transpose(0, 2, 1, 3))
    with pytest.raises(ValueError, match=r"patch_size: got 7 with image_size \(30, 6\); .* 6"):
        ViTConfig.preset("vit_mnist", image_size=(30, 6), crop=True)
    with pytest.raises(ValueError, match="n_registers: got -1"):
        ViTConfig(n_registers=-1)
    with pytest.raises(ValueError, match="did you mean 'vit_mnist'"):
        ViTConfig.preset("vit_mnits")
    assert ViTConfig.preset("vit_mnist").max_seq_len == 17
    with pytest.raises(TypeError, match="max_seq_len"):
        ViTConfig(max_seq_len=3)  # type: ignore[call-arg]  # that is the point


@pytest.mark.parametrize(
    "config",
    [TINY, MEAN, DINOV2, SIGLIP, ViTConfig.preset("vit_base"), ViTConfig.preset("dinov2_base")],
    ids=["tiny", "mean", "dinov2", "siglip", "vit_base", "dinov2_base"],
)
def test_parameters_are_counted_by_formula_and_have_named_axes(config: ViTConfig) -> None:
    with jax.transfer_guard("allow"):
        shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    assert count_params(config) == sum(leaf.size for leaf in jax.tree.leaves(shapes))
    jax.tree.map(
        lambda names, leaf: np.testing.assert_equal(len(names), leaf.ndim),
        logical_axes(config), shapes, is_leaf=lambda x: isinstance(x, tuple),
    )  # fmt: skip


def test_flops_of_an_image_counted_by_hand() -> None:
    config = ViTConfig(
        image_size=4, patch_size=2, channels=1, n_classes=3, n_layer=1, n_head=1, d_model=2,
        bias=False,
    )  # fmt: skip
    blocks = 5 * (4 * 2 * 2 + 2 * 2 * 8 + 3 * 2)  # attention, MLP, norms; of five tokens
    image = 6 * (blocks + 4 * (4 * 2) + 2 * 3) + 5 * 12 * 1 * 5 * 2
    assert flops_per_token(config, 5) == image // 5
    with pytest.raises(
        ValueError, match=r"seq_len: got .*; expected 5, the number of tokens of an image"
    ):
        flops_per_token(config, 4)
