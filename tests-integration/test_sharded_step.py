"""The sharded training step of the guide needs the packages only, and equals one device."""

import re
from pathlib import Path
from typing import Any

import jax
import pytest

import tjx_nn

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "distributed_training.md"


def script() -> str:
    section = GUIDE.read_text(encoding="utf-8").split("## Sharded training step")[1]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_script_is_short_and_imports_no_app() -> None:
    lines = [line for line in script().splitlines() if line.strip()]
    assert len(lines) <= 40
    assert not {"tjx_trainer", "tjx_eval"} & set(re.findall(r"tjx_\w+", script()))


def test_the_script_trains_as_one_device_does() -> None:
    names: dict[str, Any] = {}
    with jax.transfer_guard("allow"):
        exec(compile(script(), str(GUIDE), "exec"), names)  # noqa: S102  the guide's own code
        model, batch = names["model"], jax.device_get(names["batch"])
        params = jax.jit(tjx_nn.init, static_argnums=0)(model, jax.random.key(0))
        alone = jax.jit(lambda params: tjx_nn.bind(model, params).losses(**batch).tokens.mean())
        losses = names["losses"]
        assert losses[0] == pytest.approx(float(alone(params)), abs=1e-5)
    assert losses[-1] < losses[0] - 0.5
    kernel = names["state"]["params"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 64), "fsdp x tensor"
