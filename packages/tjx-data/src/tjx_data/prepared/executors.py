"""Executors that process the parts of a corpus: this process, or a pool of processes."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait


class SerialExecutor(Executor):
    """Executor that runs each call in `submit`; the tokenizer then uses all cores by threads."""

    def submit[**P, T](self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a call and return its finished future."""
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # `Future.result` raises it
            future.set_exception(error)
        return future


def available_cpus() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def process_pool() -> Iterator[Executor]:
    """Run one worker process per core; the workers exit with this process, even if it is killed."""
    context = multiprocessing.get_context("spawn")  # a fork would copy locks held by threads
    pool = ProcessPoolExecutor(available_cpus(), mp_context=context, initializer=_initialize)
    try:
        with pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool as error:
        error.add_note(
            "Worker processes exited. Either memory ran out, or the script calls tjx_data.prepare "
            'at import: move the call below if __name__ == "__main__":, or give executor='
        )
        raise


def run_in_order[T, R](
    executor: Executor, call: Callable[[T], R], tasks: Iterable[tuple[T, R | None]], in_flight: int
) -> Iterator[R]:
    """Call a function for each task, a bounded number at a time; yield results in order.

    Parameters
    ----------
    executor : Executor
        Runs the calls.
    call : Callable
        The function.
    tasks : Iterable
        Pairs of argument and result, where the result is None if it is not known yet.
    in_flight : int
        Tasks submitted at a time.
    """
    pending: deque[Future[R]] = deque()
    for task, known in tasks:
        if known is None:
            pending.append(executor.submit(call, task))
        else:
            pending.append(Future())
            pending[-1].set_result(known)
        if len(pending) >= in_flight:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _initialize() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per worker
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_with_parent, args=(parent.sentinel,), daemon=True).start()


def _exit_with_parent(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
