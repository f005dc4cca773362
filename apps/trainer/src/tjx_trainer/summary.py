"""What a run says at its end: text of its own, and a yardstick for what it reached."""

import lzma

from tjx_trainer.job import Job
from tjx_trainer.sampling import continue_prompt, longest_continuation
from tjx_trainer.state import TrainState


def sample(job: Job, state: TrainState) -> str:
    """Let the model write on from the configured prompt."""
    config, prompt = job.config, job.config.train.sample_prompt or ""
    room = longest_continuation(config.model, job.tokenizer, prompt)
    text = continue_prompt(
        config.model,
        state.params,
        job.tokenizer,
        prompt,
        max_new_tokens=min(config.train.sample_tokens, room),
        temperature=config.train.sample_temperature,
        top_k=config.train.sample_top_k,
        seed=config.seed,
    )
    return prompt + text[0]


def xz_bits_per_byte(job: Job) -> float:
    """Return what `xz -9` needs for the text that was evaluated, in bits a byte.

    xz sees the text once and knows nothing else; the model has seen the training text.
    """
    loader, tokenizer = job.validation_data, job.tokenizer
    n_labels = min(loader.n_tokens - 1, job.config.train.eval_tokens or loader.n_tokens)
    tokens = loader.read(1, n_labels).tolist()
    text = tokenizer.decode([token for token in tokens if token != tokenizer.eot_id]).encode()
    return 8 * len(lzma.compress(text, preset=9)) / len(text)
