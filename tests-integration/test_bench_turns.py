"""Worker processes of the training and generation benchmarks."""

import sys
from pathlib import Path

import pytest
import turns
from turns import Worker, WorkerError, summary

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from turns import serve
def double(x):
    print("what libraries print is no answer")
    return {"y": 2 * x}
serve({"double": double, "fail": lambda: {}["nothing"]})
"""


def test_worker_answers_until_it_fails(capfd: pytest.CaptureFixture[str]) -> None:
    worker = Worker([sys.executable, "-c", PROGRAM, str(Path(turns.__file__).parent)], {})
    assert [worker.ask("double", x=x) for x in (1, 2.5)] == [{"y": 2}, {"y": 5.0}]
    with pytest.raises(WorkerError, match="ended with 1 at 'fail'"):
        worker.ask("fail")
    assert "what libraries print" in capfd.readouterr().err


def test_a_summary_is_in_milliseconds() -> None:
    found = summary([0.001, 0.004, 0.002])
    assert found == {"median_ms": 2.0, "least_ms": 1.0, "most_ms": 4.0, "count": 3}
