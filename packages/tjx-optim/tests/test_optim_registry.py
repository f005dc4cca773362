"""Optimizers and schedules that are registered from outside of the package."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tjx_core import ConfigError
from tjx_optim import (
    OptimizerConfig,
    ScheduleConfig,
    learning_rates,
    make_optimizer,
    register_optimizer,
    register_schedule,
    registry,
)


@pytest.fixture(autouse=True)
def _restore_registries() -> Iterator[None]:
    tables: list[dict[str, Any]] = [registry.registered_optimizers, registry.registered_schedules]
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def first_update(config: OptimizerConfig, optimizer: Any = None) -> dict[str, Any]:
    optimizer = make_optimizer(config) if optimizer is None else optimizer
    params = {"kernel": np.full((2, 2), 2.0, np.float32), "bias": np.ones(2, np.float32)}
    gradients = jax.tree.map(lambda leaf: 0.1 * leaf, params)
    found: dict[str, Any] = jax.jit(
        lambda: optimizer.update(gradients, optimizer.init(params), params)[0]
    )()
    return found


def test_a_registered_optimizer_has_decay_schedule_groups_and_its_settings() -> None:
    register_optimizer(
        "signed", lambda settings: optax.scale_by_sign() if settings["b1"] == 0.5 else None,
        defaults={"b1": 0.9, "weight_decay": 0.25},
    )  # fmt: skip
    config = OptimizerConfig(
        name="signed", learning_rate=0.5, b1=0.5, groups=("bias: learning_rate_scale=0.1",)
    )
    assert config.settings == {"b1": 0.5, "weight_decay": 0.25}
    update = first_update(config)
    np.testing.assert_allclose(update["kernel"], -0.5 * (1 + 0.25 * 2))
    np.testing.assert_allclose(update["bias"], -0.05, rtol=1e-6)
    with pytest.raises(ConfigError, match=r"momentum: got 0.5; .* signed does not use it"):
        OptimizerConfig(name="signed", momentum=0.5)


def test_a_registered_optimizer_is_suggested() -> None:
    register_optimizer("signed", lambda _: optax.scale_by_sign())
    with pytest.raises(ConfigError, match=r"adamw, .*, signed; did you mean signed"):
        OptimizerConfig(name="singed")


def test_a_registered_schedule_has_warm_up_and_peak_and_only_its_settings() -> None:
    register_schedule(
        "to_final",
        lambda config, steps: (
            lambda step: jnp.where(step < steps.end - steps.warmup, 1.0, config.final_fraction)
        ),
        settings=("decay_steps", "final_fraction"),
    )
    config = ScheduleConfig(name="to_final", warmup_steps=1, decay_steps=3, final_fraction=0.5)
    rates = learning_rates(config, learning_rate=4.0, max_steps=5)
    assert rates.tolist() == [2.0, 4.0, 4.0, 2.0, 2.0]
    with pytest.raises(ConfigError, match=r"cooldown_steps: got 2; .* to_final does not use it"):
        ScheduleConfig(name="to_final", cooldown_steps=2)
    with pytest.raises(ConfigError, match="decay_steps: got 1; expected more than warmup_steps=2"):
        ScheduleConfig(name="to_final", warmup_steps=2, decay_steps=1)


def test_built_in_names_and_unknown_settings_raise() -> None:
    with pytest.raises(ConfigError, match="got 'adamw'; expected a name that is not built in"):
        register_optimizer("adamw", lambda _: optax.scale_by_sign())
    with pytest.raises(ConfigError, match="got 'beta'; expected some of b1, b2"):
        register_optimizer("mine", lambda _: optax.scale_by_sign(), defaults={"beta": 0.1})
    with pytest.raises(ConfigError, match="got 'wsd'; expected a name that is not built in"):
        register_schedule("wsd", lambda *_: lambda _: 1.0)
    with pytest.raises(ConfigError, match="got 'peak'; expected some of decay_steps"):
        register_schedule("mine", lambda *_: lambda _: 1.0, settings=("peak",))
