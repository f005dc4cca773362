"""The order in which examples come: a function of (seed, epoch), without any state."""

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

Places = npt.NDArray[np.int64]


class EpochOrder:
    """Visits `count` places once an epoch, each time in another order, epoch after epoch.

    Parameters
    ----------
    count : int
        Places of an epoch.
    seed : int
        Decides the orders, with the epoch; 0 to 2**64 - 1.
    stride : int
        Distance between neighbouring places.
    slack : int
        Places of an epoch start at one of 0 to `slack`, drawn for each epoch.
    """

    def __init__(self, count: int, seed: int, *, stride: int = 1, slack: int = 0):
        self.count = count
        self._seed, self._stride, self._slack = seed, stride, slack
        self._epochs: OrderedDict[int, Places] = OrderedDict()

    def places(self, first: int, turns: Places) -> Places:
        """Return the places that are visited in some turns, counted from turn `first`.

        Parameters
        ----------
        first : int
            Turns before these, in all epochs together.
        turns : int64 array, ascending
            Turns after `first`.
        """
        epoch = first // self.count
        in_epoch = turns + (first - epoch * self.count)
        if in_epoch[-1] < self.count:
            return self._of_epoch(epoch)[in_epoch]
        ahead, in_epoch = np.divmod(in_epoch, self.count)
        found = np.empty(len(in_epoch), np.int64)
        for n in np.unique(ahead):  # these turns go on into the next epoch, or several
            rows = ahead == n
            found[rows] = self._of_epoch(epoch + int(n))[in_epoch[rows]]
        return found

    def _of_epoch(self, epoch: int) -> Places:
        if epoch not in self._epochs:
            # As uint64: a list with a large seed would pass through float64 and lose bits.
            key = np.array([self._seed, epoch], np.uint64)
            generator = np.random.Generator(np.random.Philox(key=key))
            offset = generator.integers(self._slack + 1)
            order = generator.permutation(self.count)
            order *= self._stride
            order += offset
            self._epochs[epoch] = order
            if len(self._epochs) > 2:  # a batch may need two epochs at once
                self._epochs.popitem(last=False)
        return self._epochs[epoch]
