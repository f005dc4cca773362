"""Guides in docs/ match the code: exit codes, error tables, flags and test names."""

import errno
import re
from dataclasses import fields
from pathlib import Path

from campaigns.faults import ERRNOS

from tjx_trainer.cli.nanogpt import flags
from tjx_trainer.config.config_tree import leaves
from tjx_trainer.pipeline.pipeline_command import PipelineFlags
from tjx_trainer.runtime.exit_codes import table
from tjx_trainer.scaling.predict_command import PredictFlags

ROOT = Path(__file__).resolve().parents[1]
GUIDES = sorted((ROOT / "docs").glob("*.md"))
RESUMING = (ROOT / "docs" / "checkpoint_resume.md").read_text(encoding="utf-8")


def test_exit_codes_in_the_guide_match_the_trainer() -> None:
    assert table() in RESUMING


def test_guide_lists_all_injected_system_errors() -> None:
    section = RESUMING.split("## Errors of the operating system")[1].split("\n## ")[0]
    injected = {errno.errorcode[number] for numbers in ERRNOS.values() for number in numbers}
    assert injected <= set(re.findall(r"\bE[A-Z]+\b", section))


def test_nanogpt_flags_in_the_guide_match_the_trainer() -> None:
    guide = (ROOT / "docs" / "nanogpt.md").read_text(encoding="utf-8")
    assert "\n".join(flags.table()) in guide


def test_every_flag_in_a_guide_exists() -> None:
    named = {
        flag
        for guide in GUIDES
        for flag in re.findall(r"--([a-z]+(?:\.[a-z0-9_]+)+)", guide.read_text(encoding="utf-8"))
    }
    assert len(named) > 5
    commands = {"pipeline": PipelineFlags, "predict": PredictFlags}
    own = {f"{name}.{field.name}" for name, kind in commands.items() for field in fields(kind)}
    assert named <= set(leaves()) | own


def test_every_fault_test_in_the_guide_exists() -> None:
    named = set(re.findall(r"test_faults_[a-z]+\.py", RESUMING))
    assert named == {path.name for path in Path(__file__).parent.glob("test_faults_*.py")}
