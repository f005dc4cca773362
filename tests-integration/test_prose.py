"""Prose of documentation, docstrings and messages uses standard terms."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PHRASES = yaml.safe_load((ROOT / "tools/prose/phrases.yml").read_text())
PATTERN = re.compile("|".join(rf"\b{phrase}\b" for phrase in PHRASES), re.IGNORECASE)
# "nobody/gpt2" is the name of a hub repository that does not exist.
ALLOWED = re.compile(r"\bnobody/")


def findings(text: str) -> list[str]:
    """Return `phrase; write replacement: line` for each line with a phrase."""
    return [
        f"{found[0]!r}; write {PHRASES[found[0].lower()]!r}: {line.strip()}"
        for line in text.splitlines()
        if (found := PATTERN.search(ALLOWED.sub("", line)))
    ]


def test_the_pattern_finds_a_phrase() -> None:
    (found,) = findings("Whoever calls this\nThe caller\nnobody/gpt2")
    assert found == "'Whoever'; write 'the caller, the user or the process': Whoever calls this"


def test_no_phrase_is_used() -> None:
    files = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("packages/*/*.md"),
        *ROOT.glob("apps/*/*.md"),
        *ROOT.glob("packages/*/src/**/*.py"),
        *ROOT.glob("apps/*/src/**/*.py"),
        *ROOT.glob("examples/**/*.py"),
        *ROOT.glob("tools/**/*.py"),
    ]
    assert len(files) > 100
    used = [
        f"{file.relative_to(ROOT)}: {finding}"
        for file in files
        for finding in findings(file.read_text())
    ]
    assert used == []
