"""Breaking changes of public names between two versions of a package."""

import doctest
import subprocess
from pathlib import Path

import api_diff
import pytest
import release

LAZY = "__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)\n"
OLD = {
    "__init__.py": LAZY,
    "__init__.pyi": "from . import io as io\n"
    "from .model import Model as Model\nfrom .model import norm as norm\n"
    "from .model import gone as gone\nfrom .model import renamed as renamed\n",
    "io.py": "from tjx_a.model import load as load\n",
    "model.py": "def norm(x, *, eps=0.1): ...\ndef gone(): ...\ndef renamed(): ...\n"
    "def load(path): ...\ndef internal(x): ...\n"
    "class Base:\n    def step(self, x): ...\n"
    "class Model(Base):\n    def __init__(self, size): ...\n    def _private(self): ...\n"
    "    def encode(self): ...\n",
}
# In another module, with a new optional argument: compatible.
NEW = {
    "__init__.py": LAZY + "__getattr__ = deprecated_names(__name__, {'renamed': 'better'}, "
    "since='0.3.0', fallback=__getattr__)\n",
    "__init__.pyi": "from . import io as io\n"
    "from .models import Model as Model\nfrom .models import norm as norm\n",
    "io.py": "from tjx_a.models import load as load\n",
    "models.py": "def norm(x, y=None, *, eps=0.1): ...\ndef load(path, kind): ...\n"
    "class Base:\n    def step(self, y): ...\n"
    "class Model(Base):\n    def __init__(self, size): ...\n",
}
CHANGES = [
    "tjx_a.Model.encode: public object was removed",
    "tjx_a.Model.step(x): parameter was removed",
    "tjx_a.Model.step(y): parameter was added as required",
    "tjx_a.gone: public object was removed",
    "tjx_a.io.load(kind): parameter was added as required",
]


def write(folder: Path, files: dict[str, str]) -> Path:
    package = folder / "tjx_a"
    package.mkdir(parents=True)
    for name, text in files.items():
        (package / name).write_text(text)
    return folder


def test_public_names_are_compared_wherever_they_are_defined(tmp_path: Path) -> None:
    old, new = write(tmp_path / "old", OLD), write(tmp_path / "new", NEW)
    assert sorted(api_diff.breaking_changes(old, new, "tjx_a")) == CHANGES
    assert api_diff.breaking_changes(new, new, "tjx_a") == []


def test_a_revision_is_compared_with_the_working_tree(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a", "-C", str(tmp_path), *words],
            check=True, capture_output=True,
        )  # fmt: skip

    folder = tmp_path / "packages" / "tjx-a"
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "empty")
    write(folder / "src", OLD)
    git("add", ".")
    git("commit", "-q", "-m", "old")
    (folder / "src/tjx_a/model.py").write_text(OLD["model.py"].replace("eps=0.1", "eps=0.2"))
    changes = api_diff.changes_since(tmp_path, "HEAD", folder)
    assert changes == ["tjx_a.norm(eps): parameter default was changed"]
    assert api_diff.changes_since(tmp_path, "HEAD~1", folder) is None
    with pytest.raises(ValueError, match="--base: got v9; expected a revision"):
        api_diff.changes_since(tmp_path, "v9", folder)


def test_a_deprecated_name_is_overdue_after_one_minor_version(tmp_path: Path) -> None:
    init = write(tmp_path, NEW) / "tjx_a" / "__init__.py"
    assert api_diff.overdue(init, "0.3.9") == []
    (line,) = api_diff.overdue(init, "0.4.0")
    assert line.startswith("renamed (now better): deprecated since 0.3.0; delete it")


def test_a_patch_release_may_not_break_public_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "git", lambda *_: "tjx-a-v0.2.0\ntjx-a-v0.2.1\n")
    monkeypatch.setattr(api_diff, "changes_since", lambda _root, tag, _folder: [f"since {tag}"])
    folder = tmp_path / "packages" / "tjx-a"
    write(folder / "src", OLD)
    project = release.Project("tjx-a", folder)
    project.init.write_text('__version__ = "0.2.1"\n')
    with pytest.raises(release.ReleaseError, match=r"breaks public names of tjx-a-v0\.2\.0"):
        release.check_api(project)
    project.init.write_text('__version__ = "0.3.0"\n')
    release.check_api(project)


def test_examples() -> None:
    assert doctest.testmod(api_diff).failed == 0
