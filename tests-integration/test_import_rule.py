"""Import rule: siblings that a package may import; no package imports an app, no import cycle.

tjx_nn may import tjx_kernels. All packages but these two may import tjx_core.
"""

import ast
import graphlib
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = sorted(
    path.parent
    for pattern in ("packages/*/pyproject.toml", "apps/*/pyproject.toml")
    for path in ROOT.glob(pattern)
)
PACKAGES = [project for project in PROJECTS if project.parent.name == "packages"]
SIBLINGS: dict[str, set[str]] = {
    "tjx_core": set(),
    "tjx_kernels": set(),
    "tjx_nn": {"tjx_kernels"},
}


def import_name(project: Path) -> str:
    return next((project / "src").glob("tjx_*")).name


def imported_modules(source: str) -> set[str]:
    """Return the top-level names that a file imports, at any position."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def project_imports(project: Path) -> set[str]:
    files = [*(project / "src").rglob("*.py"), *(project / "src").rglob("*.pyi")]
    return set().union(*(imported_modules(file.read_text()) for file in files))


def test_all_packages_are_found() -> None:
    expected = {"core", "kernels", "nn", "optim", "parallel", "data", "ckpt", "metrics", "rl"}
    assert {project.name.removeprefix("tjx-") for project in PACKAGES} == expected


@pytest.mark.parametrize("project", PACKAGES, ids=lambda project: project.name)
def test_packages_import_only_allowed_siblings(project: Path) -> None:
    own = import_name(project)
    others = {name for name in project_imports(project) if name.startswith("tjx_")}
    assert others - {own} <= SIBLINGS.get(own, {"tjx_core"})


def test_eval_imports_only_the_run_reader_of_the_trainer() -> None:
    modules = {
        node.module
        for file in (ROOT / "apps/eval/src").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tjx_trainer")
    }
    assert modules == {"tjx_trainer.run_reader"}


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.name)
def test_no_torch_and_no_tensorflow(project: Path) -> None:
    assert not project_imports(project) & {"torch", "tensorflow"}


def test_private_jax_is_imported_for_its_coordination_service_only() -> None:
    """JAX 0.11.2 has no public barrier or key-value store without device collectives."""
    found = {
        (file.name, node.module, *(alias.name for alias in node.names))
        for folder in ("packages", "apps")
        for file in ROOT.glob(f"{folder}/*/src/**/*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and "jax._src" in (node.module or "")
    }
    module = ("jax._src", "distributed")
    assert found == {("multihost.py", *module), ("consistency.py", *module)}


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.name)
def test_declared_dependencies_match_imports(project: Path) -> None:
    metadata = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    needed = [Requirement(text) for text in metadata.get("dependencies", [])]
    extras = [
        Requirement(text)
        for extra in metadata.get("optional-dependencies", {}).values()
        for text in extra
    ]
    declared = {canonicalize_name(requirement.name) for requirement in needed + extras}

    third_party = project_imports(project) - set(sys.stdlib_module_names) - {import_name(project)}
    distributions = packages_distributions()
    imported = set()
    for module in third_party:
        owners = {canonicalize_name(name) for name in distributions.get(module, [module])}
        # A namespace of several distributions counts for the declared one.
        imported |= owners & declared or owners

    assert imported - declared == set(), "imported, but not declared in pyproject.toml"
    unused = {canonicalize_name(requirement.name) for requirement in needed} - imported
    assert unused == set(), "declared in pyproject.toml, but nowhere imported"


def imports_at_start(source: str) -> set[str]:
    """Return the modules, and names in them, that run when a module is imported."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.name)
def test_no_modules_import_each_other(project: Path) -> None:
    files = {
        ".".join(file.relative_to(project / "src").with_suffix("").parts): file
        for file in (project / "src").rglob("*.py")
    }
    graph = {
        name: (imports_at_start(file.read_text()) & files.keys()) - {name}
        for name, file in files.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.name)
def test_no_folder_has_more_than_18_modules(project: Path) -> None:
    for folder in {file.parent for file in (project / "src").rglob("*.py")}:
        modules = [file for file in folder.glob("*.py") if file.name != "__init__.py"]
        assert len(modules) <= 18, f"{folder}: group them in folders, or merge some"


def test_lazy_public_names_exist() -> None:
    for project in PACKAGES:
        module = __import__(import_name(project))
        assert module.__all__, project.name
        for name in module.__all__:
            assert getattr(module, name) is not None
