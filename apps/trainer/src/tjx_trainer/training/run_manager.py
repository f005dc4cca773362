"""Run management: restore the latest checkpoint, train, and roll back once after divergence."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import jax

import tjx_ckpt
import tjx_metrics
import tjx_nn
import tjx_parallel
from tjx_trainer.config.config_tree import flatten
from tjx_trainer.runtime import provenance
from tjx_trainer.runtime.exit_codes import NotFiniteError
from tjx_trainer.runtime.preemption import PreemptionSync
from tjx_trainer.runtime.run_dir import RunDirectory
from tjx_trainer.runtime.run_logging import log_info
from tjx_trainer.runtime.watchdog import Watchdog
from tjx_trainer.tasks.task import data_identity
from tjx_trainer.training.build import Job, format_mesh
from tjx_trainer.training.checkpointing import CHECKPOINT_BYTES, CheckpointSaver
from tjx_trainer.training.loop import train_loop
from tjx_trainer.training.metrics_logger import MetricsLogger
from tjx_trainer.training.run_summary import summarize_run
from tjx_trainer.training.step_timer import Elapsed, Scalars, StepTimer
from tjx_trainer.training.train_state import TrainState


@dataclass
class RunManager:
    """Restore, train and roll back one run.

    Attributes
    ----------
    job : Job
        The components of the run.
    run : RunDirectory
        The run directory.
    checkpointer : tjx_ckpt.Checkpointer
        The checkpoints of the run.
    preemption : PreemptionSync
        Stop and save requests.
    watchdog : Watchdog
        Receives heartbeats.
    description : dict
        Metadata saved with each state.
    logger, step_timer
        Of the last call of `train_loop`.
    final_metrics, summary
        Metrics of the last evaluation and, on process 0, the summary of the run; set after the last
        step.
    """

    job: Job
    run: RunDirectory
    checkpointer: tjx_ckpt.Checkpointer
    preemption: PreemptionSync
    watchdog: Watchdog
    description: dict[str, Any] = field(init=False)
    logger: MetricsLogger = field(init=False)
    step_timer: StepTimer = field(init=False)
    final_metrics: dict[str, float] = field(init=False)
    summary: Scalars = field(init=False)

    def __post_init__(self) -> None:
        self.description = run_metadata(self.job)

    def resume(self) -> TrainState:
        """Restore the latest valid checkpoint, or initialize the state of step 0.

        Raises
        ------
        tjx_ckpt.CheckpointError
            If every checkpoint is corrupt, or a run that saved before has no checkpoints.
        """
        try:
            state: TrainState = self.checkpointer.restore(self.job.abstract)
        except tjx_ckpt.NoCheckpointError:
            self._check_lost_checkpoints()
            return self.job.initial_state()
        step = int(jax.device_get(state.step))
        log_info(f"resuming       from step {step}")
        if not int(jax.device_get(state.guard.skipped_in_a_row)):
            self.checkpointer.prune()  # `keep` may be smaller now, or a deletion has failed
        other = provenance.describe_version_changes(
            self.checkpointer.metadata(step), self.description
        )
        if other is not None:
            log_info(f"note           {other}")
        return state

    def train(self, state: TrainState) -> TrainState:
        """Train until the last step or a stop request.

        After ``guard.max_skipped`` consecutive non-finite steps the run is rolled back, once, to
        the newest checkpoint before them or to step 0. This recovers from transient hardware
        faults; a run that diverges by itself fails again at the same step.

        Parameters
        ----------
        state : TrainState
            The initial state; its buffers are donated.

        Returns
        -------
        TrainState
            The state after the last step.

        Raises
        ------
        NotFiniteError
            If it happens a second time; a note names the last good checkpoint.
        tjx_ckpt.SaveError, tjx_metrics.RecordError
            If a checkpoint or the metrics could not be written and ``checkpoint.on_error`` is
            "stop".
        """
        try:
            return self._train(state)
        except NotFiniteError as error:
            reason = str(error)
        # Roll back outside the handler: the traceback would keep the old state in memory.
        state = self._roll_back(reason)
        try:
            return self._train(state)
        except NotFiniteError as error:
            error.add_note(self._divergence_advice())
            raise

    def _train(self, state: TrainState) -> TrainState:
        config = self.job.config
        start = int(jax.device_get(state.step))
        self.step_timer = StepTimer(
            config, self.job.mesh, start_step=start, elapsed=Elapsed.of(self._metadata(start))
        )
        records, console = self._make_trackers(start)
        metrics = next((r for r in records if isinstance(r, tjx_metrics.JsonlTracker)), None)
        if metrics is not None:
            self._report_gap(metrics, start)
        with recording(tjx_metrics.CompositeTracker([*records, *console])) as tracker:
            tjx_metrics.CompositeTracker(records).log_hyperparameters(self._hyperparameters())
            self.logger = MetricsLogger(
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
                    logger=self.logger,
                    saver=saver,
                    preemption=self.preemption,
                    watchdog=self.watchdog,
                    profiler=profiler,
                    evaluation_pending=self._is_evaluation_pending(start),
                )
            except NotFiniteError as error:
                saver.settle(error.step)
                raise
            finally:
                self._report_profile(profiler)
            if not self.preemption.stop:
                self.summary = self._summarize(state)
                self._log_summary(tjx_metrics.CompositeTracker(records))
            return state

    def _log_summary(self, tracker: tjx_metrics.Tracker) -> None:
        """Log the summary; a full disk does not fail a run that is saved."""
        try:
            tracker.log_summary(self.summary)
        except OSError as error:
            log_info(f"warning: the summary cannot be written: {error}")

    def _report_profile(self, profiler: tjx_metrics.Profiler) -> None:
        """Print and write the analysis of the profiled steps."""
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
        except Exception as error:  # a malformed trace must not fail the run
            text = f"warning: cannot analyze the trace: {type(error).__name__}: {error}"
        log_info(text)

    def _summarize(self, state: TrainState) -> Scalars:
        """Return the summary; repeat the last evaluation if an earlier attempt made it."""
        last = self.logger.last_evaluation or self.job.evaluate(self.job.eval_params(state))
        self.final_metrics = last.metrics()
        if not tjx_parallel.is_main():
            return {}
        skipped = int(jax.device_get(state.guard.skipped))
        return summarize_run(
            self.job.config, self.run, self.step_timer, self.final_metrics, skipped=skipped
        )

    def _hyperparameters(self) -> dict[str, Any]:
        """Return the hyperparameters and provenance of the run for trackers."""
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
        """Return the recording trackers and the console; both empty except on process 0."""
        if not tjx_parallel.is_main():
            return [], []
        config = self.job.config
        records = tjx_metrics.JsonlTracker(
            self.run.metrics,
            # The evaluation of step 0 precedes the first checkpoint: a restart repeats it.
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
        """Warn if metrics of completed steps are missing, as after a power loss."""
        expected = self._metadata(start).get("metrics_bytes")
        if expected is not None and (lost := expected - metrics.logged_bytes) > 0:
            log_info(
                f"warning: {metrics.path} lacks {lost:,} bytes of records up to step {start}: they "
                "were lost after the checkpoint was saved; the checkpoint is complete"
            )

    def _check_lost_checkpoints(self) -> None:
        """Raise if metrics record saves but no checkpoint exists: its disk may not be mounted."""
        if not self.run.metrics.is_file():
            return
        with self.run.metrics.open("rb") as file:
            if any(CHECKPOINT_BYTES.encode() in line for line in file):
                raise tjx_ckpt.NoCheckpointError(
                    f"{self.run.metrics} records saves, but there is no checkpoint in "
                    f"{self.run.checkpoint_location(self.job.config)}; restore the checkpoints (is "
                    "their disk mounted?), or give another --run_dir to start a new run"
                )

    def _is_evaluation_pending(self, step: int) -> bool:
        """Return whether the evaluation of a step was due and is not complete."""
        # At step 0 the evaluation is always pending.
        return bool(self._metadata(step).get("owes_evaluation", step == 0))

    def _metadata(self, step: int) -> Mapping[str, Any]:
        """Return the metadata of the checkpoint of a step; empty without a checkpoint."""
        return self.checkpointer.metadata(step) if step in self.checkpointer.steps() else {}

    def _roll_back(self, reason: str) -> TrainState:
        """Restore the newest valid checkpoint before the streak of non-finite steps."""
        begin = self.logger.streak_start
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
        log_info(f"rolling back   {reason}; restarting from step {step}")
        return state

    def _divergence_advice(self) -> str:
        """Return advice for a diverged run, with its last good checkpoint."""
        step = self.checkpointer.latest_step()
        last = (
            "no checkpoint was saved before it"
            if step is None
            else f"the last good checkpoint is step {step} in "
            f"{self.run.checkpoint_location(self.job.config)}"
        )
        return (
            f"{last}; in another --run_dir try a lower --optimizer.learning_rate, a longer "
            "--schedule.warmup_steps or a smaller --optimizer.clip_norm"
        )


def run_metadata(job: Job) -> dict[str, Any]:
    """Return the metadata saved with each state of a run, as JSON.

    Returns
    -------
    dict
        ``config`` by dotted name; ``config_sha256``, its hash without the run directory; ``data``:
        the data identity; ``versions`` of the packages; ``git`` revision or None; ``devices``:
        count, kind, processes and mesh.
    """
    config = flatten(replace(job.config, run_dir=None))
    return {
        "config": config,
        "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "data": data_identity(job.task),
        "versions": provenance.versions(),
        "git": provenance.git_revision(),
        "devices": f"{job.mesh.size} {job.mesh.devices.flat[0].device_kind} in "
        f"{jax.process_count()} processes, mesh {format_mesh(job)}",
    }


@contextmanager
def recording(tracker: tjx_metrics.CompositeTracker) -> Iterator[tjx_metrics.CompositeTracker]:
    """Close a tracker when the block ends.

    Raises
    ------
    tjx_metrics.RecordError
        If buffered metrics cannot be written; added as a note if another error ends the block.
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
