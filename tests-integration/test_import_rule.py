"""Import rule: siblings that a package may import; no package imports an app, no import cycle.

tjx_nn may import tjx_kernels. All packages but these two may import tjx_core.
"""

import ast
import functools
import graphlib
import sys
import tomllib
from collections.abc import Mapping
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


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@functools.cache
def imports(file: Path) -> list[ast.Import | ast.ImportFrom]:
    """Return the import statements of a file, at any position."""
    return [
        node for node in ast.walk(parsed(file)) if isinstance(node, ast.Import | ast.ImportFrom)
    ]


@functools.cache
def project_imports(project: Path) -> set[str]:
    """Return the top-level names that a project imports."""
    found = set()
    for file in [*(project / "src").rglob("*.py"), *(project / "src").rglob("*.pyi")]:
        for node in imports(file):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found


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
        for node in imports(file)
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
        for node in imports(file)
        if isinstance(node, ast.ImportFrom) and "jax._src" in (node.module or "")
    }
    module = ("jax._src", "distributed")
    assert found == {("multihost.py", *module), ("consistency.py", *module)}


# State of a process at module level: what `register` functions add to, and two that belong to the
# process itself.
MODULE_STATE = {
    *(("tjx_optim.registry", name) for name in ("registered_optimizers", "registered_schedules")),
    ("tjx_metrics.trackers.registration", "registered_trackers"),
    ("tjx_metrics.metrics.registration", "registered_metrics"),
    ("tjx_kernels.attention.registry", "REGISTRY"),
    ("tjx_nn.hf.families", "_REGISTERED"),
    ("tjx_nn.registry", "registered_models"),
    ("tjx_data.corpora.registry", "CORPORA"),
    ("tjx_rl.environments", "registered_environments"),
    ("tjx_trainer.extensions", "registered_tasks"),
    # The number of a collective call, part of its name in JAX's coordination service.
    ("tjx_parallel.multiprocess.exchange", "_calls"),
    # The pipe to the process that started this one.
    ("tjx_trainer.runtime.supervisor_client", "_words"),
}
MUTATORS = {
    *("append", "add", "update", "setdefault", "pop", "clear", "extend", "insert", "remove"),
    *("discard", "popitem", "appendleft"),
}


def changed_globals(tree: ast.Module, module: str) -> set[tuple[str, str]]:
    """Return the module-level names, as (module, name), that a module changes after its start."""
    home: dict[str, tuple[str, str]] = {}
    node: ast.AST
    for node in tree.body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        home |= {each.id: (module, each.id) for each in targets if isinstance(each, ast.Name)}
        if isinstance(node, ast.ImportFrom):
            home |= {
                each.asname or each.name: (node.module or "", each.name) for each in node.names
            }
    names: set[str] = set()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        nodes = [*ast.walk(function)]
        own = {each.arg for each in nodes if isinstance(each, ast.arg)} | {
            each.id
            for each in nodes
            if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
        }
        declared: set[str] = set()
        changed: set[str] = set()
        for node in nodes:
            if isinstance(node, ast.Global):
                declared |= set(node.names)
            elif isinstance(node, ast.Subscript | ast.Attribute) and not isinstance(
                node.ctx, ast.Load
            ):
                changed |= {node.value.id} if isinstance(node.value, ast.Name) else set()
            elif isinstance(node, ast.Call):
                method = node.func
                if isinstance(method, ast.Attribute) and method.attr in MUTATORS:
                    changed |= {method.value.id} if isinstance(method.value, ast.Name) else set()
                elif isinstance(method, ast.Name) and method.id == "next":
                    changed |= {each.id for each in node.args[:1] if isinstance(each, ast.Name)}
        names |= declared | (changed - own)
    return {home[name] for name in names & home.keys()}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("x = {}\ndef f():\n    x[1] = 2", {"x"}),
        ("x = []\ndef f():\n    x.append(2)", {"x"}),
        ("x = 0\ndef f():\n    global x\n    x = 1", {"x"}),
        ("import itertools\nx = itertools.count()\ndef f():\n    return next(x)", {"x"}),
        ("x = []\ndef f():\n    x = []\n    x.append(2)", set()),
        ("x = {1: 2}\nx[3] = 4\ndef f():\n    return x[1]", set()),
    ],
)
def test_changes_of_globals_are_found(source: str, names: set[str]) -> None:
    assert changed_globals(ast.parse(source), "m") == {("m", name) for name in names}


def test_the_state_of_modules_is_registries_and_that_of_the_process() -> None:
    found = {
        place
        for project in PROJECTS
        for file in (project / "src").rglob("*.py")
        for place in changed_globals(
            parsed(file),
            ".".join(file.relative_to(project / "src").with_suffix("").parts).removesuffix(
                ".__init__"
            ),
        )
    }
    assert found == MODULE_STATE


@functools.cache
def installed() -> Mapping[str, list[str]]:
    """Return the distributions of each module."""
    return packages_distributions()


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
    distributions = installed()
    imported = set()
    for module in third_party:
        owners = {canonicalize_name(name) for name in distributions.get(module, [module])}
        # A namespace of several distributions counts for the declared one.
        imported |= owners & declared or owners

    assert imported - declared == set(), "imported, but not declared in pyproject.toml"
    unused = {canonicalize_name(requirement.name) for requirement in needed} - imported
    assert unused == set(), "declared in pyproject.toml, but nowhere imported"


def imports_at_start(file: Path) -> set[str]:
    """Return the modules, and names in them, that run when a module is imported."""
    found = set()
    for node in parsed(file).body:
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
    graph = {name: (imports_at_start(file) & files.keys()) - {name} for name, file in files.items()}
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
