"""Who works on the parts of a corpus: this process, or processes of our own."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait


class SerialExecutor(Executor):
    """Does at once what is submitted; tokenizing then uses all cores by threads."""

    def submit[**P, T](self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call a function; the future is done."""
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # it belongs to whoever asks for the result
            future.set_exception(error)
        return future


def available_cpus() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def process_pool() -> Iterator[Executor]:
    """Run a process for each core; they end with this process, even if it is killed."""
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of our threads
    pool = ProcessPoolExecutor(available_cpus(), mp_context=context, initializer=_begin)
    try:
        with pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool as error:
        error.add_note(
            "Worker processes died: of lack of memory, or because the script that called "
            "tjx_data.prepare does so when it is imported. Put the call below "
            'if __name__ == "__main__":, or give executor='
        )
        raise


def _begin() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
