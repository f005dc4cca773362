"""Agreement of all processes on stop requests, save requests and failed saves."""

import jax

import tjx_parallel
from tjx_trainer.runtime.signals import SignalHandler


class PreemptionSync:
    """Share stop and save requests, so that all processes act on them at the same step.

    A signal reaches one process. The others learn of it one step or one evaluation batch later,
    because no process waits for the exchange.

    Parameters
    ----------
    local : SignalHandler
        Requests to this process.

    Attributes
    ----------
    stop : int
        Signal number of a stop request; 0 without one.
    failed : bool
        Whether a failed save in any process ends the run.
    """

    def __init__(self, local: SignalHandler) -> None:
        self._local = local
        self._consensus = tjx_parallel.Consensus(3)
        self._save = False
        self.stop = 0
        self.failed = False

    def poll(self, *, failed: bool = False) -> None:
        """Exchange requests with the other processes; all call this at the same places.

        Parameters
        ----------
        failed : bool
            Whether a failed save of this process ends the run.
        """
        vote = (self._local.stop, int(self._local.pop_save_request()), int(failed))
        stop, save, lost = self._consensus.vote(vote)
        self.stop = self.stop or stop
        self._save |= save > 0
        self.failed |= lost > 0

    def stops_waiting(self) -> bool:
        """Return whether a stop signal ends a wait for a batch; `stop` is then set.

        With several processes it does not: the others would wait for this one's next step.
        """
        if jax.process_count() == 1:
            self.stop = self.stop or self._local.stop
        return self.stop > 0

    def pop_save_request(self) -> bool:
        """Return whether a save was requested since the last call."""
        save, self._save = self._save, False
        return save
