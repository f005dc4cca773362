"""`loss`: how well a model predicts held-out text, in every usual unit."""

import time

import tjx_parallel
from tjx_eval.errors import RunError
from tjx_eval.opening import TrainedModel
from tjx_trainer.evaluation import evaluate, make_eval_step
from tjx_trainer.task import Share
from tjx_trainer.text import Text, open_rows, open_text

TOP_K = (1, 5, 10)


def measure_loss(
    model: TrainedModel, *, batch_size: int | None = None, max_tokens: int | None = None
) -> dict[str, float | int | str]:
    """Evaluate over the run's validation text.

    Parameters
    ----------
    model : TrainedModel
        An opened run.
    batch_size : int, optional
        Sequences at once; changes speed and memory, never the result. The run's own by default.
    max_tokens : int, optional
        Stop after so many tokens.

    Returns
    -------
    dict
        Losses in nats a token, bits a token and a byte, perplexity, shares of tokens among the
        likeliest 1, 5 and 10, the number of tokens and bytes, and tokens a second.

    Raises
    ------
    RunError
        If the devices do not divide the batch size.
    """
    config, devices = model.config, model.mesh.size
    assert config is not None
    if batch_size is None:
        batch_size = -(-config.train.batch_size // devices) * devices
    elif batch_size % devices:
        raise RunError(
            f"--batch_size {batch_size} is not a multiple of the {devices} devices: "
            f"give {-(-batch_size // devices) * devices}"
        )
    loader = open_rows(config, _text(model), Share(batch_size, batch_size, 0, 1), "validation")
    eval_step = make_eval_step(
        config.model, ks=TOP_K, token_byte_lengths=model.tokenizer.token_byte_lengths
    )

    def run(limit: int | None) -> dict[str, float | int | str]:
        started = time.perf_counter()
        result = evaluate(
            eval_step,
            model.params,
            (
                tjx_parallel.shard_batch(model.mesh, batch)
                for batch in loader.evaluation_batches(limit)
            ),
        )
        seconds = time.perf_counter() - started
        assert result.text_bytes is not None  # of text
        return {
            **result.metrics(),
            "tokens": result.tokens,
            "text_bytes": result.text_bytes,
            "tokens_per_sec": result.tokens / seconds,
        }

    run(1)  # compiles, so that the rate below is that of the model
    return {"corpus": _corpus(model), **run(max_tokens)}


def _corpus(model: TrainedModel) -> str:
    assert model.config is not None
    return ", ".join(model.config.data.weights)


def _text(model: TrainedModel) -> Text:
    """Return the prepared data of the run; made again where the cache was emptied."""
    pointer = model.run.data_pointer()
    if pointer is not None and all((f / "index.json").is_file() for f in pointer.folders.values()):
        return Text(pointer.folders, model.tokenizer)
    assert model.config is not None
    return open_text(model.config)
