"""Verifiers: correct verdicts, and a score of 0 for programs that crash, hang or flood."""

import time
from pathlib import Path

import pytest

from tjx_rl.verifiers import sandbox
from tjx_rl.verifiers.verify import Verdict, verify

# Pants' sandboxes and containers may forbid namespaces.
ISOLATED = bool(sandbox.isolation_command())


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TJX_VERIFIER_NETWORK", "0" if ISOLATED else "1")


@pytest.mark.parametrize(
    ("verifier", "response", "answer", "passes"),
    [
        ("exact", " yes\n", "yes", True),
        ("exact", "yes!", "yes", False),
        ("numeric", "12+30=42", "42", True),
        ("numeric", "42 or 43", "42", False),
        ("numeric", "-1,234.50 dollars.", "-1234.5", True),
        ("numeric", "no number", "0", False),
        ("regex", "abc12", r"[a-c]+\d\d", True),
        ("regex", "abc123", r"[a-c]+\d\d", False),
        ("json_schema", "[1, 2.0]", '{"type": "array", "items": {"type": "integer"}}', True),
        ("json_schema", "[1, true]", '{"type": "array", "items": {"type": "integer"}}', False),
        ("json_schema", "[" * 100_000, "{}", False),
        ("json_schema", '{"a": 5}', '{"properties": {"a": {"maximum": 4}}}', False),
        ("json_schema", '{"b": 5}', '{"properties": {}, "additionalProperties": false}', False),
        ("json_schema", '"x"', '{"enum": ["x", "y"]}', True),
        ("unit_tests", "def f(x): return x + 1", "assert f(1) == 2", True),
        ("unit_tests", "def f(x): return x", "assert f(1) == 2", False),
        ("unit_tests", "import sys; sys.exit(0)", "assert False", False),
    ],
)
def test_verifiers_decide(verifier: str, response: str, answer: str, passes: bool) -> None:
    assert verify(verifier, [response], [answer]) == [Verdict(float(passes))]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("while True: pass", "time limit of 1 s"),
        ("import os\nwhile True: os.write(1, b'x' * 65536)", "output limit of 1000 bytes"),
    ],
    ids=["hang", "flood"],
)
def test_a_program_that_exceeds_a_limit_scores_zero_and_is_counted(
    program: str, reason: str
) -> None:
    limits = sandbox.Limits(seconds=1.0, output=1000)
    verdicts = verify(lambda r, t: sandbox.passes_tests(r, t, limits), [program], [""])
    assert verdicts == [Verdict(0.0, reason)]


def test_a_process_that_a_program_leaves_behind_is_killed(tmp_path: Path) -> None:
    marker = tmp_path / "alive"
    program = (
        "import os, time\nif os.fork(): os._exit(0)\n"
        f"while True:\n    open({str(marker)!r}, 'a').write('x')\n    time.sleep(0.01)"
    )
    limits = sandbox.Limits(seconds=1.0)
    (verdict,) = verify(lambda r, t: sandbox.passes_tests(r, t, limits), [program], [""])
    assert verdict.score == 0
    size = marker.stat().st_size if marker.exists() else 0
    time.sleep(0.2)
    assert (marker.stat().st_size if marker.exists() else 0) == size


def test_memory_and_file_sizes_are_limited() -> None:
    finished = sandbox.run_program("x = bytearray(1 << 31)")
    assert finished.code != 0
    assert "MemoryError" in finished.output
    finished = sandbox.run_program("open('f', 'wb').write(bytes(1 << 20))")
    assert finished.code != 0


def test_a_program_has_no_network() -> None:
    program = (
        "import socket\nhosts = [name for _, name in socket.if_nameindex()]\n"
        "assert hosts == ['lo'], hosts\n"
        "try: socket.create_connection(('127.0.0.1', 9), 1)\n"
        "except OSError as error: print(error.errno)"
    )
    if ISOLATED:
        finished = sandbox.run_program(program)
        assert finished.code == 0
        assert finished.output.strip() == "101"  # unreachable: even the loopback is down


def test_without_namespaces_programs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "isolation_command", tuple)
    monkeypatch.setenv("TJX_VERIFIER_NETWORK", "0")
    (verdict,) = verify("unit_tests", ["pass"], [""])
    assert verdict.score == 0
    assert "TJX_VERIFIER_NETWORK=1" in str(verdict.failure)


def test_verifiers_that_raise_score_zero_and_are_counted() -> None:
    def crash(response: str, answer: str) -> bool:
        raise RuntimeError(response + answer)

    assert verify(crash, ["a"], ["b"]) == [Verdict(0.0, "RuntimeError: ab")]
    (bad_answer,) = verify("numeric", ["1"], ["one"])
    assert (
        bad_answer.failure == "ValueError: answer: got 'one'; expected a number; correct the data"
    )
    (bad_schema,) = verify("json_schema", ["1"], ['{"$ref": "x"}'])
    assert "got ['$ref']" in str(bad_schema.failure)
    (bad_pattern,) = verify("regex", ["1"], ["("])
    assert "pattern: got '('" in str(bad_pattern.failure)
    (slow,) = verify("regex", ["a" * 40 + "b"], ["(a+)+"])
    assert slow.failure == "time limit of 2 s"


def test_an_unknown_verifier_raises() -> None:
    with pytest.raises(
        ValueError, match=r"verifier: got 'numric'; expected .* did you mean numeric"
    ):
        verify("numric", [], [])
