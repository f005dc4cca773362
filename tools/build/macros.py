"""Macros for BUILD files: what each package and app of the repository consists of."""


def tjx_package(name):
    """Declare the targets of one package: sources, tests and the wheel."""
    _tjx_project(name)
    python_distribution(
        name="wheel",
        dependencies=[":src", ":meta", "//:license"],
        provides=python_artifact(name=name),
        generate_setup=False,
        sdist=False,
    )


def tjx_app(name, entry_point):
    """Declare the targets of one app: sources, tests and the program that `run` starts."""
    _tjx_project(name)
    pex_binary(name="app", entry_point=entry_point, execution_mode="venv", layout="packed")


def _tjx_project(name):
    python_sources(
        name="src",
        sources=["src/**/*.py", "src/**/*.pyi"],
        dependencies=[":data"],
    )
    resources(name="data", sources=["src/**/py.typed", "src/**/*.yaml"])
    files(name="meta", sources=["pyproject.toml", "README.md", "CHANGELOG.md"])
    files(name="golden", sources=["tests/golden/**/*"])
    python_test_utils(
        name="test_support",
        sources=["tests/**/*.py", "!tests/**/test_*.py"],
    )
    python_tests(
        name="tests",
        sources=["tests/**/test_*.py"],
        dependencies=[":golden", ":meta", ":src", "//:test_settings"],
        # One process for all test files: importing JAX and compiling cost more than the tests.
        batch_compatibility_tag=name,
    )
