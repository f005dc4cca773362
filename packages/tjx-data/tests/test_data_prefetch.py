"""Loading ahead: in order, bounded, with errors where they belong, and gone when it is closed."""

import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable

import pytest

from tjx_data.loading.prefetch import Prefetcher


def _eventually(is_true: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not is_true() and time.monotonic() < end:
        time.sleep(0.002)
    return is_true()


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "tjx-data-prefetch"]


def test_steps_come_in_order_from_one_thread() -> None:
    threads = set()

    def load(step: int) -> int:
        threads.add(threading.current_thread())
        return step * step

    with Prefetcher(load, first=3) as prefetcher:
        assert [prefetcher.get(step) for step in range(3, 300)] == [n * n for n in range(3, 300)]
        with pytest.raises(AssertionError, match="step 299 was asked for where 300 comes"):
            prefetcher.get(299)
    assert len(threads) == 1
    assert threading.main_thread() not in threads
    assert not _threads()


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_no_more_than_depth_results_lie_ready(depth: int) -> None:
    loaded: list[int] = []
    with Prefetcher(lambda step: loaded.append(step), first=0, depth=depth) as prefetcher:
        for step in range(10):
            assert _eventually(lambda ahead=step + depth: len(loaded) == ahead)  # type: ignore[misc]
            time.sleep(0.01)
            assert len(loaded) == step + depth
            prefetcher.get(step)


def test_nothing_beyond_the_last_step_is_loaded() -> None:
    loaded: list[int] = []
    with Prefetcher(lambda step: loaded.append(step), first=2, stop=4, depth=9) as prefetcher:
        assert _eventually(lambda: not _threads())  # it has no more to do
        prefetcher.get(2)
        prefetcher.get(3)
        with pytest.raises(AssertionError, match="beyond the last"):
            prefetcher.get(4)
    assert loaded == [2, 3]


def test_what_was_handed_over_is_kept_alive_by_nobody() -> None:
    class Arrays:
        pass

    release = threading.Event()

    def load(step: int) -> Arrays:
        if step == 1:
            release.wait(60)
        return Arrays()

    with Prefetcher(load, first=0) as prefetcher:
        handed_over = prefetcher.get(0)
        again = weakref.ref(handed_over)
        del handed_over
        assert again() is None  # though the next one is not there yet
        release.set()


def _fail_at_three(step: int) -> int:
    if step == 3:
        raise OSError("shard 7 is gone")
    return step


def test_an_error_comes_at_its_step_with_its_place_and_a_note() -> None:
    with Prefetcher(_fail_at_three, first=0, depth=5) as prefetcher:
        assert _eventually(lambda: not _threads())
        assert [prefetcher.get(step) for step in range(3)] == [0, 1, 2]
        for _ in range(2):  # it stays that way
            with pytest.raises(OSError, match="shard 7 is gone") as error:
                prefetcher.get(3)
    assert error.value.__notes__ == ["while step 3 was loaded in the background"]
    frames = [frame.name for frame in traceback.extract_tb(error.value.__traceback__)]
    assert frames[-1] == "_fail_at_three"
    assert not _threads()


def test_a_caller_that_waits_is_told_of_an_error_at_once() -> None:
    def load(step: int) -> None:
        time.sleep(0.05)
        raise KeyError(step)

    with Prefetcher(load, first=0) as prefetcher, pytest.raises(KeyError):
        prefetcher.get(0)


def test_closing_while_a_load_blocks_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tjx_data.loading.prefetch._PATIENCE", 0.1)
    release, begun = threading.Event(), threading.Event()

    def load(step: int) -> int:
        begun.set()
        release.wait(60)
        return step

    prefetcher = Prefetcher(load, first=0)
    assert begun.wait(10)
    begin = time.monotonic()
    prefetcher.close()
    assert time.monotonic() - begin < 5
    release.set()
    assert _eventually(lambda: not _threads())  # its result is dropped, and no more is loaded
    prefetcher.close()  # again does no harm
    with pytest.raises(AssertionError, match="closed"):
        prefetcher.get(0)


def test_a_caller_that_fails_closes_it() -> None:
    with pytest.raises(ZeroDivisionError), Prefetcher(lambda step: step, first=0) as prefetcher:
        raise ZeroDivisionError(prefetcher.get(0))
    assert not _threads()


def test_the_time_spent_waiting_is_counted() -> None:
    def slow(step: int) -> int:
        time.sleep(0.05)
        return step

    with Prefetcher(slow, first=0) as prefetcher:
        for step in range(4):
            prefetcher.get(step)
        assert prefetcher.waited_seconds > 0.1
        assert 0.1 < prefetcher.pop_waited_seconds() < 2
        assert prefetcher.pop_waited_seconds() == 0
        assert _eventually(lambda: len(prefetcher._ready) == 2)
        prefetcher.get(4)
        prefetcher.get(5)
        assert prefetcher.pop_waited_seconds() < 0.02


def test_a_program_ends_though_nobody_closes_it() -> None:
    program = (
        "import time; from tjx_data.loading.prefetch import Prefetcher; "
        "print(Prefetcher(lambda step: time.sleep(0.01 * step), first=0).get(0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
        env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "None", "")


def test_a_depth_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="depth=0"):
        Prefetcher(lambda step: step, first=0, depth=0)
