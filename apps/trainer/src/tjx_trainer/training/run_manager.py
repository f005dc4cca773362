"""A run to its last step: from what was saved, and once back from steps that are not finite."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax

import tjx_ckpt
import tjx_metrics
import tjx_nn
import tjx_parallel
from tjx_trainer.runtime.exit_codes import NotFiniteError
from tjx_trainer.runtime.preemption import PreemptionSync
from tjx_trainer.runtime.provenance import describe_version_changes, run_metadata
from tjx_trainer.runtime.run_dir import RunDirectory
from tjx_trainer.runtime.run_logging import log_info
from tjx_trainer.runtime.watchdog import Watchdog
from tjx_trainer.training.build import Job
from tjx_trainer.training.checkpointing import CHECKPOINT_BYTES, CheckpointSaver
from tjx_trainer.training.loop import train_loop
from tjx_trainer.training.metrics_logger import MetricsLogger
from tjx_trainer.training.run_summary import summarize_run
from tjx_trainer.training.step_timer import Elapsed, Scalars, StepTimer
from tjx_trainer.training.train_state import TrainState


@dataclass
class RunManager:
    """The way of one run from a state to its last step.

    Attributes
    ----------
    job : Job
        The parts of the run.
    run : RunDirectory
        Where it writes.
    checkpointer : tjx_ckpt.Checkpointer
        What it goes on from.
    requests : Requests
        Whether somebody has asked to stop or to save.
    watchdog : Watchdog
        Told of each step.
    description : dict
        What is saved with each state.
    progress, meter
        Of the last way to the end, or to where somebody asked to stop.
    found, results
        The last evaluation, and on process 0 what came out of the run; after the last step.
    """

    job: Job
    run: RunDirectory
    checkpointer: tjx_ckpt.Checkpointer
    preemption: PreemptionSync
    watchdog: Watchdog
    description: dict[str, Any] = field(init=False)
    progress: MetricsLogger = field(init=False)
    step_timer: StepTimer = field(init=False)
    found: dict[str, float] = field(init=False)
    results: Scalars = field(init=False)

    def __post_init__(self) -> None:
        self.description = run_metadata(self.job)

    def resume(self) -> TrainState:
        """Return the newest sound state, or that of step 0 where nothing was saved.

        Raises
        ------
        tjx_ckpt.CheckpointError
            If there are checkpoints, and none is sound; or if there were some.
        """
        try:
            state: TrainState = self.checkpointer.restore(self.job.abstract)
        except tjx_ckpt.NoCheckpointError:
            self._refuse_lost_checkpoints()
            return self.job.initial_state()
        step = int(jax.device_get(state.step))
        log_info(f"resuming       from step {step}")
        if not int(jax.device_get(state.guard.skipped_in_a_row)):
            self.checkpointer.prune()  # an earlier deletion may have failed, or `keep` be smaller
        other = describe_version_changes(self.checkpointer.metadata(step), self.description)
        if other is not None:
            log_info(f"other versions {other}")
        return state

    def follow(self, state: TrainState) -> TrainState:
        """Train until the last step, or until asked to stop.

        A row of steps that were not finite leads back to the newest checkpoint from before it, or
        to step 0, once: what a fault of the machine did is then undone, and a run that diverges by
        itself comes to the same place and ends.

        Parameters
        ----------
        state : TrainState
            Where to start; its buffers are donated.

        Returns
        -------
        TrainState
            The last one.

        Raises
        ------
        NotFiniteError
            If it happened twice; a note names the last good checkpoint.
        tjx_ckpt.SaveError, tjx_metrics.RecordError
            If a checkpoint or a record could not be written, and the run is not to go on.
        """
        try:
            return self._train(state)
        except NotFiniteError as error:
            told = str(error)
        # Outside of the handler nothing holds the state that is given up.
        state = self._go_back(told)
        try:
            return self._train(state)
        except NotFiniteError as error:
            error.add_note(self._after_divergence())
            raise

    def _train(self, state: TrainState) -> TrainState:
        config = self.job.config
        start = int(jax.device_get(state.step))
        self.step_timer = StepTimer(
            config, self.job.mesh, start_step=start, elapsed=Elapsed.of(self._saved_with(start))
        )
        records, console = self._make_trackers(start)
        metrics = next((r for r in records if isinstance(r, tjx_metrics.JsonlTracker)), None)
        if metrics is not None:
            self._report_gap(metrics, start)
        with recording(tjx_metrics.CompositeTracker([*records, *console])) as tracker:
            tjx_metrics.CompositeTracker(records).log_hyperparameters(self._hyperparameters())
            self.progress = MetricsLogger(
                tracker,
                self.step_timer,
                config.log,
                max_skipped=config.guard.max_skipped,
                skipped=int(jax.device_get(state.guard.skipped)),
            )
            saver = CheckpointSaver(
                self.checkpointer,
                tracker,
                on_error=config.checkpoint.on_error,
                describe=lambda owed: {
                    **self.description,
                    "owes_evaluation": owed,
                    "behind": self.step_timer.elapsed._asdict(),
                    "metrics_bytes": metrics and metrics.logged_bytes,
                },
                flush_records=metrics.flush if metrics else lambda: None,
            )
            profiler = tjx_metrics.Profiler(config.profile.range, self.run.profile)
            try:
                state = train_loop(
                    self.job,
                    state,
                    progress=self.progress,
                    saver=saver,
                    preemption=self.preemption,
                    watchdog=self.watchdog,
                    profiler=profiler,
                    evaluation_pending=self._owes_evaluation(start),
                )
            except NotFiniteError as error:
                saver.settle(error.step)
                raise
            finally:
                self._tell_profile(profiler)
            if not self.preemption.stop:
                self.results = self._conclude(state)
                self._record_results(tjx_metrics.CompositeTracker(records))
            return state

    def _record_results(self, tracker: tjx_metrics.Tracker) -> None:
        """Record what came out; a disk that takes no more does not undo a run that is saved."""
        try:
            tracker.log_summary(self.results)
        except OSError as error:
            log_info(f"warning: the summary cannot be written: {error}")

    def _tell_profile(self, profiler: tjx_metrics.Profiler) -> None:
        """Say what the steps that were traced spent their time on."""
        profiler.close()
        if not profiler.done or not tjx_parallel.is_main():
            return
        log_info(
            f"profile        {self.run.profile}: .xplane.pb for XProf, .trace.json.gz for Perfetto"
        )
        try:
            report = profiler.report()
            text = report.text()
            self.run.profile.joinpath("report.txt").write_text(text + "\n")
            self.run.profile.joinpath("report.json").write_text(report.to_json(30))
        except Exception as error:  # whatever a trace may hold: a run does not end for it
            text = f"warning: the trace cannot be summed up: {type(error).__name__}: {error}"
        log_info(text)

    def _conclude(self, state: TrainState) -> Scalars:
        """Return what came out; the last evaluation is made again where another life made it."""
        last = self.progress.last_evaluation or self.job.evaluate(self.job.eval_params(state))
        self.found = last.metrics()
        if not tjx_parallel.is_main():
            return {}
        skipped = int(jax.device_get(state.guard.skipped))
        return summarize_run(
            self.job.config, self.run, self.step_timer, self.found, skipped=skipped
        )

    def _hyperparameters(self) -> dict[str, Any]:
        """Return what decides the run, for those who compare runs."""
        saved = self.description
        rest = {name: saved[name] for name in ("versions", "git", "devices", "data")}
        return {
            **saved["config"],
            "parameters": tjx_nn.count_params(self.job.config.model),
            **rest,
        }

    def _make_trackers(
        self, start: int
    ) -> tuple[list[tjx_metrics.Tracker], list[tjx_metrics.Tracker]]:
        """Return where numbers are kept and where they are shown; nowhere but on process 0."""
        if not tjx_parallel.is_main():
            return [], []
        config = self.job.config
        records = tjx_metrics.JsonlTracker(
            self.run.metrics,
            # Evaluations of step 0 come before anything is saved: they are made again.
            resume_step=start if start else -1,
            on_error=config.checkpoint.on_error,
        )
        console = tjx_metrics.ConsoleTracker(
            config.train.max_steps, start_step=start, throughput=self.step_timer.throughput
        )
        others = tjx_metrics.open_trackers(
            config.log.trackers,
            self.run.path,
            project=config.log.project,
            resume_step=start if start else -1,
        )
        return [records, *others], [console]

    def _report_gap(self, metrics: tjx_metrics.JsonlTracker, start: int) -> None:
        """Say so where records of steps that were made are lost, as after a power cut."""
        expected = self._saved_with(start).get("metrics_bytes")
        if expected is not None and (lost := expected - metrics.logged_bytes) > 0:
            log_info(
                f"warning: {metrics.path} lacks {lost:,} bytes of records up to step {start}: they "
                "were lost after the checkpoint was saved; the state itself is whole"
            )

    def _refuse_lost_checkpoints(self) -> None:
        """Refuse to begin anew where a save was recorded: its disk may not be there."""
        if not self.run.metrics.is_file():
            return
        with self.run.metrics.open("rb") as file:
            if any(CHECKPOINT_BYTES.encode() in line for line in file):
                raise tjx_ckpt.NoCheckpointError(
                    f"{self.run.metrics} tells of saves, and there is no checkpoint in "
                    f"{self.run.checkpoint_location(self.job.config)}: bring them back (is their "
                    "disk there?), or give another --run_dir to start anew"
                )

    def _owes_evaluation(self, step: int) -> bool:
        """Tell whether the evaluation of a step was due, and is not made."""
        # That of step 0 is owed, where nothing is saved.
        return bool(self._saved_with(step).get("owes_evaluation", step == 0))

    def _saved_with(self, step: int) -> Mapping[str, Any]:
        """Return what was saved with the state of a step; nothing of step 0."""
        return self.checkpointer.metadata(step) if step in self.checkpointer.steps() else {}

    def _go_back(self, told: str) -> TrainState:
        """Return the newest sound state from before the steps that were not finite."""
        begin = self.progress.streak_start
        assert begin is not None
        for step in reversed([step for step in self.checkpointer.steps() if step < begin]):
            try:
                state: TrainState = self.checkpointer.restore(self.job.abstract, step=step)
            except tjx_ckpt.CorruptCheckpointError as error:
                log_info(f"warning: {error}")
                continue
            break
        else:
            step, state = 0, self.job.initial_state()
        self.checkpointer.discard_after(step)
        log_info(f"going back     {told}; once more from step {step}")
        return state

    def _after_divergence(self) -> str:
        """Name the last good checkpoint, and say what helps."""
        step = self.checkpointer.latest_step()
        last = (
            "nothing was saved before it"
            if step is None
            else f"the last good checkpoint is that of step {step} in "
            f"{self.run.checkpoint_location(self.job.config)}"
        )
        return (
            f"{last}; in another --run_dir try a lower --optimizer.learning_rate, a longer "
            "--schedule.warmup_steps or a smaller --optimizer.clip_norm"
        )


@contextmanager
def recording(tracker: tjx_metrics.CompositeTracker) -> Iterator[tjx_metrics.CompositeTracker]:
    """Finish a tracker at the end, whatever the end is.

    Raises
    ------
    tjx_metrics.RecordError
        If lines that were kept cannot be written; a note where another error ends the run.
    """
    try:
        yield tracker
    except BaseException as error:
        try:
            tracker.finish()
        except ExceptionGroup as group:
            error.add_note("; ".join(map(str, group.exceptions)))
        raise
    try:
        tracker.finish()
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
