"""Summary of a finished run: scalars for trackers and lines for the terminal."""

from collections.abc import Mapping

import tjx_metrics
import tjx_nn
from tjx_metrics.trackers.status_line import duration
from tjx_trainer.config.run_config import Config, reads_text
from tjx_trainer.runtime.run_dir import RunDirectory
from tjx_trainer.training.step_timer import Scalars, StepTimer


def summarize_run(
    config: Config,
    run: RunDirectory,
    step_timer: StepTimer,
    found: Mapping[str, float],
    *,
    skipped: int,
) -> Scalars:
    """Return the summary metrics of a finished run.

    Parameters
    ----------
    config : Config
        The resolved configuration.
    run : RunDirectory
        Its metrics include those of earlier attempts.
    step_timer : StepTimer
        Measurements of this process.
    found : mapping
        Metrics of the last evaluation.
    skipped : int
        Number of skipped steps.

    Returns
    -------
    dict
        ``eval/...`` of the last evaluation, ``eval/best_loss`` with its step, ``steps``,
        ``parameters``, ``tokens``, ``hours``, throughput after warm-up, fraction of this process's
        time per phase, and memory peaks [bytes].
    """
    results: Scalars = {f"eval/{name}": value for name, value in found.items()}
    losses = [
        (float(record["eval/loss"]), record["step"])
        for record in tjx_metrics.read_metrics(run.metrics)
        if "eval/loss" in record
    ]
    if losses:
        results["eval/best_loss"], results["eval/best_step"] = min(losses)
    elapsed = step_timer.elapsed
    return {
        **results,
        "steps": config.train.max_steps,
        "skipped": skipped,
        "parameters": tjx_nn.count_params(config.model),
        "tokens": elapsed.tokens,
        "hours": elapsed.seconds / 3600,
        **step_timer.totals(),
    }


def format_summary(config: Config, results: Scalars) -> list[str]:
    """Format the summary as lines; unknown values are omitted."""
    lines = []
    if "tokens_per_sec" in results:
        what = "tokens" if reads_text(config) else "labels"
        share = f" (MFU {results['mfu']:.1%})" if "mfu" in results else ""
        lines.append(f"{what} a second  {results['tokens_per_sec']:,.0f}{share}")
    shares = {
        "waiting for data": results.get("time/data_wait", 0.0),
        "evaluating": results.get("time/evaluation", 0.0),
        "saving": results.get("time/checkpoint", 0.0),
    }
    spent = ", ".join(f"{share:.0%} {name}" for name, share in shares.items() if share >= 0.01)
    of_which = f", of which {spent}" if spent else ""
    lines.append(f"time             {duration(3600 * results['hours'])}{of_which}")
    if results["skipped"]:
        lines.append(f"skipped          {results['skipped']:,.0f} steps that were not finite")
    if results.get("eval/best_step", results["steps"]) != results["steps"]:
        best, step = results["eval/best_loss"], results["eval/best_step"]
        lines.append(f"best evaluation  {best:.4f} at step {step:,}")
    return lines
