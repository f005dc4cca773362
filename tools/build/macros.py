# ruff: noqa: F821  BUILD files know Pants' targets by name
"""Macros for BUILD files: targets of the packages and apps of the repository.

Pants derives the import path of a target from the folder of its BUILD file: `src` and `tests`
therefore each have a BUILD file of one line.
"""


def tjx_package(name):
    """Declare the wheel of a package or app and its metadata files."""
    files(name="meta", sources=["pyproject.toml", "*.md", "LICENSE"])
    python_distribution(
        name="wheel",
        dependencies=["./src", ":meta"],
        provides=python_artifact(name=name),
        generate_setup=False,
        sdist=False,
    )


def tjx_app(name, entry_point):
    """Declare the program that `run` starts, and its wheel."""
    tjx_package(name)
    pex_binary(name="app", entry_point=entry_point, execution_mode="venv", layout="packed")


def tjx_sources():
    """Declare the sources of a package or app."""
    python_sources(sources=["**/*.py", "**/*.pyi"], dependencies=[":data"])
    resources(name="data", sources=["**/py.typed", "**/*.yaml", "**/*.txtpb", "**/page/*"])


def tjx_tests(project, second_batch=(), dependencies=(), **fields):
    """Declare the tests of the package or app in folder `project`.

    The test files of a batch share a process: importing JAX and compiling cost more than the tests.
    Where they take minutes, the files in `second_batch` run beside the others. `dependencies` are
    targets that tests read besides those of the project.
    """
    files(name="golden", sources=["golden/**/*"])
    python_test_utils(name="support", sources=["*.py", "!test_*.py", "!conftest.py"])
    # mypy treats two conftest.py as the same module, so it checks only the one at the root.
    python_test_utils(name="conftest", sources=["conftest.py"], skip_mypy=True)
    batches = {"tests": ["test_*.py", *["!" + name for name in second_batch]]}
    if second_batch:
        batches["second_batch"] = list(second_batch)
    for name, sources in batches.items():
        tjx_test_batch(
            name,
            sources=sources,
            dependencies=[":golden", f"{project}:meta", f"{project}/src", *dependencies],
            tag=f"{project}:{name}",
            **fields,
        )


def tjx_test_batch(name, sources, dependencies, tag=None, **fields):
    """Declare test files that share a process.

    Every test depends on all third-party requirements: Pants builds a virtual environment for each
    distinct set of them, which takes longer than most batches. A test checks the import rule.
    """
    python_tests(
        name=name,
        sources=sources,
        dependencies=["//:test_settings", "tools/locks:main", *dependencies],
        batch_compatibility_tag=tag or name,
        **fields,
    )
