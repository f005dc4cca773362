"""Loss on the validation data of a run of any family, computed as during training."""

from tjx_eval.load_model import TrainedModel
from tjx_eval.scoring.score import TOP_K, Metric, ProgressCallback, no_progress


def measure_validation_loss(
    model: TrainedModel,
    *,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    on_progress: ProgressCallback = no_progress,
) -> dict[str, Metric]:
    """Evaluate once over the validation data of a run.

    Parameters
    ----------
    model : TrainedModel
        A run.
    batch_size : int, optional
        Examples per batch over all devices, by default that of the run; does not change results.
    max_tokens : int, optional
        Stop after this many tokens (or images).
    on_progress : callable
        Called with the number of labels so far, and 0 because the total is unknown.

    Returns
    -------
    dict
        Loss in nats per label; for text also perplexity, and bits per token and byte; accuracies;
        number of labels and bytes, and labels per second.
    """
    assert model.run is not None
    evaluation, seconds = model.run.evaluate(
        model.architecture,
        model.params,
        model.mesh,
        tokenizer=model.text_tokenizer,
        ks=TOP_K,
        batch_size=batch_size,
        max_tokens=max_tokens,
        on_batch=lambda done: on_progress(done, 0),
    )
    metrics = evaluation.metrics()
    if model.architecture.family == "gpt":
        del metrics["exact_match"]  # the rows of a decoder are arbitrary pieces of text
    return {
        **metrics,
        "tokens": evaluation.tokens,
        **({} if evaluation.text_bytes is None else {"text_bytes": evaluation.text_bytes}),
        "tokens_per_sec": evaluation.tokens / seconds,
    }
