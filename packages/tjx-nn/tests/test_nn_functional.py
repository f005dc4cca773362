"""Parameters as plain dicts: their paths, their logical axes, their initial values."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tjx_nn import GPTConfig, bind, init, logical_axes, stack_axes
from tjx_nn.functional import Params
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


def test_paths_read_well_and_axes_are_named(tiny: GPTConfig, params: Params) -> None:
    arrays, axes = paths(params), paths(logical_axes(tiny))
    assert set(arrays) == set(axes) == EXPECTED_PATHS
    for path, names in axes.items():
        assert len(names) == arrays[path].ndim, path
        assert (names[0] == "layers") == path.startswith("blocks."), path


def test_what_follows_the_stack_axes_belongs_to_one_layer() -> None:
    config = GPTConfig.preset("deepseek_small", bias=True)
    depths, axes = paths(stack_axes(config)), paths(logical_axes(config))
    assert set(depths) == set(axes)
    for path, depth in depths.items():
        of_layer = axes[path][depth:]
        is_routed = axes[path][1:2] == ("expert",)
        assert depth == path.count("blocks.") + is_routed, path
        assert "layers" not in of_layer
        # A matrix or a vector is left, a router's [embed, experts] among them.
        assert len(of_layer) == 1 + path.endswith(("kernel", "embedding")), path


def test_bind_names_every_parameter_that_the_configuration_does_not_have(
    tiny: GPTConfig, params: Params
) -> None:
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
    assert lines[-1].startswith("give the parameters that tjx_nn.init makes for this GPTConfig")


def test_leaves_of_the_right_count_under_other_names_are_refused(
    tiny: GPTConfig, params: Params
) -> None:
    renamed = {f"x{i}": leaf for i, leaf in enumerate(params.values())}
    with pytest.raises(ValueError, match=r"params wte\.embedding: missing"):
        jax.eval_shape(lambda params: bind(tiny, params).begin(np.zeros((1, 3), int)), renamed)


def test_bind_takes_every_kind_of_array_of_any_floating_point_dtype(
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


@pytest.fixture(scope="module")
def initial(config: GPTConfig) -> Params:
    with jax.transfer_guard("allow"):
        values: Params = jax.jit(init, static_argnums=0)(config, jax.random.key(3))
    return values


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
    # No two blocks start alike.
    kernels = values["blocks.mlp.up.kernel"].reshape(8, -1)
    assert np.abs(np.corrcoef(kernels) - np.eye(8)).max() < 0.05


def make_sharding() -> Callable[[Sequence[str | None]], NamedSharding]:
    """How a caller spreads arrays over a mesh by the names of their axes."""
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
        if "batch" in names:  # takes the axis that the width would take
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
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((initial, sharded)))


def test_a_spread_model_computes_the_same_and_nothing_is_replicated_in_passing(
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
