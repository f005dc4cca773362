"""Wheels of the apps: complete metadata. Those of packages also install alone (test_wheels.py)."""

from pathlib import Path

from release import wheel_problems

ROOT = Path(__file__).resolve().parents[1]


def test_the_wheels_of_the_apps_are_complete() -> None:
    wheels = sorted(ROOT.glob("*.whl"))  # built by `./pants package`, in the sandbox of this test
    assert [wheel.name.split("-")[0] for wheel in wheels] == ["tjx_eval", "tjx_trainer"]
    for wheel in wheels:
        assert wheel_problems(wheel) == [], wheel.name
