"""List the breaking changes of each package's public names since a revision.

    ./pants run tools/api_diff.py -- tjx-nn tjx-optim
    ./pants run tools/api_diff.py -- --base 6fc0ec7

The base of a package is its last tag, such as tjx-nn-v0.2.0, unless `--base` names a revision.
Public are the names that a package's ``__init__`` exports, and those of an exported module. griffe
compares them without importing the code: removed names, changed kinds of objects, base classes, and
parameters. A name that `tjx_core.deprecated_names` keeps is not removed; one whose last version has
passed is reported. The exit code is 1 if there is a breaking change.
"""

import argparse
import ast
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import griffe
from packaging.version import Version

from tjx_core.deprecation import removal_version

ROOT = Path(__file__).resolve().parents[1]


def public_objects(sources: Path, package: str) -> dict[str, griffe.Object]:
    """Return what a package exports, without importing it.

    Parameters
    ----------
    sources : Path
        The folder that holds the package, ``packages/tjx-nn/src``.
    package : str
        Its import name.

    Returns
    -------
    dict of str to griffe.Object
        Public name to the object it stands for; names of an exported module are dotted.
    """
    module = griffe.load(package, search_paths=[sources], resolve_aliases=True)
    assert isinstance(module, griffe.Module)
    return dict(_exports(module, ""))


def _exports(module: griffe.Module, prefix: str) -> Iterator[tuple[str, griffe.Object]]:
    for name in _exported_names(module):
        member = module.members.get(name)
        if member is None:
            continue
        try:
            target = member.final_target if isinstance(member, griffe.Alias) else member
        except (griffe.AliasResolutionError, griffe.CyclicAliasError):
            continue  # from another package
        if isinstance(target, griffe.Module):
            yield from _exports(target, f"{prefix}{name}.")
        else:
            yield prefix + name, target


def _exported_names(module: griffe.Module) -> list[str]:
    """Return the names of ``__all__``, or the names that a stub or module re-exports."""
    file = cast(Path, module.filepath)
    stub = file.with_suffix(".pyi")
    tree = ast.parse((stub if stub.exists() else file).read_text())
    exported = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
        if isinstance(node, ast.ImportFrom):
            exported += [alias.name for alias in node.names if alias.asname == alias.name]
    return exported


def deprecated(init: Path) -> dict[str, tuple[str, str]]:
    """Return the old names that a package keeps: name to (new name, version that renamed it)."""
    found: dict[str, tuple[str, str]] = {}
    for node in ast.walk(ast.parse(init.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("deprecated_names"):
            names = ast.literal_eval(node.args[1])
            (since,) = (
                ast.literal_eval(word.value) for word in node.keywords if word.arg == "since"
            )
            found |= {old: (new, since) for old, new in names.items()}
    return found


def breaking_changes(old: Path, new: Path, package: str) -> list[str]:
    """Return a line for each breaking change of a package between two source folders.

    Parameters
    ----------
    old, new : Path
        Folders that hold the package, such as ``packages/tjx-nn/src`` of two checkouts.
    package : str
        Its import name.

    Returns
    -------
    list of str
        Such as ``tjx_nn.GPT(config): parameter was removed``.
    """
    before, after = public_objects(old, package), public_objects(new, package)
    kept = deprecated(new / package / "__init__.py")
    found: list[str] = []
    for name, target in before.items():
        if name in after:
            found += _changes(f"{package}.{name}", target, after[name])
        elif name not in kept:
            found.append(f"{package}.{name}: public object was removed")
    return found


def _changes(name: str, old: griffe.Object, new: griffe.Object) -> Iterator[str]:
    # griffe compares the members of two modules.
    modules = griffe.Module("old"), griffe.Module("new")
    for module, target in zip(modules, (old, new), strict=True):
        module.members["name"] = cast("griffe.Class", target)
    for breakage in griffe.find_breaking_changes(*modules):
        # Of an inherited member, griffe knows the path in the class that defines it.
        is_member = breakage.obj.path not in (old.path, new.path)
        path = f"{name}.{breakage.obj.name}" if is_member else name
        parameter = breakage.old_value if breakage.old_value is not None else breakage.new_value
        if isinstance(parameter, griffe.Parameter):
            path += f"({parameter.name})"
        details = f" ({breakage.details})" if breakage.details else ""
        yield f"{path}: {breakage.kind.value[0].lower()}{breakage.kind.value[1:]}{details}"


def overdue(init: Path, version: str) -> list[str]:
    """Return a line for each deprecated name that a version must no longer have."""
    return [
        f"{old} (now {new}): deprecated since {since}; delete it from deprecated_names in {init}"
        for old, (new, since) in deprecated(init).items()
        if Version(version) >= Version(removal_version(since))
    ]


def last_tag(tags: Sequence[str], package: str, before: str | None = None) -> str | None:
    """Return the newest tag of a package, older than a version if one is given.

    >>> last_tag(["tjx-nn-v0.2.0", "tjx-nn-v0.10.0", "tjx-core-v1.0.0"], "tjx-nn")
    'tjx-nn-v0.10.0'
    >>> last_tag(["tjx-nn-v0.2.0", "tjx-nn-v0.10.0"], "tjx-nn", before="0.10.0")
    'tjx-nn-v0.2.0'
    """
    prefix = f"{package}-v"
    versions = [Version(tag.removeprefix(prefix)) for tag in tags if tag.startswith(prefix)]
    older = [version for version in versions if before is None or version < Version(before)]
    return f"{prefix}{max(older)}" if older else None


def changes_since(root: Path, revision: str, folder: Path) -> list[str] | None:
    """Return the breaking changes of the package in a folder since a revision of the repository.

    Parameters
    ----------
    root : Path
        The checkout.
    revision : str
        A tag or commit.
    folder : Path
        The package, ``root / "packages/tjx-nn"``; its working tree is the new version.

    Returns
    -------
    list of str or None
        None if the revision does not have the package.
    """
    package = folder.name.replace("-", "_")
    sources = folder.relative_to(root) / "src"
    archive = subprocess.run(
        ["git", "-C", str(root), "archive", revision, str(sources)],
        capture_output=True, check=False,
    )  # fmt: skip
    if archive.returncode:
        if b"did not match any files" in archive.stderr:
            return None
        raise ValueError(
            f"--base: got {revision}; expected a revision; git says {archive.stderr.decode()}"
        )
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(scratch, filter="data")
        return breaking_changes(Path(scratch) / sources, root / sources, package)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    folders = {folder.name: folder for folder in sorted((ROOT / "packages").glob("tjx-*"))}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("packages", nargs="*", metavar="package", help="all by default")
    parser.add_argument("--base", help="a revision, instead of the last tag of each package")
    arguments = parser.parse_args(words)
    if unknown := set(arguments.packages) - set(folders):
        parser.error(f"package: got {', '.join(unknown)}; expected some of {', '.join(folders)}")
    tags = subprocess.run(
        ["git", "-C", str(ROOT), "tag", "--list"], capture_output=True, check=True, text=True
    ).stdout.split()
    broken = False
    for name in arguments.packages or folders:
        base = arguments.base or last_tag(tags, name)
        if base is None:
            parser.error(f"--base: {name} has no tag yet; give a revision")
        try:
            found = changes_since(ROOT, base, folders[name])
        except ValueError as error:
            parser.error(str(error))
        print(f"{name} since {base}:", "new package" if found is None else f"{len(found)} breaking")
        for line in found or []:
            print(f"  {line}")
        broken = broken or bool(found)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
