"""Kills at random moments and damaged checkpoints: a run always resumes from a valid checkpoint."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from campaigns import corruption, kills
from campaigns.damage import DAMAGES
from campaigns.outcome import Outcome, describe_difference, outcome
from campaigns.tiny_run import TinyRun

pytest_plugins = ["fault_fixtures"]

EVERY_CHECKPOINT_DAMAGED = 4


def damage(run: TinyRun, step: int) -> str:
    """Flip a bit in the middle of the largest file of a checkpoint; return the file's name."""
    folder = run.checkpoints / str(step)
    files = [path for path in folder.rglob("*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path.relative_to(folder).as_posix()


def test_run_killed_at_random_moments_matches_the_undisturbed_run(
    undisturbed: TinyRun, expected: Outcome, tmp_path: Path
) -> None:
    flags = {**undisturbed.flags, "data.path": "rhyme.txt", "data.cache_dir": "prepared"}
    reference = kills.Reference(
        replace(undisturbed, flags=flags), expected, seconds=1.0, save_seconds=0.02
    )
    campaign = kills.Campaign({"sample": reference}, seed=7, kills=4, folder=tmp_path)
    found = campaign.run()
    assert found.failures == []
    assert found.moments.total() >= 4
    assert found.runs["sample"] >= 1


def test_every_kind_of_damage_is_detected_named_and_survived(
    undisturbed: TinyRun, tmp_path: Path
) -> None:
    found = corruption.Campaign(undisturbed.run_dir, tmp_path).run(seed=7, cases=60)
    assert found.failures == []
    assert len(found.kinds) == len(DAMAGES)
    assert all(tally.perfect and tally.cases == 5 for tally in found.kinds.values())


def test_campaign_reports_undetected_damage(
    undisturbed: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No damage at all stands for undetected damage.
    monkeypatch.setattr(corruption, "DAMAGES", {"nothing": lambda _step, _draw: ["manifest.json"]})
    found = corruption.Campaign(undisturbed.run_dir, tmp_path).run(seed=7, cases=1)
    assert len(found.failures) == 1
    assert not found.kinds["nothing"].perfect


def test_damaged_checkpoint_is_set_aside_and_the_run_resumes_from_the_previous_one(
    copy_of_finished: Callable[..., TinyRun], expected: Outcome
) -> None:
    run = copy_of_finished()
    name = damage(run, 60)
    printed = run.finish()
    assert name in printed
    assert "60.corrupt" in printed
    assert "from step 50" in printed
    shutil.rmtree(run.checkpoints / "60.corrupt")
    assert describe_difference(outcome(run.run_dir), expected) == []


def test_run_stops_if_all_checkpoints_are_damaged(
    copy_of_finished: Callable[..., TinyRun],
) -> None:
    run = copy_of_finished()
    steps = run.saved()
    names = [damage(run, step) for step in steps]
    metrics = (run.run_dir / "metrics.jsonl").read_bytes()
    for _ in range(2):  # a supervisor may restart it
        printed = run.finish(expected=EVERY_CHECKPOINT_DAMAGED)
        for step, name in zip(steps, names, strict=True):
            assert f"step {step}: {name}" in printed
    assert "Traceback" not in printed
    assert run.saved() == steps
    assert (run.run_dir / "metrics.jsonl").read_bytes() == metrics
