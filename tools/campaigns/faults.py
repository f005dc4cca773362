"""System call campaign: a run must survive the failure of any single file operation.

    ./pants run tools/campaigns/faults.py -- --seed 1 --cases 2000 [--output FILE]

A preloaded library (`fault_shim.c`) injects a fault into one operation below the run directory: an
errno that the call can return, once or persistently, a short write, or a kill before or after the
operation. Operations are those of starting a run, resuming, saving (with ``--checkpoint.on_error
continue``), pruning, evaluating and exporting. `storage_run` lists which parts of these programs
are real. After the fault

- the exit code is documented in docs/checkpoint_resume.md, without a traceback;
- no checkpoint is set aside, since none is damaged;
- evaluation and export leave the run directory unchanged;
- the same command then finishes with the leaves, metrics and checkpoints of an undisturbed run.

Needs Linux and a C compiler (cc).
"""

import argparse
import collections
import errno
import hashlib
import json
import os
import random
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from campaigns.fault_shim import (
    FAIL,
    KILL_AFTER,
    KILL_BEFORE,
    SHORT,
    Fault,
    arm,
    disarm,
    folder_with_shim,
    has_compiler,
)
from campaigns.tiny_run import Flags

from tjx_trainer.runtime.exit_codes import ExitCode

_READ = (errno.EIO, errno.ESTALE)
_NAME = (errno.EIO, errno.ESTALE, errno.EACCES)
_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
ERRNOS: Mapping[str, tuple[int, ...]] = {
    "open": (*_NAME, errno.EMFILE, errno.ENFILE),
    "create": (*_ROOM, errno.EACCES, errno.EMFILE),
    **dict.fromkeys(("read", "pread64", "preadv", "preadv64", "preadv64v2"), _READ),
    **dict.fromkeys(("write", "pwrite64"), (errno.ENOSPC, errno.EDQUOT, errno.EIO)),
    **dict.fromkeys(("fsync", "fdatasync", "ftruncate", "ftruncate64"), (errno.EIO, errno.ENOSPC)),
    **dict.fromkeys(("rename", "renameat", "mkdir"), (*_ROOM, errno.EACCES)),
    **dict.fromkeys(
        ("unlink", "unlinkat", "rmdir"), (errno.EIO, errno.EACCES, errno.EBUSY, errno.EROFS)
    ),
    "flock": (errno.ENOLCK, errno.EIO),
    **dict.fromkeys(("opendir", "fdopendir"), (*_NAME, errno.EMFILE)),
    **dict.fromkeys(("stat", "stat64", "lstat", "lstat64", "fstatat", "fstatat64"), _NAME),
}
"""Operation -> errors that it can meet."""
_CODES = {int(code) for code in ExitCode} - {ExitCode.UNEXPECTED, ExitCode.CHECKPOINTS_DAMAGED}
_EVAL_CODES = {0, 2, 5, 11}
_KILLED = -9
OPERATIONS = ("fresh", "resume", "save", "prune", "evaluate", "export")


@dataclass
class Found:
    """Results of a campaign.

    Attributes
    ----------
    cases
        Number of cases by operation and fault.
    codes
        Number of program ends by exit code; -9 is a kill.
    failures
        Failed cases, one or more lines each.
    """

    cases: collections.Counter[str] = field(default_factory=collections.Counter)
    codes: collections.Counter[int] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)


class Campaign:
    """Cases in copies of prepared run directories.

    Parameters
    ----------
    folder
        Working folder; the fault library is loaded.
    seed
        Selects the operations and faults.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        # Imports JAX, so that the fault library must be loaded first.
        from campaigns.storage_run import StorageRun

        self._folder, self._seed = folder, seed
        self._root = folder / "case"
        self._program = StorageRun(folder)
        self._printed = folder / "printed.txt"
        self.found = Found()
        self._prepared = self._prepare()
        self._expected: dict[str, Any] = {}
        self._calls: dict[str, list[str]] = {}
        for operation in OPERATIONS:
            self._calls[operation] = self._count(operation)
            self._lay_out(operation)
            self._expected[operation] = self._finish(operation)

    def run(self, cases: int) -> Found:
        """Run a number of cases, equally many of each operation, at each of its calls in turn."""
        draws = {name: random.Random(f"{self._seed} {name}") for name in OPERATIONS}  # noqa: S311
        places: dict[str, list[int]] = {name: [] for name in OPERATIONS}
        for number in range(cases):
            operation = OPERATIONS[number % len(OPERATIONS)]
            draw = draws[operation]
            if not places[operation]:
                places[operation] = draw.sample(
                    range(len(self._calls[operation])), len(self._calls[operation])
                )
            index = places[operation].pop()
            fault = _draw_fault(index, self._calls[operation][index], draw)
            self._case(operation, fault)
            if (number + 1) % 100 == 0:
                print(f"{number + 1} cases, {len(self.found.failures)} failures", flush=True)
        return self.found

    def _case(self, operation: str, fault: Fault) -> None:
        """Run one case and record its failures."""
        name = self._calls[operation][fault.place]
        how = {SHORT: "half of it", KILL_BEFORE: "killed before", KILL_AFTER: "killed after"}
        what = how.get(fault.action) or errno.errorcode[fault.number]
        self.found.cases[f"{operation}: {name} {what}"] += 1
        self._lay_out(operation)
        before = _content(self._root / "run")
        code = self._child(operation, fault)
        self.found.codes[code] += 1
        problems = self._judge(operation, fault, code)
        if operation in ("evaluate", "export") and _content(self._root / "run") != before:
            problems.append("the run directory was changed")
        if not problems:
            try:
                found = self._finish(operation)
            except AssertionError as error:
                problems.append(str(error))
            else:
                problems += _differences(found, self._expected[operation])
        if problems:
            place = f"{operation}, call {fault.place} ({name}), {what}"
            stays = ", and from then on" if fault.stays else ""
            failure = f"{place}{stays}: " + "; ".join(problems)
            self.found.failures.append(failure)
            print(f"case {sum(self.found.cases.values())}: {failure}", flush=True)

    def _judge(self, operation: str, fault: Fault, code: int) -> list[str]:
        printed = self._printed.read_text(errors="replace")
        problems = []
        killed = fault.action in (KILL_BEFORE, KILL_AFTER)
        codes = _EVAL_CODES if operation in ("evaluate", "export") else _CODES
        # Thread scheduling varies: the call may not have occurred.
        if code not in codes and not (killed and code == _KILLED):
            problems.append(f"exit code {code}")
        if "Traceback" in printed:
            problems.append("a traceback")
        if aside := sorted(path.name for path in self._root.rglob("*.corrupt*")):
            problems.append(f"set aside: {', '.join(aside)}")
        return [*problems, printed[-2000:]] if problems else []

    def _finish(self, operation: str) -> dict[str, Any]:
        """Run the same command without a fault; return its outcome."""
        result = self._folder / "result.json"

        def work() -> int:
            # An export gets its name when it is complete, and is not overwritten.
            is_done = operation == "export" and (self._root / "out").exists()
            code = 0 if is_done else self._work(operation)
            if code == 0:
                found = self._outcome(operation)
                result.write_text(json.dumps(found, sort_keys=True))
            return code

        result.unlink(missing_ok=True)
        code = run_in_child(work, self._printed)
        if code != 0:
            raise AssertionError(
                f"the next command ended with {code}:\n{self._printed.read_text()[-2000:]}"
            )
        found: dict[str, Any] = json.loads(result.read_text())
        return found

    def _child(self, operation: str, fault: Fault, record: int = -1) -> int:
        def work() -> int:
            arm(self._root, fault, record=record)
            try:
                return self._work(operation)
            finally:
                disarm()

        return run_in_child(work, self._printed)

    def _work(self, operation: str) -> int:
        run = self._root / "run"
        if operation == "evaluate":
            return self._program.evaluate(run)
        if operation == "export":
            return self._program.export(run, self._root / "out")
        flags: Mapping[str, Flags] = {
            "save": {"checkpoint.on_error": "continue"},
            "prune": {"checkpoint.keep": 1},
        }
        return self._program.train(run, flags.get(operation, {}))

    def _outcome(self, operation: str) -> dict[str, Any]:
        found = self._program.outcome(self._root / "run")
        out = self._root / "out"
        left = sorted(
            str(path.relative_to(self._root))
            for path in self._root.rglob("*")
            if path.suffix == ".tmp" or ".mended" in path.name
        )
        exported = _content(out) if operation == "export" else ""
        return {**found, "left": left, "exported": exported}

    def _lay_out(self, operation: str) -> None:
        shutil.rmtree(self._root, ignore_errors=True)
        self._root.mkdir()
        source = self._prepared.get(operation)
        if source is not None:
            shutil.copytree(source, self._root / "run")

    def _prepare(self) -> dict[str, Path]:
        """Return the initial run directory of each operation."""
        half, whole = self._folder / "half", self._folder / "whole"
        code = run_in_child(
            lambda: self._program.train(whole, {"checkpoint.keep": 9}), self._printed
        )
        if code != 0:
            raise AssertionError(self._printed.read_text())
        shutil.copytree(whole, half)
        shutil.rmtree(half / "checkpoints" / "6")
        return {"resume": half, "save": half, "prune": half, "evaluate": whole, "export": whole}

    def _count(self, operation: str) -> list[str]:
        """Return the names of the calls of an operation in order."""
        self._lay_out(operation)
        names = self._folder / "calls.txt"
        record = os.open(names, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        code = self._child(operation, Fault(), record)
        os.close(record)
        if code != 0:
            raise AssertionError(f"{operation}: {self._printed.read_text()}")
        return names.read_text().split()


def _draw_fault(index: int, name: str, draw: random.Random) -> Fault:
    kinds = [FAIL, FAIL, FAIL, KILL_BEFORE, KILL_AFTER]
    if name in ("write", "pwrite64"):
        kinds.append(SHORT)
    action = draw.choice(kinds)
    number = draw.choice(ERRNOS[name]) if action == FAIL else 0
    return Fault(index, action, number, action == FAIL and draw.random() < 0.4)


def _content(folder: Path) -> str:
    """Return a hash of the names and content of a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        digest.update(f"{path.relative_to(folder)}\n".encode())
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} is {str(found[name])[:300]} and should be {str(expected[name])[:300]}"
        for name in expected
        if found[name] != expected[name]
    ]


def run_in_child(work: Callable[[], int], printed: Path) -> int:
    """Run a function in a forked child; return its exit code, or minus the number of its signal.

    Parameters
    ----------
    work
        Returns the exit code.
    printed
        File for the output of the child.
    """
    return wait_for_child(start_child(work, printed))


def start_child(work: Callable[[], int], printed: Path) -> int:
    """Start a function in a forked child as `run_in_child` does; return the process ID."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # children start no JAX computation
        child = os.fork()
    if child != 0:
        return child
    code = 1
    try:
        descriptor = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = work()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for_child(child: int) -> int:
    """Wait for a forked child; return its exit code, or minus the number of its signal."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def main() -> int:
    """Run the campaign; return 0 if every case passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    arguments = parser.parse_args()
    if not has_compiler():
        sys.stderr.write("faults: needs a C compiler named cc\n")
        return 2
    with folder_with_shim("faults-") as folder:
        begin = time.monotonic()
        found = Campaign(folder, arguments.seed).run(arguments.cases)
        seconds = time.monotonic() - begin
    codes = ", ".join(f"{code}: {count}" for code, count in sorted(found.codes.items()))
    print(f"{found.cases.total()} cases in {seconds:.0f} s; exit codes {codes}")
    print(f"{len(found.failures)} failures")
    if arguments.output:
        arguments.output.write_text(json.dumps(vars(found), indent=2) + "\n")
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
