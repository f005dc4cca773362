"""Opening of the tasks grpo, dpo and kto."""

import hashlib

import tjx_data
from tjx_data.corpora.tiny_chat import documents as generated_text
from tjx_trainer.config.run_config import Config
from tjx_trainer.distillation.teacher import with_teacher
from tjx_trainer.rl.examples import read_examples
from tjx_trainer.rl.grpo_task import GRPOTask
from tjx_trainer.rl.preference_tasks import DPOTask, KTOTask
from tjx_trainer.rl.prompt_format import PromptFormat
from tjx_trainer.tasks.task import OpenedTask
from tjx_trainer.tasks.text_data import fit_vocabulary
from tjx_trainer.training.pretrained import params_digest, pretrained_params

END_OF_TEXT = "<|endoftext|>"


def open_rl(config: Config) -> OpenedTask:
    """Read the examples of a run; the tokenizer is that of ``train.init_from``.

    Without ``train.init_from`` the tokenizer has the characters of the corpus.

    Raises
    ------
    ValueError
        If the data do not fit the configuration.
    """
    examples = read_examples(config)
    tokenizer = open_tokenizer(config)
    facts = {"tokenizer": tokenizer.fingerprint}
    config = with_teacher(fit_vocabulary(config, tokenizer.vocab_size), tokenizer)
    if config.task != "grpo" or config.rl.kl_coefficient:
        facts["reference"] = reference_fingerprint(config)
    if config.task == "dpo":
        return config, lambda share: DPOTask(config, tokenizer, examples, facts, share)
    if config.task == "kto":
        return config, lambda share: KTOTask(config, tokenizer, examples, facts, share)
    form = PromptFormat.of(config, tokenizer)
    if form.template is not None:
        facts["template"] = hashlib.sha256(form.template.source.encode()).hexdigest()
    return config, lambda share: GRPOTask(config, form, examples, facts, share)


def open_tokenizer(config: Config) -> tjx_data.Tokenizer:
    """Return the tokenizer of the initial model; without one a tokenizer of digits and signs."""
    if config.train.init_from is not None:
        return tjx_data.Tokenizer.load(config.train.init_from)
    if config.data.corpus == "tiny-chat":
        return tjx_data.char_tokenizer(generated_text(), (END_OF_TEXT, *tjx_data.CHAT_TOKENS))
    return tjx_data.char_tokenizer(["0123456789+="], (END_OF_TEXT,))


def reference_fingerprint(config: Config) -> str:
    """Return the SHA-256 of the initial parameters: a resumed run must rebuild the same ones."""
    if config.train.init_from is None:
        return f"initialization with seed {config.seed}"
    return params_digest(pretrained_params(config))
