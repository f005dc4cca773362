"""Training with and without background saves; see checkpoint.py."""

import time
from pathlib import Path

from training_jax import Training
from turns import Json, serve

import tjx_ckpt


class SavingTraining(Training):
    """Training worker that optionally saves a checkpoint at the first step."""

    def prepare_saving(self, case: Json, folder: str) -> Json:
        """Compile the step and create the checkpointer."""
        prepared = self.prepare(case, losses=2)
        self._checkpointer = tjx_ckpt.Checkpointer(Path(folder), keep=1)
        return {"compile_seconds": prepared["compile_seconds"], "device": prepared["device"]}

    def steps(self, steps: int, save: int | None) -> Json:
        """Run steps with a save at the start; return the seconds of the steps and of the save."""
        begin = time.perf_counter()
        if save is not None:
            self._checkpointer.save(save, self._state)
        self.run(steps)
        seconds = time.perf_counter() - begin
        self._checkpointer.wait()  # count a save that outlasts the steps in full
        return {"seconds": max(seconds, time.perf_counter() - begin)}


if __name__ == "__main__":
    training = SavingTraining()
    serve({"prepare": training.prepare_saving, "run": training.steps})
