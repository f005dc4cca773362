"""Test files that import a module, nearest first."""

import ast
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from pathlib import Path


class ImportGraph:
    """Imports between the modules and test files of a tree.

    A public name that a package's ``__init__`` re-exports counts as an import of the module that
    defines it, so that ``from tjx_nn import GPT`` does not depend on all of tjx_nn.

    Parameters
    ----------
    root : Path
        Folder that holds ``packages``, ``apps`` and ``tests-integration``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[str, Path] = {}  # module name -> file
        for folder in sorted([*root.glob("packages/*/src"), *root.glob("apps/*/src")]):
            for file in sorted(folder.rglob("*.py")):
                self.files[_module_name(file.relative_to(folder))] = file
        self.test_files = sorted(
            [
                *root.glob("packages/*/tests/**/*.py"),
                *root.glob("apps/*/tests/**/*.py"),
                *root.glob("tests-integration/*.py"),
            ]
        )
        self.files |= {file.stem: file for file in self.test_files}
        self._exports = {
            name: dict(self._read_exports(name, file))
            for name, file in self.files.items()
            if file.name == "__init__.py"
        }
        self._importers: dict[Path, set[Path]] = defaultdict(set)
        for name, file in self.files.items():
            if file.name != "__init__.py":
                for imported in self._imports(name, file.read_text()):
                    self._importers[self.files[imported]].add(file)
        self._fan_out = Counter(
            importer for importers in self._importers.values() for importer in importers
        )

    def source_files(self) -> list[Path]:
        """Return the modules of packages and apps that do not only re-export."""
        tests = set(self.test_files)
        return sorted(
            file
            for name, file in self.files.items()
            if file not in tests and file.name != "__init__.py"
        )

    def nearest_tests(self, module: Path, limit: int) -> list[Path]:
        """Return at most `limit` test files that import a module, directly or through others.

        Parameters
        ----------
        module : Path
            A file of `source_files`.
        limit : int
            Most files to return.

        Returns
        -------
        list of Path
            Tests of the same package that are named after the module first, then direct importers;
            among those as near, tests of the same package, then the files that import least.
        """
        distances, queue = {module: 0}, deque([module])
        while queue:
            file = queue.popleft()
            for importer in sorted(self._importers[file] - distances.keys()):
                distances[importer] = distances[file] + 1
                queue.append(importer)
        project = self._project(module)
        found = [file for file in self.test_files if file in distances and _is_test(file)]
        found.sort(
            key=lambda file: (
                self._project(file) != project or module.stem not in file.stem,
                distances[file],
                self._project(file) != project,
                self._fan_out[file],
                file,
            )
        )
        return found[:limit]

    def _project(self, file: Path) -> tuple[str, ...]:
        return file.relative_to(self.root).parts[:2]

    def _read_exports(self, package: str, file: Path) -> Iterator[tuple[str, str]]:
        stub = file.with_suffix(".pyi")
        tree = ast.parse((stub if stub.exists() else file).read_text())
        for node in tree.body:
            if isinstance(node, ast.ImportFrom):
                source = _absolute(node, package, is_package=True)
                for alias in node.names:
                    inner = f"{source}.{alias.name}"
                    yield alias.asname or alias.name, inner if inner in self.files else source

    def _imports(self, name: str, source: str) -> Iterator[str]:
        tree = ast.parse(source)
        aliases: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = _absolute(node, name, is_package=False)
                for alias in node.names:
                    yield from self._defining(module, alias.name)
                    if f"{module}.{alias.name}" in self._exports:
                        aliases[alias.asname or alias.name] = f"{module}.{alias.name}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    yield from self._known([alias.name])
                    aliases[alias.asname or alias.name.partition(".")[0]] = (
                        alias.name if alias.asname else alias.name.partition(".")[0]
                    )
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                package = aliases.get(node.value.id, "")
                if package in self._exports:
                    yield from self._defining(package, node.attr)

    def _defining(self, module: str, name: str) -> Iterator[str]:
        """Yield the module that defines a name imported from a module or package."""
        if f"{module}.{name}" in self.files:
            yield from self._known([f"{module}.{name}"])
        elif (source := self._exports.get(module, {}).get(name)) not in (None, module):
            assert source is not None
            yield from (
                self._defining(source, name) if source in self._exports else self._known([source])
            )
        else:
            yield from self._known([module])

    def _known(self, names: Iterable[str]) -> Iterator[str]:
        yield from (name for name in names if name in self.files)


def _is_test(file: Path) -> bool:
    return file.name.startswith("test_")


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _absolute(node: ast.ImportFrom, importer: str, *, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = importer.split(".")
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, *([node.module] if node.module else [])])
