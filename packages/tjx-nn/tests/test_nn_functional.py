"""Parameters as plain dicts: paths, logical axes, validation, initial values, registry."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tjx_nn
from tjx_nn import GPTConfig, bind, from_params, init, logical_axes, stack_axes
from tjx_nn.binding import Params, param_shapes
from tjx_nn.layout import Axes, Layout

EXPECTED_PATHS = {
    "wte.embedding", "wpe.embedding", "ln_f.scale", "ln_f.bias",
    *(f"blocks.{norm}.{leaf}" for norm in ("ln_1", "ln_2") for leaf in ("scale", "bias")),
    *(f"blocks.attention.{name}.{leaf}"
      for name in ("query", "key", "value", "out") for leaf in ("kernel", "bias")),
    *(f"blocks.mlp.{name}.{leaf}" for name in ("up", "down") for leaf in ("kernel", "bias")),
}  # fmt: skip


def paths(tree: Any) -> dict[str, Any]:
    flat, _ = jax.tree.flatten_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))
    return {".".join(key.key for key in path): leaf for path, leaf in flat}


def test_parameter_paths_and_logical_axes(tiny: GPTConfig, params: Params) -> None:
    arrays, axes = paths(params), paths(logical_axes(tiny))
    assert set(arrays) == set(axes) == EXPECTED_PATHS
    for path, names in axes.items():
        assert len(names) == arrays[path].ndim, path
        assert (names[0] == "layers") == path.startswith("blocks."), path


def test_stack_axes_leave_the_parameters_of_one_layer() -> None:
    config = GPTConfig.preset("deepseek_small", bias=True)
    depths, axes = paths(stack_axes(config)), paths(logical_axes(config))
    assert set(depths) == set(axes)
    for path, depth in depths.items():
        of_layer = axes[path][depth:]
        is_routed = axes[path][1:2] == ("expert",)
        assert depth == path.count("blocks.") + is_routed, path
        assert "layers" not in of_layer
        # The rest is a matrix or a vector, also for a router [embed, experts].
        assert len(of_layer) == 1 + path.endswith(("kernel", "embedding")), path


def test_bind_lists_all_mismatched_parameters(tiny: GPTConfig, params: Params) -> None:
    wrong: Any = {**params, "blocks": {**params["blocks"]}}
    attention = dict(wrong["blocks"]["attention"])
    attention["dense"] = attention.pop("out")
    wrong["blocks"]["attention"] = attention
    wrong["wte"] = {"embedding": np.ones((7, tiny.d_model), np.float32)}
    wrong["wpe"] = {"embedding": np.ones((tiny.max_seq_len, tiny.d_model), np.int32)}
    wrong["ln_f"] = {"scale": np.ones(tiny.d_model, np.float32), "bias": 0.0}
    with pytest.raises(ValueError, match="dense") as error:
        bind(tiny, wrong)
    lines = str(error.value).splitlines()
    assert lines[:-1] == [
        "params blocks.attention.out.bias: missing; expected shape [2, 24]",
        "params blocks.attention.out.kernel: missing; expected shape [2, 24, 24]",
        "params ln_f.bias: got a float; expected [24]",
        "params wpe.embedding: got dtype int32; expected a floating-point dtype",
        "params wte.embedding: got shape [7, 24]; expected [23, 24]",
        "params blocks.attention.dense.bias: got shape [2, 24]; expected no such parameter",
        "params blocks.attention.dense.kernel: got shape [2, 24, 24]; expected no such parameter",
    ]
    assert lines[-1].startswith("use the parameters from tjx_nn.init for this GPTConfig")


def test_renamed_parameters_raise(tiny: GPTConfig, params: Params) -> None:
    renamed = {f"x{i}": leaf for i, leaf in enumerate(params.values())}
    with pytest.raises(ValueError, match=r"params wte\.embedding: missing"):
        jax.eval_shape(
            lambda params: bind(tiny, params).embed_tokens(np.zeros((1, 3), int)), renamed
        )


def test_bind_accepts_all_kinds_of_arrays_of_any_floating_point_dtype(
    tiny: GPTConfig, params: Params
) -> None:
    params = jax.device_get(params)
    halves = jax.eval_shape(lambda: jax.tree.map(lambda p: p.astype("bfloat16"), params))
    bind(tiny, halves)
    bind(tiny, dict(reversed(params.items())))
    bind(tiny, nnx.state(bind(tiny, params)))
    stage = {**params, "blocks": jax.tree.map(lambda p: p[:1], params["blocks"])}
    bind(tiny, stage, n_layer=1)
    with pytest.raises(ValueError, match=r"ln_1\.bias: got shape \[1, 24\]; expected \[2, 24\]"):
        bind(tiny, stage)


@pytest.fixture(scope="module")
def config(tiny: GPTConfig) -> GPTConfig:
    return dataclasses.replace(tiny, d_model=64, vocab_size=500, n_layer=8)


def initial_values(config: GPTConfig) -> Params:
    with jax.transfer_guard("allow"):
        values: Params = jax.jit(init, static_argnums=0)(config, jax.random.key(3))
    return values


@pytest.fixture(scope="module")
def initial(config: GPTConfig) -> Params:
    return initial_values(config)


def test_initial_values_are_those_of_gpt2(initial: Params) -> None:
    values = paths(jax.device_get(initial))
    for path, value in values.items():
        if path.endswith("bias"):
            assert np.all(value == 0), path
        elif path.endswith("scale"):
            assert np.all(value == 1), path
        else:
            residual = path.endswith(("out.kernel", "down.kernel"))
            expected = 0.02 / 4 if residual else 0.02  # 4 = sqrt(2 * n_layer)
            assert abs(value.std() / expected - 1) < 0.05, path
            assert abs(value.mean()) < 0.1 * expected, path
    # Blocks have different initial values.
    kernels = values["blocks.mlp.up.kernel"].reshape(8, -1)
    assert np.abs(np.corrcoef(kernels) - np.eye(8)).max() < 0.05


def test_zero_init_residual_changes_only_projections_to_the_residual_stream(
    config: GPTConfig, initial: Params
) -> None:
    changed = dataclasses.replace(config, zero_init_residual=True)
    values = paths(jax.device_get(initial_values(changed)))
    for path, value in paths(jax.device_get(initial)).items():
        residual = path.endswith(("out.kernel", "down.kernel"))
        np.testing.assert_array_equal(values[path], 0 * value if residual else value, err_msg=path)


def make_sharding() -> Callable[[Sequence[str | None]], NamedSharding]:
    """Layout that shards arrays over a mesh by their logical axes."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    mesh_axes = {
        "batch": "x",
        "embed": "x",
        "heads": "y",
        "kv_heads": "y",
        "mlp": "y",
        "vocab": "y",
    }

    def sharding(names: Sequence[str | None]) -> NamedSharding:
        if "batch" in names:  # occupies the mesh axis of the width
            names = ("batch", *[None] * (len(names) - 1))
        spec = PartitionSpec(*(n and mesh_axes.get(n) for n in names))  # type: ignore[no-untyped-call]  # as jax is
        return NamedSharding(mesh, spec)

    return sharding


def parameter_shardings(config: GPTConfig) -> Params:
    shardings: Params = jax.tree.map(
        make_sharding(), logical_axes(config), is_leaf=lambda x: isinstance(x, tuple)
    )
    return shardings


def test_initial_values_do_not_depend_on_the_sharding(config: GPTConfig, initial: Params) -> None:
    shardings = parameter_shardings(config)
    with jax.transfer_guard("allow"):
        sharded = jax.jit(init, static_argnums=0, out_shardings=shardings)(
            config, jax.random.key(3)
        )
    assert not sharded["wte"]["embedding"].sharding.is_fully_replicated
    chex.assert_trees_all_equal(*jax.device_get((initial, sharded)), strict=True)


def test_a_sharded_model_computes_the_same_without_replicating_arrays(
    config: GPTConfig, initial: Params, capfd: pytest.CaptureFixture[str]
) -> None:
    sharding = make_sharding()

    class Spread(Layout):
        def place(self, x: jax.Array, axes: Axes) -> jax.Array:
            y: jax.Array = jax.lax.with_sharding_constraint(x, sharding(axes))  # type: ignore[no-untyped-call]  # as jax is
            return y

        def all_gathered(self, w: jax.Array, axes: Axes) -> jax.Array:
            return self.place(w, [None if name == "embed" else name for name in axes])

        def reduce_scattered(self, dw: jax.Array, axes: Axes) -> jax.Array:
            return self.place(dw, axes)

    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (8, 16), np.int32)

    def loss(params: Params, tokens: jax.Array, layout: Layout) -> jax.Array:
        return bind(config, params, layout=layout).losses(tokens, tokens).tokens.mean()

    compute = jax.jit(jax.value_and_grad(loss), static_argnums=2)
    whole = compute(initial, jax.device_put(tokens), Layout())
    spread_params = jax.device_put(initial, parameter_shardings(config))
    spread_tokens = jax.device_put(tokens, sharding(("batch", "seq")))
    spread = compute(spread_params, spread_tokens, Spread())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6),
        *jax.device_get((whole, spread)),
    )
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


@dataclasses.dataclass(frozen=True, kw_only=True)
class WideConfig(GPTConfig):
    """Subclass of a registered configuration, without a model of its own."""

    d_model: int = 24


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    features: int = 3


class Toy(nnx.Module):
    """User module: a stack of layers and a kernel with axes, and a bias without."""

    def __init__(self, config: ToyConfig, *, rngs: nnx.Rngs) -> None:
        kernel = jax.random.normal(rngs.params(), (2, config.features, 4))
        axes = ("layers", "embed", "mlp")
        self.kernel = nnx.Param(kernel, out_sharding=axes, eager_sharding=False)
        self.bias = nnx.Param(jnp.zeros(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        out: jax.Array = x @ self.kernel[1] + self.bias[None]
        return out


def test_registered_models_and_subclasses_of_configurations() -> None:
    config = WideConfig(vocab_size=11, max_seq_len=8, n_layer=2, n_head=2)
    assert logical_axes(config)["wte"]["embedding"] == ("vocab", "embed")
    assert tjx_nn.count_params(config) == sum(map(math.prod, param_shapes(config).values()))
    with pytest.raises(ValueError, match=r"config: got a ToyConfig; .* tjx_nn\.register"):
        logical_axes(ToyConfig())
    tjx_nn.register(ToyConfig, Toy)
    assert logical_axes(ToyConfig()) == {"kernel": ("layers", "embed", "mlp"), "bias": (None,)}
    assert stack_axes(ToyConfig()) == {"kernel": 1, "bias": 0}
    params = jax.jit(lambda: init(ToyConfig(), jax.random.key(0)))()
    out = jax.jit(lambda params: bind(ToyConfig(), params)(np.ones((1, 3), np.float32)))(params)
    kernel = jax.device_get(params["kernel"])
    np.testing.assert_allclose(out, kernel[1].sum(0)[None], rtol=1e-6)
    with pytest.raises(ValueError, match="params bias: missing"):
        bind(ToyConfig(), {"kernel": params["kernel"]})
    with pytest.raises(ValueError, match="config_class: got ToyConfig, which is registered"):
        tjx_nn.register(ToyConfig, nnx.Linear)
    with pytest.raises(ValueError, match="not hashable"):
        tjx_nn.register(dict, Toy)


def test_layers_with_given_weights() -> None:
    rng = np.random.default_rng(0)
    shapes = {"gate": (8, 16), "up": (8, 16), "down": (16, 8)}
    weights = {
        name: {"kernel": rng.normal(size=shape).astype("f")} for name, shape in shapes.items()
    }
    config = tjx_nn.TransformerConfig(d_model=8, n_head=2, activation="swiglu", bias=False)
    make = functools.partial(tjx_nn.SwiGLU, config, d_ff=16)
    x = rng.normal(size=(1, 3, 8)).astype("f")
    apply = jax.jit(lambda w, x: from_params(lambda rngs: make(rngs=rngs), w)(x))
    out = jax.device_get(apply(*jax.device_put((weights, x))))
    gate, up, down = (weights[name]["kernel"].astype("d") for name in shapes)
    expected = ((x @ gate) / (1 + np.exp(-x @ gate)) * (x @ up)) @ down
    np.testing.assert_allclose(out, expected, rtol=1e-4)
    wrong = {"gate": weights["down"], "up": weights["up"], "dwn": weights["down"]}
    with pytest.raises(ValueError, match=r"params down\.kernel: got none; expected") as caught:
        from_params(lambda rngs: make(rngs=rngs), wrong)
    assert "params gate.kernel: got (16, 8); expected (8, 16)" in str(caught.value)
    assert "params dwn.kernel: got (16, 8); expected no such parameter" in str(caught.value)
    norm = {"scale": np.ones(8, np.float32), "bias": np.ones(8, np.float32)}
    with pytest.raises(ValueError, match="make: got a module with mean, which is not a parameter"):
        from_params(lambda rngs: nnx.BatchNorm(8, rngs=rngs), norm)


def test_flax_metadata_has_the_logical_axes(tiny: GPTConfig) -> None:
    model = nnx.eval_shape(lambda: tjx_nn.GPT(tiny, rngs=nnx.Rngs(0)))
    specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(model)))
    axes = jax.tree.map(tuple, specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    assert axes == logical_axes(tiny)
