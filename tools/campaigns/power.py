"""Power cut campaign: committed checkpoints must survive a power cut at any moment.

    ./pants run tools/campaigns/power.py -- --seed 1 --states 500 [--output FILE]

A run logs every change of its files (`fault_shim.c`). From this journal the campaign constructs
possible states of the disk after a power cut at a random moment. Flushed data are present: file
content up to the last ``fsync`` of the file, names up to that of the folder. Of unflushed changes
each file and folder has a random prefix, possibly empty or complete, and the last write may be
torn. In each state the same command must

- resume from the newest checkpoint committed before the cut, or from a newer one;
- set no checkpoint aside and report no lost record;
- finish with the leaves, metrics and checkpoints of an undisturbed run.

`storage_run` lists which parts of the trainer are real. Needs Linux and a C compiler (cc).
"""

import argparse
import json
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from campaigns.fault_shim import disarm, folder_with_shim, has_compiler, journal
from campaigns.faults import run_in_child

_COMMIT = re.compile(r"rename \S+/checkpoints/([0-9]+)\.tmp \S+/checkpoints/\1")
_TORN = 0.3  # probability that the last write of a file is torn


@dataclass(eq=False)
class Node:
    """A file or folder: its changes in order, and the number of flushed ones.

    Attributes
    ----------
    is_folder
        Whether it is a folder.
    changes
        Of a file ("write", offset, data) and ("truncate", size); of a folder ("set", name, node),
        ("remove", name) and ("move", name, name).
    flushed
        Number of changes that are on disk with certainty.
    """

    is_folder: bool
    changes: list[tuple[Any, ...]] = field(default_factory=list)
    flushed: int = 0

    def names(self, count: int) -> dict[str, "Node"]:
        """Return the entries of a folder after a number of changes."""
        found: dict[str, Node] = {}
        for change in self.changes[:count]:
            match change:
                case ("set", name, node):
                    found[name] = node
                case ("remove", name):
                    found.pop(name, None)
                case ("move", name, other):
                    found[other] = found.pop(name)
        return found

    def content(self, count: int) -> bytes:
        """Return the content of a file after a number of changes."""
        data = bytearray()
        for change in self.changes[:count]:
            match change:
                case ("write", offset, more):
                    data.extend(bytes(max(0, offset - len(data))))
                    data[offset : offset + len(more)] = more
                case ("truncate", size):
                    data[size:] = bytes(max(0, size - len(data)))
        return bytes(data)


class Disk:
    """State of a folder, reconstructed from a journal.

    Parameters
    ----------
    root
        The folder, initially empty.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._top = Node(is_folder=True)

    def replay(self, lines: Sequence[str]) -> None:
        """Apply the changes of journal lines."""
        for line in lines:
            name, text, *rest = line.split(" ")
            path = Path(text)
            match name:
                case "create" | "mkdir":
                    node = Node(is_folder=name == "mkdir")
                    self._find(path.parent).changes.append(("set", path.name, node))
                case "unlink":
                    self._find(path.parent).changes.append(("remove", path.name))
                case "rename":
                    self._rename(self._find(path.parent), path.name, Path(rest[0]))
                case "write":
                    change = ("write", int(rest[0]), bytes.fromhex(rest[1]))
                    self._find(path).changes.append(change)
                case "truncate":
                    self._find(path).changes.append(("truncate", int(rest[0])))
                case "fsync":
                    node = self._find(path)
                    node.flushed = len(node.changes)

    def write_state(self, draw: random.Random, out: Path) -> None:
        """Write a random state after a power cut into an empty folder."""
        self._write(self._top, draw, out)

    def _rename(self, parent: Node, last: str, target: Path) -> None:
        to = self._find(target.parent)
        if to is parent:
            parent.changes.append(("move", last, target.name))
            return
        node = parent.names(len(parent.changes))[last]
        to.changes.append(("set", target.name, node))
        parent.changes.append(("remove", last))

    def _find(self, path: Path) -> Node:
        node = self._top
        for part in path.relative_to(self._root).parts:
            node = node.names(len(node.changes))[part]
        return node

    def _write(self, node: Node, draw: random.Random, out: Path) -> None:
        waiting = len(node.changes) - node.flushed
        count = node.flushed + draw.choice((0, waiting, draw.randint(0, waiting)))
        if not node.is_folder:
            data = node.content(count)
            is_write = count > node.flushed and node.changes[count - 1][0] == "write"
            if is_write and draw.random() < _TORN:
                data = data[: len(data) - draw.randint(0, len(node.changes[count - 1][2]))]
            out.write_bytes(data)
            return
        out.mkdir(exist_ok=True)
        for name, child in node.names(count).items():
            self._write(child, draw, out / name)


def committed(lines: Sequence[str]) -> int:
    """Return the newest checkpoint whose name is flushed after these lines; 0 without one."""
    newest = named = 0
    for line in lines:
        if found := _COMMIT.match(line):
            named = int(found[1])
        elif line.startswith("fsync ") and line.endswith("/checkpoints"):
            newest = named
    return newest


class Campaign:
    """Resume from disk states after power cuts.

    Parameters
    ----------
    folder
        Working folder; the fault library is loaded.
    """

    def __init__(self, folder: Path) -> None:
        from campaigns.storage_run import StorageRun

        self._root, self._printed = folder / "case", folder / "printed.txt"
        self._result = folder / "result.json"
        self._program = StorageRun(folder)
        self._root.mkdir()
        self._lines = self._record(folder / "journal.txt")
        self._expected = self._resume()
        self.failures: list[str] = []

    def run(self, *, seed: int, states: int) -> list[str]:
        """Resume a number of states; return the failures, one or more lines each."""
        draw = random.Random(seed)  # noqa: S311  moments, not secrets
        for number in range(states):
            moment = draw.randint(0, len(self._lines))
            disk = Disk(self._root)
            disk.replay(self._lines[:moment])
            shutil.rmtree(self._root)
            self._root.mkdir()
            disk.write_state(draw, self._root)
            if problem := self._judge(committed(self._lines[:moment])):
                self.failures.append(f"state {number}, after {moment} changes: {problem}")
            if (number + 1) % 100 == 0:
                print(f"{number + 1} states, {len(self.failures)} failures", flush=True)
        return self.failures

    def _judge(self, newest: int) -> str:
        """Return the failure of a resumed run, or ""."""
        try:
            found = self._resume()
        except AssertionError as error:
            return str(error)
        printed = self._printed.read_text(errors="replace")
        resumed = re.search(r"resuming +from step ([0-9]+)", printed)
        problems = [
            f"{name} is {str(found[name])[:300]} and should be {str(self._expected[name])[:300]}"
            for name in self._expected
            if found[name] != self._expected[name]
        ]
        if int(resumed[1] if resumed else 0) < newest:
            problems.append(f"step {newest} was committed and is lost")
        problems += [word for word in ("Traceback", "lacks", "corrupt") if word in printed]
        return "; ".join([*problems, printed[-2000:]]) if problems else ""

    def _record(self, path: Path) -> list[str]:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

        def work() -> int:
            journal(self._root, descriptor)
            try:
                return self._program.train(self._root / "run", {})
            finally:
                disarm()

        if run_in_child(work, self._printed) != 0:
            raise AssertionError(self._printed.read_text())
        os.close(descriptor)
        return path.read_text().splitlines()

    def _resume(self) -> dict[str, Any]:
        def work() -> int:
            code = self._program.train(self._root / "run", {})
            if code == 0:
                self._result.write_text(json.dumps(self._program.outcome(self._root / "run")))
            return code

        self._result.unlink(missing_ok=True)
        code = run_in_child(work, self._printed)
        if code != 0:
            raise AssertionError(
                f"ended with {code}:\n{self._printed.read_text(errors='replace')[-2000:]}"
            )
        found: dict[str, Any] = json.loads(self._result.read_text())
        return found


def main() -> int:
    """Run the campaign; return 0 if every state passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--states", type=int, default=500)
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    arguments = parser.parse_args()
    if not has_compiler():
        sys.stderr.write("power: needs a C compiler named cc\n")
        return 2
    with folder_with_shim("power-") as folder:
        begin = time.monotonic()
        failures = Campaign(folder).run(seed=arguments.seed, states=arguments.states)
        seconds = time.monotonic() - begin
    print(f"{arguments.states} states in {seconds:.0f} s")
    print("\n".join([f"{len(failures)} failures", *failures]))
    if arguments.output:
        content = {"seed": arguments.seed, "states": arguments.states, "failures": failures}
        arguments.output.write_text(json.dumps(content, indent=2) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
