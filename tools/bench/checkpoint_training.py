"""Training with and without saves in the background; see checkpoint.py."""

import time
from pathlib import Path

from training_jax import Training
from turns import Json, serve

import tjx_ckpt


class SavingTraining(Training):
    """Steps of a model, with a checkpoint at their start or none."""

    def prepare_saving(self, case: Json, folder: str) -> Json:
        """Compile the step, and open the checkpoints."""
        prepared = self.prepare(case, losses=2)
        self._checkpointer = tjx_ckpt.Checkpointer(Path(folder), keep=1)
        return {"compile_seconds": prepared["compile_seconds"], "device": prepared["device"]}

    def steps(self, steps: int, save: int | None) -> Json:
        """Take steps, saving the state that they start from; seconds of all, and of the save."""
        begin = time.perf_counter()
        if save is not None:
            self._checkpointer.save(save, self._state)
        self.run(steps)
        seconds = time.perf_counter() - begin
        self._checkpointer.wait()  # a save that outlives the steps is no saving of time
        return {"seconds": max(seconds, time.perf_counter() - begin)}


if __name__ == "__main__":
    training = SavingTraining()
    serve({"prepare": training.prepare_saving, "run": training.steps})
