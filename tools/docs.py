"""Build the documentation site and check it.

`./pants run tools/docs.py` collects the pages and notebooks of docs/, the READMEs of packages and
apps, the scripts of examples/ and a reference page of each package's public names, builds
dist/docs/VERSION with MkDocs, and fails on broken links, pages outside the navigation, docstrings
of public names that do not match their signatures, misspellings, and questions of `QUESTIONS` that
the search does not answer with the expected page first. The sources are parsed, not imported.
A site is not built again while nothing that it depends on changes; spelling is always checked.
"""

import argparse
import contextlib
import fnmatch
import hashlib
import io
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import griffe
import yaml
from codespell_lib import main as codespell
from docstring_check import docstring_problems
from docstring_groups import ParameterGroups
from lunr import lunr
from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).resolve().parents[1]
STAGED = ROOT / "dist" / "docs-source"
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")

FOLDERS = (".github", "apps", "docs", "examples", "packages", "tests-integration", "tools")
# Folders and patterns of files.
SOURCES = (
    "docs",
    "examples",
    "packages",
    "*.md",
    "mkdocs.yml",
    "tools/doc*.py",
    "tools/locks/docs.txt",
)
# Front matter of pages that the search lists after the guides.
LAST_IN_SEARCH = "---\nsearch:\n  boost: 0.01\n---\n"
# Questions of newcomers: the page that the search must give first.
QUESTIONS = {
    "fine-tune": "fine_tuning.html",
    "resume after preemption": "checkpoint_resume.html",
    "add a model": "extending.html",
    "use my own tokens": "data.html",
    "loss is NaN": "troubleshooting.html",
    "what fits on my GPU memory": "performance.html",
    "log to W&B": "metrics.html",
    "export to Hugging Face": "evaluation.html",
    "shard over 8 GPUs": "distributed_training.html",
    "write a custom attention mask": "attention_kernels.html",
    # The same by other words.
    "fine-tuning": "fine_tuning.html",
    "callback": "extending.html",
    "barrier": "distributed_training.html",
    "preemption": "checkpoint_resume.html",
    "checkpoint": "checkpoint_resume.html",
    "distributed": "distributed_training.html",
    "OOM": "troubleshooting.html",
    "out of memory": "troubleshooting.html",
    # Pages by the names of the project's requirements.
    "quickstart": "quickstart.html",
    "flash attention": "attention_kernels.html",
    "API reference": "reference/index.html",
    "speedrun benchmark": "speedrun.html",
    "PyTorch to JAX": "torch_to_jax.html",
}
# Patterns of public names whose docstrings are not compared with their signatures, with the reason.
EXCEPTIONS = {
    "tjx_metrics.*?Tracker.*": "methods of the protocol `Tracker`, which documents them",
    "tjx_parallel.MeshLayout.*": "methods of the interface `tjx_nn.Layout`, which documents them",
}


def inputs_digest() -> str:
    """Return the SHA-256 of what the site depends on.

    These are the names of the repository's files, since pages link to them, and the contents of
    files that `SOURCES` names.
    """
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    names = {
        path.relative_to(ROOT): path
        for path in sorted([*files, *ROOT.glob("*")])
        if path.is_file() and "__pycache__" not in path.parts
    }
    digests = (
        f"{name} {hashlib.sha256(path.read_bytes()).hexdigest() if is_source(name) else ''}\n"
        for name, path in names.items()
    )
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def is_source(name: Path) -> bool:
    """Return whether the site depends on the contents of a file of the repository."""
    return any(name.is_relative_to(source) or name.match(source) for source in SOURCES)


def page_sources() -> dict[str, Path]:
    """Return page path -> Markdown file, notebook, or script of examples/, of the repository."""
    pages = {path.relative_to(ROOT / "docs").as_posix(): path for path in ROOT.glob("docs/**/*.md")}
    pages["experiments/index.md"] = pages.pop("experiments/README.md")
    pages["examples/index.md"] = pages.pop("examples.md")
    pages["notebooks/index.md"] = pages.pop("notebooks.md")
    for script in ROOT.glob("examples/*.py"):
        pages[f"examples/{script.stem}.md"] = script
    for notebook in ROOT.glob("docs/notebooks/*.ipynb"):
        pages[f"notebooks/{notebook.stem}.md"] = notebook
    for readme in [*ROOT.glob("packages/*/README.md"), *ROOT.glob("apps/*/README.md")]:
        pages[f"packages/{readme.parent.name}.md"] = readme
    pages["contributing.md"] = ROOT / "CONTRIBUTING.md"
    pages["security.md"] = ROOT / "SECURITY.md"
    return pages


def staged_text(page: str, pages: dict[str, Path]) -> str:
    """Return a page with its links between repository files as links between pages.

    A link to a file or folder which is no page becomes its text.

    Raises
    ------
    ValueError
        If a link leads to a file that does not exist.
    """
    source = pages[page]
    text = source.read_text(encoding="utf-8")
    if source.suffix == ".py":
        return f"{LAST_IN_SEARCH}# {source.name}\n\n```python\n{text}```\n"
    if source.suffix == ".ipynb":
        text = LAST_IN_SEARCH + notebook_text(json.loads(text))
    page_of = {path: name for name, path in pages.items()}

    def rewrite(match: re.Match[str]) -> str:
        target = match[2]
        if "://" in target or target.startswith(("mailto:", "data:")):
            return match[0]
        path = (source.parent / target).resolve()
        if not path.exists():
            raise ValueError(f"{source.relative_to(ROOT)}: link to {target}, which does not exist")
        path = path / "README.md" if (path / "README.md") in page_of else path
        linked = page_of.get(path)
        if linked is None and path.is_relative_to(ROOT / "docs") and path.suffix == ".png":
            linked = path.relative_to(ROOT / "docs").as_posix()
        if linked is None:
            return "](#outside)"
        return match[1] + os.path.relpath(linked, Path(page).parent) + match[3]

    return re.sub(r"\[([^\]]+)\]\(#outside\)", r"\1", LINK.sub(rewrite, text))


def notebook_text(notebook: dict[str, Any]) -> str:
    """Return a notebook with its stored outputs as Markdown."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if "text" in output:
                parts.append("```text\n" + "".join(output["text"]).rstrip() + "\n```")
            else:
                parts.append(f"![figure](data:image/png;base64,{output['data']['image/png']})")
    return "\n\n".join(parts) + "\n"


def public_names(package: str) -> Iterator[tuple[str, griffe.Object | griffe.Alias]]:
    """Yield the exported names of a package with what they name."""
    folder = ROOT / "packages" / package.replace("_", "-") / "src" / package
    sources = [str(path) for path in ROOT.glob("packages/*/src")]
    module = griffe.load(
        package,
        search_paths=sources,
        docstring_parser="numpy",
        extensions=griffe.load_extensions(ParameterGroups),
        resolve_aliases=True,
    )
    stub = folder / "__init__.pyi"  # lazily imported names
    names = re.findall(r" as (\w+)$", stub.read_text(), re.MULTILINE) if stub.exists() else ()
    for name in names or sorted(map(str, module.exports or ())):
        exported = module[name]
        yield name, exported.final_target if isinstance(exported, griffe.Alias) else exported


def unexcepted(problems: Iterable[str]) -> list[str]:
    """Leave out the problems of names in `EXCEPTIONS`."""
    return [
        problem
        for problem in problems
        if not any(fnmatch.fnmatch(problem.partition(":")[0], name) for name in EXCEPTIONS)
    ]


def write_reference(packages: list[str]) -> list[str]:
    """Write a page of the public names of each package; return what they lack."""
    problems = []
    (STAGED / "reference").mkdir(parents=True)
    lines = ["# API reference", "", "The public names of each package:", ""]
    for package in packages:
        names = sorted(public_names(package), key=lambda pair: pair[0].lower())
        for name, target in names:
            problems += unexcepted(docstring_problems(f"{package}.{name}", target))
        entries = "".join(f"\n::: {package}.{name}\n" for name, _ in names)
        head = f"{LAST_IN_SEARCH}# {package}\n\n"
        page = f"{head}```python\nimport {package}\n```\n{entries}"
        (STAGED / "reference" / f"{package}.md").write_text(page, encoding="utf-8")
        listed = ", ".join(f"[`{name}`]({package}.md#{package}.{name})" for name, _ in names)
        lines += [f"- [{package}]({package}.md): {listed}"]
    (STAGED / "reference" / "index.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return problems


def navigation(nav: list[Any]) -> list[Any]:
    """Replace the folders in a navigation by their pages."""

    def expand(item: Any) -> Any:
        ((title, content),) = item.items()
        if isinstance(content, str) and not content.endswith(".md"):
            pages = sorted(path.name for path in (STAGED / content).glob("*.md"))
            first = [name for name in ("index.md",) if name in pages]
            rest = [name for name in pages if name != "index.md"]
            return {title: [f"{content}/{name}" for name in [*first, *rest]]}
        return item

    return [expand(item) for item in nav]


def search(site: Path) -> list[str]:
    """Return the questions that the search index does not answer with the expected page first."""
    entries = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    fields = [{"field_name": "title", "boost": 1000}, "text"]
    weighted = [(entry, {"boost": entry.get("boost", 1)}) for entry in entries]
    index = lunr(ref="location", fields=fields, documents=weighted)
    problems = []
    for question, page in QUESTIONS.items():
        hits = [hit["ref"] for hit in index.search(question)]
        if not hits or hits[0].partition("#")[0] != page:
            problems.append(f"search {question!r}: got {hits[:3]}; expected {page} first")
    return problems


def misspellings() -> list[str]:
    """Return `file:line: word ==> correction` for documentation, docstrings and comments."""
    pages = [str(path.relative_to(ROOT)) for path in ROOT.glob("*.md")]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        codespell("docs", "packages", "apps", "examples", *pages)  # settings: pyproject.toml
    return printed.getvalue().splitlines()


def write_versions(site: Path, version: str) -> None:
    """Add a version to versions.json, newest first, and lead the root of the site to the newest."""
    file = site / "versions.json"
    known = json.loads(file.read_text()) if file.exists() else []
    names = sorted({version, *(entry["version"] for entry in known)}, reverse=True)
    file.write_text(json.dumps([{"version": n, "title": n, "aliases": []} for n in names]))
    redirect = f'<meta http-equiv="refresh" content="0; url={names[0]}/index.html">\n'
    (site / "index.html").write_text(redirect)


def build_site(root: Path, version: str) -> list[str]:
    """Build the site of a version below the folder of all versions; return its problems."""
    shutil.rmtree(STAGED, ignore_errors=True)
    images_only = shutil.ignore_patterns("*.md", "*.json", "*.ipynb", "BUILD", "jobs")
    shutil.copytree(ROOT / "docs", STAGED, ignore=images_only)
    pages = page_sources()
    for page in pages:
        (STAGED / page).parent.mkdir(parents=True, exist_ok=True)
        (STAGED / page).write_text(staged_text(page, pages), encoding="utf-8")
    packages = sorted(path.parent.name for path in ROOT.glob("packages/*/src/*/__init__.py"))
    problems = write_reference(packages)
    nav = navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    site = root / version
    build(load_config("mkdocs.yml", docs_dir=str(STAGED), site_dir=str(site), nav=nav))
    write_versions(root, version)
    return problems + search(site)


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--site", type=Path, default=ROOT / "dist" / "docs", help="output folder")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")  # those of MkDocs
    newest = (ROOT / "apps/trainer/src/tjx_trainer/__init__.py").read_text(encoding="utf-8")
    version = re.findall(r'^__version__ = "(\d+\.\d+)', newest, re.MULTILINE)[0]
    site = arguments.site / version
    digest, built = inputs_digest(), site / "inputs.sha256"
    is_built = built.is_file() and built.read_text() == digest
    site_problems = [] if is_built else build_site(arguments.site, version)
    if not site_problems:
        built.write_text(digest)
    problems = site_problems + misspellings()
    done = f"documentation: {site.resolve()}/index.html{' (unchanged)' * is_built}"
    print("\n".join(problems) or done)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
