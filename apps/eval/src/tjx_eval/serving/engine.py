"""The engine: a thread that owns the model and writes for all requests at once.

Requests join and leave between two steps of the batch. What a request gets depends on itself alone
(`tjx_nn.generation.continuous_batching`), so that neither the load nor its neighbours change a
text.
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
from tjx_nn.generation.continuous_batching import SampledTokens, SequenceOptions

# So many prompts are read between two steps: more would make those who are being written to wait.
_JOINS_A_STEP = 4


class FullError(RuntimeError):
    """So many requests are waiting that no more are taken."""


class StoppedError(RuntimeError):
    """The engine takes no more requests: it is stopping, or has failed."""


class Token(NamedTuple):
    """One token of a request; log-probabilities are 0 where they were not asked for."""

    id: int
    log_prob: float
    top_tokens: list[int]
    top_log_probs: list[float]


@dataclass(eq=False)
class GenerationRequest:
    """What one sequence asks of the engine.

    Attributes
    ----------
    prompt : sequence of int
        Token ids.
    max_new_tokens : int
        Length of the continuation.
    options : SlotOptions
        How its tokens are chosen.
    take : callable
        Gets each token, on the engine's thread; returns whether more are wanted.
    end : callable
        Called once when no more tokens come: with None, or with why there are not all of them.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    options: SequenceOptions
    take: Callable[[Token], bool]
    end: Callable[[str | None], None]
    _sent: int = field(default=0, init=False)
    _taken: int = field(default=0, init=False)
    _over: bool = field(default=False, init=False)


class _Coming(NamedTuple):
    """Tokens that the device is making, and whose they are."""

    orders: dict[int, GenerationRequest]  # by row of `chosen`
    chosen: SampledTokens


class Engine:
    """Writes for up to so many orders at once; others wait in line.

    Parameters
    ----------
    config, params
        The model; it is put on one device.
    slots
        Orders at once.
    max_len
        Longest prompt and continuation together, in tokens; None is the model's own.
    most_waiting
        Orders in line, at most.
    """

    def __init__(
        self,
        config: GPTConfig,
        params: dict[str, Any],
        *,
        slots: int,
        max_len: int | None = None,
        most_waiting: int = 256,
    ) -> None:
        # Over several devices each would do the same: one is as fast.
        params = jax.device_put(params, jax.local_devices()[0])
        self.decoder = ContinuousBatcher(config, params, slots=slots, max_len=max_len)
        self.most_waiting = most_waiting
        self._changed = threading.Condition()
        self._line: deque[GenerationRequest] = deque()
        self._inside: dict[int, GenerationRequest] = {}
        self._coming: deque[_Coming] = deque()
        self._ends_at: float | None = None
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Compile the step, and begin to take orders."""
        # The first prompt and the first step of any request compile; so nobody waits for it.
        self.decoder.join(0, [0], max_new_tokens=1)
        jax.device_get(self.decoder.step([False] * self.decoder.slots))
        self._thread.start()

    def submit(self, orders: Sequence[GenerationRequest]) -> None:
        """Put orders in line, all or none.

        Raises
        ------
        ValueError
            If an order does not fit the model.
        FullError
            If there is no room for all of them.
        StoppedError
            If the engine takes no more.
        """
        for order in orders:
            self.decoder.check(order.prompt, max_new_tokens=order.max_new_tokens, **order.options)
        if len(orders) > self.most_waiting:
            raise ValueError(
                f"{len(orders)} continuations are asked for at once; up to {self.most_waiting} are "
                "taken"
            )
        with self._changed:
            if self._failure or self._ends_at is not None:
                raise StoppedError(self._failure or "the server is stopping")
            if len(self._line) + len(orders) > self.most_waiting:
                raise FullError(f"{len(self._line)} requests are waiting; try again")
            self._line.extend(orders)
            self._changed.notify()

    def cancel(self, orders: Sequence[GenerationRequest]) -> None:
        """End orders whose tokens nobody wants any more; those that are over stay so."""
        with self._changed:
            for order in orders:
                self._end(order, "cancelled")
            self._changed.notify()

    def stop(self, grace: float) -> None:
        """Take no more orders; end those that are left after so many seconds. Does not wait."""
        with self._changed:
            ends_at = time.monotonic() + grace
            self._ends_at = ends_at if self._ends_at is None else min(ends_at, self._ends_at)
            self._changed.notify()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the engine has ended, after `stop`."""
        if self._thread.is_alive():
            self._thread.join(timeout)

    def state(self) -> dict[str, Any]:
        """Return whether the engine works, and how much it has to do."""
        with self._changed:
            status = "ok" if self._ends_at is None else "stopping"
            return {
                "status": "failed" if self._failure else status,
                "slots": self.decoder.slots,
                "running": sum(not order._over for order in self._inside.values()),
                "waiting": len(self._line),
            }

    def _run(self) -> None:
        try:
            while self._wait():
                self._let_in()
                self._step()
                # The device makes the next tokens while those before are handed out.
                while len(self._coming) > bool(self._inside):
                    self._hand_out(self._coming.popleft())
        except BaseException as error:  # whatever it is: nobody may be left waiting
            self._fail(f"{type(error).__name__}: {error}")
            raise
        self._fail("the server has stopped")

    def _wait(self) -> bool:
        """Wait for something to do; return whether there is."""
        with self._changed:
            while True:
                busy = bool(self._line or self._inside or self._coming)
                if self._ends_at is not None and (not busy or time.monotonic() >= self._ends_at):
                    return False
                if busy:
                    return True
                self._changed.wait()

    def _let_in(self) -> None:
        for _ in range(_JOINS_A_STEP):
            with self._changed:
                for slot in [s for s, order in self._inside.items() if order._over]:
                    del self._inside[slot]
                free = set(range(self.decoder.slots)) - self._inside.keys()
                if not free or not self._line:
                    return
                slot, order = min(free), self._line.popleft()
                self._inside[slot] = order
            chosen = self.decoder.join(
                slot, order.prompt, max_new_tokens=order.max_new_tokens, **order.options
            )
            self._send({0: order}, chosen)

    def _step(self) -> None:
        if not self._inside:
            return
        active = [slot in self._inside for slot in range(self.decoder.slots)]
        self._send(dict(self._inside), self.decoder.step(active))

    def _send(self, orders: dict[int, GenerationRequest], chosen: SampledTokens) -> None:
        self._coming.append(_Coming(orders, chosen))
        for order in orders.values():
            order._sent += 1
        # All the tokens of these are under way: their slots are free for others.
        for slot in [s for s, order in self._inside.items() if order._sent == order.max_new_tokens]:
            del self._inside[slot]

    def _hand_out(self, coming: _Coming) -> None:
        chosen = jax.device_get(coming.chosen)
        for row, order in coming.orders.items():
            if order._over:
                continue
            order._taken += 1
            token = Token(
                int(chosen.token[row]),
                float(chosen.log_prob[row]),
                chosen.top_tokens[row].tolist(),
                chosen.top_log_probs[row].tolist(),
            )
            goes_on = order.take(token)
            if not goes_on or order._taken == order.max_new_tokens:
                with self._changed:
                    self._end(order, None)

    def _end(self, order: GenerationRequest, reason: str | None) -> None:
        if not order._over:
            order._over = True
            with suppress(ValueError):  # it is not in line any more
                self._line.remove(order)
            order.end(reason)

    def _fail(self, reason: str) -> None:
        with self._changed:
            self._failure = reason
            left = [*self._line, *self._inside.values()]
            left += [order for coming in self._coming for order in coming.orders.values()]
            for order in left:
                self._end(order, reason)
            self._line.clear()
            self._inside.clear()
            self._coming.clear()
