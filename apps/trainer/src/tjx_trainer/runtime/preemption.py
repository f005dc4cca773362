"""What a run is asked to do, by signals and by saves that fail: the same in all processes."""

import tjx_parallel
from tjx_trainer.runtime.signals import SignalHandler


class PreemptionSync:
    """Gathers what each process was asked, so that all stop and save at the same step.

    A signal reaches one process, and all act on it at one step. With several processes they learn
    of it a step or an evaluation batch late, as none of them ever waits for the answer.

    Parameters
    ----------
    local : Interrupts
        What this process was asked.

    Attributes
    ----------
    stop : int
        The signal that asks to stop; 0 where none does.
    failed : bool
        Whether a save failed, in any process, such that the run is to end.
    """

    def __init__(self, local: SignalHandler) -> None:
        self._local = local
        self._agreement = tjx_parallel.Consensus(3)
        self._save = False
        self.stop = 0
        self.failed = False

    def poll(self, *, failed: bool = False) -> None:
        """Tell the other processes, and learn from them; all do so at the same places.

        Parameters
        ----------
        failed : bool
            Whether a save of this process failed, such that the run is to end.
        """
        vote = (self._local.stop, int(self._local.pop_save_request()), int(failed))
        stop, save, lost = self._agreement.vote(vote)
        self.stop = self.stop or stop
        self._save |= save > 0
        self.failed |= lost > 0

    def pop_save_request(self) -> bool:
        """Tell whether a save was asked for since this was last called."""
        save, self._save = self._save, False
        return save
