"""Prefetching: in order, bounded, with errors at their step, and stopped by close."""

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
        with pytest.raises(AssertionError, match="step 299 requested, expected 300"):
            prefetcher.get(299)
    assert len(threads) == 1
    assert threading.main_thread() not in threads
    assert not _threads()


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_queue_is_bounded_by_depth(depth: int) -> None:
    loaded: list[int] = []
    with Prefetcher(lambda step: loaded.append(step), first=0, depth=depth) as prefetcher:
        for step in range(10):
            assert _eventually(lambda ahead=step + depth: len(loaded) == ahead)  # type: ignore[misc]
            time.sleep(0.01)
            assert len(loaded) == step + depth
            prefetcher.get(step)


def test_no_step_beyond_stop_is_loaded() -> None:
    loaded: list[int] = []
    with Prefetcher(lambda step: loaded.append(step), first=2, stop=4, depth=9) as prefetcher:
        assert _eventually(lambda: not _threads())  # the thread has finished
        prefetcher.get(2)
        prefetcher.get(3)
        with pytest.raises(AssertionError, match="beyond the last"):
            prefetcher.get(4)
    assert loaded == [2, 3]


def test_returned_results_are_not_kept_alive() -> None:
    class Arrays:
        pass

    release = threading.Event()

    def load(step: int) -> Arrays:
        if step == 1:
            release.wait(60)
        return Arrays()

    with Prefetcher(load, first=0) as prefetcher:
        result = prefetcher.get(0)
        reference = weakref.ref(result)
        del result
        assert reference() is None  # while the next step is loading
        release.set()


def test_wait_reports_whether_a_result_is_ready() -> None:
    release = threading.Event()
    with Prefetcher(lambda _step: release.wait(60), first=0) as prefetcher:
        assert not prefetcher.wait(0.01)
        release.set()
        assert prefetcher.wait(60)
        assert prefetcher.get(0)


def _fail_at_three(step: int) -> int:
    if step == 3:
        raise OSError("shard 7 is gone")
    return step


def test_error_is_raised_at_its_step_with_traceback_and_note() -> None:
    with Prefetcher(_fail_at_three, first=0, depth=5) as prefetcher:
        assert _eventually(lambda: not _threads())
        assert [prefetcher.get(step) for step in range(3)] == [0, 1, 2]
        for _ in range(2):  # and again
            with pytest.raises(OSError, match="shard 7 is gone") as error:
                prefetcher.get(3)
    assert error.value.__notes__ == ["while step 3 was loaded in the background"]
    frames = [frame.name for frame in traceback.extract_tb(error.value.__traceback__)]
    assert frames[-1] == "_fail_at_three"
    assert not _threads()


def test_waiting_caller_gets_the_error() -> None:
    def load(step: int) -> None:
        time.sleep(0.05)
        raise KeyError(step)

    with Prefetcher(load, first=0) as prefetcher, pytest.raises(KeyError):
        prefetcher.get(0)


def test_closing_while_a_load_blocks_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tjx_data.loading.prefetch._JOIN_TIMEOUT", 0.1)
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
    assert _eventually(lambda: not _threads())  # the result is discarded
    prefetcher.close()  # a second call is harmless
    with pytest.raises(AssertionError, match="closed"):
        prefetcher.get(0)


def test_exception_in_the_with_block_stops_the_thread() -> None:
    with pytest.raises(ZeroDivisionError), Prefetcher(lambda step: step, first=0) as prefetcher:
        raise ZeroDivisionError(prefetcher.get(0))
    assert not _threads()


def test_program_exits_without_close() -> None:
    program = (
        "import time; from tjx_data.loading.prefetch import Prefetcher; "
        "print(Prefetcher(lambda step: time.sleep(0.01 * step), first=0).get(0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
        env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "None", "")


def test_depth_zero_is_rejected() -> None:
    with pytest.raises(ValueError, match="depth: got 0"):
        Prefetcher(lambda step: step, first=0, depth=0)
