"""Pytest plugin that reports each test as a case of `gpu_slices.json_lines`, with a time limit.

    python -m pytest -p gpu_slices.pytest_cases TESTS

A test that exceeds its limit ends the process, as a hanging kernel cannot be interrupted.
"""

import faulthandler

import pytest
from gpu_slices.json_lines import begin, finish

SECONDS = 60.0  # per test, including compilation

_reports: list[pytest.TestReport] = []


def pytest_runtest_logstart(nodeid: str) -> None:
    """Report the start of a test and start its timer."""
    begin(_name(nodeid))
    _reports.clear()
    faulthandler.dump_traceback_later(SECONDS, exit=True)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Record the outcome of setup, call and teardown."""
    _reports.append(report)


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Report the outcome of the test: the worst of its phases."""
    faulthandler.cancel_dump_traceback_later()
    seconds = round(sum(report.duration for report in _reports), 2)
    for report in _reports:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = str(crash.message if crash else report.longrepr)[:300]
            return finish(_name(nodeid), "failed", reason=reason, seconds=seconds)
        if report.skipped:
            _, _, reason = report.longrepr if isinstance(report.longrepr, tuple) else ("", 0, "")
            return finish(_name(nodeid), "skipped", reason=str(reason), seconds=seconds)
    return finish(_name(nodeid), "ok", seconds=seconds)


def _name(nodeid: str) -> str:
    return nodeid.rpartition("::")[2]
