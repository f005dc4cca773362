"""Lock files: up to date with the declared dependencies, with hashes and without addresses."""

import hashlib
import re
from pathlib import Path

import pytest
from fetch_wheels import choose, download
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
    """Tools that compile or check the code use the versions that it runs with."""

    def versions(name: str) -> dict[str, str]:
        text = Path(LOCKS / f"{name}.txt").read_text()
        return dict(re.findall(r"^([a-z0-9][^\s;\\=]*)==([^\s;\\]+)", text, flags=re.MULTILINE))

    machines = {**versions("tpu"), **versions("cuda13"), **versions("cpu")}
    for name in lock_inputs().keys() - {"pip"}:
        own = versions(name)
        shared = own.keys() & machines.keys()
        assert {x: own[x] for x in shared} == {x: machines[x] for x in shared}, name


def test_pip_lock_is_that_of_the_pex_version() -> None:
    """Without the pip that this pex requires, nothing is installed on a new machine."""
    found = re.search(r"^pex_version=(\S+)", (LOCKS.parents[1] / "pants").read_text(), re.MULTILINE)
    assert found is not None
    assert f"pex {found[1]} " in (LOCKS / "pip.in").read_text().splitlines()[0]


def test_changed_dependency_makes_the_locks_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lock.declared_dependencies", lambda _root: ["jax>=99"])
    assert any("cpu.txt" in problem for problem in stale_locks())


def test_merge_rejects_incompatible_requirements() -> None:
    with pytest.raises(ValueError, match="markers are not used"):
        merge(["numpy; python_version < '3.13'"])


def test_file_that_pip_would_choose_is_downloaded() -> None:
    def file(name: str) -> dict[str, str]:
        return {"url": f"https://index/{name}"}

    sdist = file("x-1.tar.gz")
    plain, other = file("x-1-py3-none-any.whl"), file("x-1-cp35-cp35m-win32.whl")
    local = file("x-1%2Blocal-py3-none-any.whl")
    x = {"name": "x", "version": "1"}
    assert choose({**x, "sdist": sdist, "wheels": [other, plain]}) == plain
    assert choose({**x, "sdist": sdist, "wheels": [other]}) == sdist
    assert choose({**x, "wheels": [local]}) == local
    with pytest.raises(ValueError, match="x 1 has no file for this platform"):
        choose({**x, "wheels": [other]})


def test_file_with_another_digest_is_not_kept(tmp_path: Path) -> None:
    served, folder = tmp_path / "x-1%2Blocal-py3-none-any.whl", tmp_path / "wheels"
    folder.mkdir()
    served.write_bytes(b"a wheel")
    file = {"url": served.as_uri()}
    with pytest.raises(ValueError, match="another SHA-256 than the locks say"):
        download(file, folder, allowed=hashlib.sha256(b"another").hexdigest())
    assert list(folder.iterdir()) == []
    download(file, folder, allowed=hashlib.sha256(b"a wheel").hexdigest())
    assert [path.name for path in folder.iterdir()] == ["x-1%2Blocal-py3-none-any.whl"]
