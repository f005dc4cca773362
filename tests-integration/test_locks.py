"""The lock files belong to the declared dependencies, and name no address."""

import re
from pathlib import Path

import pytest
from lock import LOCKS, lock_inputs, merge, stale_locks


def test_no_lock_is_older_than_its_input() -> None:
    assert stale_locks() == []


@pytest.mark.parametrize("name", sorted(lock_inputs()))
def test_locks_carry_hashes_and_no_address(name: str) -> None:
    text = Path(LOCKS / f"{name}.txt").read_text()
    requirements = re.findall(r"^[a-z0-9][^\s;\\]*==\S+", text, flags=re.MULTILINE)
    assert requirements
    assert text.count("--hash=sha256:") >= len(requirements)
    assert "://" not in text
    assert "index-url" not in text


def test_locks_agree_on_versions() -> None:
    """A tool that compiles or checks our code sees what our code runs with."""

    def versions(name: str) -> dict[str, str]:
        text = Path(LOCKS / f"{name}.txt").read_text()
        return dict(re.findall(r"^([a-z0-9][^\s;\\=]*)==([^\s;\\]+)", text, flags=re.MULTILINE))

    machines = {**versions("tpu"), **versions("cuda13"), **versions("cpu")}
    for name in lock_inputs():
        own = versions(name)
        shared = own.keys() & machines.keys()
        assert {x: own[x] for x in shared} == {x: machines[x] for x in shared}, name


def test_a_changed_dependency_makes_the_locks_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lock.declared_dependencies", lambda _root: ["jax>=99"])
    assert any("cpu.txt" in problem for problem in stale_locks())


def test_merge_refuses_what_it_cannot_join() -> None:
    with pytest.raises(ValueError, match="markers are not used"):
        merge(["numpy; python_version < '3.13'"])
