"""Deprecated names resolve with a warning."""

import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from tjx_core import deprecated_names


@pytest.fixture
def module() -> Iterator[types.ModuleType]:
    found = types.ModuleType("renaming")
    found.__dict__["new"] = "the new value"
    found.__dict__["__getattr__"] = deprecated_names(
        "renaming",
        {"old": "new", "write": "tjx_core.files.write_atomically"},
        since="0.9.0",
        fallback=lambda name: f"lazy {name}",
    )
    sys.modules["renaming"] = found
    yield found
    del sys.modules["renaming"]


def test_an_old_name_warns_at_the_caller_with_the_new_name(module: types.ModuleType) -> None:
    message = r"renaming\.old is deprecated since 0\.9\.0 and removed in 0\.10; use new"
    with pytest.warns(DeprecationWarning, match=message) as caught:
        assert module.old == "the new value"
    assert Path(caught[0].filename) == Path(__file__)
    with pytest.warns(DeprecationWarning, match="use tjx_core") as caught:
        from renaming import write  # type: ignore[import-not-found]  # pants: no-infer-dep
    assert write.__name__ == "write_atomically"
    assert Path(caught[0].filename) == Path(__file__)


def test_other_names_are_resolved_as_before(module: types.ModuleType) -> None:
    assert module.new == "the new value"
    assert module.other == "lazy other"
    without_fallback = deprecated_names("renaming", {"old": "new"}, since="0.9.0")
    with pytest.raises(AttributeError, match="module 'renaming' has no attribute 'nwe'"):
        without_fallback("nwe")


@pytest.mark.parametrize("since", ["0.3", "0.3.x", "0.3.0.1"])
def test_the_version_has_three_numbers(since: str) -> None:
    with pytest.raises(ValueError, match=r"since: got '.*'; expected a version X\.Y\.Z"):
        deprecated_names("renaming", {}, since=since)
