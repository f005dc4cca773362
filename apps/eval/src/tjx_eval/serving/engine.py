"""Generation engine: a thread that owns the model and batches all requests continuously.

Requests join and leave the batch between two steps. The result of a request depends on that request
alone (`tjx_nn.generation.continuous_batching`), not on the load or on other requests in the batch.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from tjx_nn import ContinuousBatcher, GPTConfig
from tjx_nn.generation.batch_sampling import SampledTokens, SequenceOptions

# Prompts prefilled between two steps; a larger number delays the requests that are running.
_PREFILLS_PER_STEP = 4


class QueueFullError(RuntimeError):
    """Raised if the queue has no room for a request."""


class EngineStoppedError(RuntimeError):
    """Raised if the engine accepts no requests because it is stopping or has failed."""


class Token(NamedTuple):
    """One generated token; log-probabilities are 0 if they were not requested."""

    id: int
    log_prob: float
    top_tokens: list[int]
    top_log_probs: list[float]


@dataclass(eq=False)
class GenerationRequest:
    """One sequence to generate.

    Attributes
    ----------
    prompt : sequence of int
        Token ids.
    max_new_tokens : int
        Maximum length of the completion.
    options : SequenceOptions
        Sampling options.
    on_token : callable
        Called with each token in the engine's thread; returns whether to continue.
    on_end : callable
        Called once after the last token: with None, or with the reason why it is incomplete.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    options: SequenceOptions
    on_token: Callable[[Token], bool]
    on_end: Callable[[str | None], None]
    _dispatched: int = field(default=0, init=False)
    _delivered: int = field(default=0, init=False)
    _ended: bool = field(default=False, init=False)


class _PendingTokens(NamedTuple):
    """Tokens being computed on the device, and their requests by row."""

    requests: dict[int, GenerationRequest]
    sampled: SampledTokens


class Engine:
    """Generate up to `slots` sequences concurrently; further requests are queued.

    Parameters
    ----------
    config, params
        Model; copied to one device.
    slots
        Number of concurrent sequences.
    max_len
        Maximum total tokens of prompt and completion; None is the model's `max_seq_len`.
    max_waiting
        Maximum number of queued requests.
    """

    def __init__(
        self,
        config: GPTConfig,
        params: dict[str, Any],
        *,
        slots: int,
        max_len: int | None = None,
        max_waiting: int = 256,
    ) -> None:
        # Generation is not sharded: with several devices, each would compute the same.
        params = jax.device_put(params, jax.local_devices()[0])
        self.decoder = ContinuousBatcher(config, params, slots=slots, max_len=max_len)
        self.max_waiting = max_waiting
        self._changed = threading.Condition()
        self._queue: deque[GenerationRequest] = deque()
        self._running: dict[int, GenerationRequest] = {}  # by slot
        self._pending: deque[_PendingTokens] = deque()
        self._deadline: float | None = None
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Compile the step, and start the thread."""
        # Compile prefill and step now, so that no request waits for it.
        self.decoder.join(0, [0], max_new_tokens=1)
        jax.device_get(self.decoder.step([False] * self.decoder.slots))
        self._thread.start()

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests, all or none.

        Raises
        ------
        ValueError
            If a request does not fit the model.
        QueueFullError
            If the queue has no room for all of them.
        EngineStoppedError
            If the engine accepts no requests.
        """
        for request in requests:
            self.decoder.check(
                request.prompt, max_new_tokens=request.max_new_tokens, **request.options
            )
        if len(requests) > self.max_waiting:
            raise ValueError(
                f"got {len(requests)} completions at once; expected at most {self.max_waiting}"
            )
        with self._changed:
            if self._failure or self._deadline is not None:
                raise EngineStoppedError(self._failure or "the server is stopping")
            if len(self._queue) + len(requests) > self.max_waiting:
                raise QueueFullError(f"{len(self._queue)} requests are waiting; try again")
            self._queue.extend(requests)
            self._changed.notify()

    def cancel(self, requests: Sequence[GenerationRequest]) -> None:
        """End requests whose results are no longer needed; no effect on ended requests."""
        with self._changed:
            for request in requests:
                self._end(request, "cancelled")
            self._changed.notify()

    def stop(self, grace: float) -> None:
        """Accept no more requests, and end the remaining ones after `grace` seconds.

        Does not block.
        """
        with self._changed:
            deadline = time.monotonic() + grace
            self._deadline = deadline if self._deadline is None else min(deadline, self._deadline)
            self._changed.notify()

    def join(self, timeout: float | None = None) -> None:
        """Block until the thread has ended, after `stop`."""
        if self._thread.is_alive():
            self._thread.join(timeout)

    def state(self) -> dict[str, Any]:
        """Return the status, and the number of running and waiting sequences."""
        with self._changed:
            status = "ok" if self._deadline is None else "stopping"
            return {
                "status": "failed" if self._failure else status,
                "slots": self.decoder.slots,
                "running": sum(not request._ended for request in self._running.values()),
                "waiting": len(self._queue),
            }

    def _run(self) -> None:
        try:
            while self._wait():
                self._admit()
                self._step()
                # Deliver tokens while the device computes the next ones.
                while len(self._pending) > bool(self._running):
                    self._deliver(self._pending.popleft())
        except BaseException as error:  # end all requests, whatever the error is
            self._fail(f"{type(error).__name__}: {error}")
            raise
        self._fail("the server has stopped")

    def _wait(self) -> bool:
        """Block until there is work; return False when the engine must stop."""
        with self._changed:
            while True:
                busy = bool(self._queue or self._running or self._pending)
                if self._deadline is not None and (not busy or time.monotonic() >= self._deadline):
                    return False
                if busy:
                    return True
                self._changed.wait()

    def _admit(self) -> None:
        """Move queued requests to free slots."""
        for _ in range(_PREFILLS_PER_STEP):
            with self._changed:
                for slot in [s for s, request in self._running.items() if request._ended]:
                    del self._running[slot]
                free = set(range(self.decoder.slots)) - self._running.keys()
                if not free or not self._queue:
                    return
                slot, request = min(free), self._queue.popleft()
                self._running[slot] = request
            sampled = self.decoder.join(
                slot, request.prompt, max_new_tokens=request.max_new_tokens, **request.options
            )
            self._add_pending({0: request}, sampled)

    def _step(self) -> None:
        if not self._running:
            return
        active = [slot in self._running for slot in range(self.decoder.slots)]
        self._add_pending(dict(self._running), self.decoder.step(active))

    def _add_pending(self, requests: dict[int, GenerationRequest], sampled: SampledTokens) -> None:
        self._pending.append(_PendingTokens(requests, sampled))
        for request in requests.values():
            request._dispatched += 1
        # Free the slots of requests whose last token is being computed.
        for slot in [
            s
            for s, request in self._running.items()
            if request._dispatched == request.max_new_tokens
        ]:
            del self._running[slot]

    def _deliver(self, pending: _PendingTokens) -> None:
        sampled = jax.device_get(pending.sampled)
        for row, request in pending.requests.items():
            if request._ended:
                continue
            request._delivered += 1
            token = Token(
                int(sampled.token[row]),
                float(sampled.log_prob[row]),
                sampled.top_tokens[row].tolist(),
                sampled.top_log_probs[row].tolist(),
            )
            wants_more = request.on_token(token)
            if not wants_more or request._delivered == request.max_new_tokens:
                with self._changed:
                    self._end(request, None)

    def _end(self, request: GenerationRequest, reason: str | None) -> None:
        if not request._ended:
            request._ended = True
            with suppress(ValueError):  # it has left the queue
                self._queue.remove(request)
            request.on_end(reason)

    def _fail(self, reason: str) -> None:
        """Reject new requests, and end all others with a reason."""
        with self._changed:
            self._failure = reason
            left = [*self._queue, *self._running.values()]
            left += [request for each in self._pending for request in each.requests.values()]
            for request in left:
                self._end(request, reason)
            self._queue.clear()
            self._running.clear()
            self._pending.clear()
