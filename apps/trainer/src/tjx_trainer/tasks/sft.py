"""Supervised fine-tuning: next-token prediction of the assistant's messages in conversations."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

import tjx_data
import tjx_nn
from tjx_data.corpora.documents import SplitName
from tjx_data.corpora.tiny_chat import conversations as generated_conversations
from tjx_nn.models.gpt_config import GPTConfig
from tjx_trainer.config.run_config import Config
from tjx_trainer.distillation.teacher import with_teacher
from tjx_trainer.runtime.run_dir import RunDirectory
from tjx_trainer.runtime.run_logging import log_info
from tjx_trainer.tasks.base_task import LoaderTask
from tjx_trainer.tasks.sampling import generation_inputs
from tjx_trainer.tasks.task import DataShard, OpenedTask
from tjx_trainer.tasks.text_data import fit_vocabulary
from tjx_trainer.tasks.text_stream import decode_text
from tjx_trainer.training.pretrained import check_tokenizer


class ChatData(NamedTuple):
    """Tokenizer, template and encoded conversations of a run, by split."""

    tokenizer: tjx_data.Tokenizer
    template: tjx_data.ChatTemplate
    splits: Mapping[SplitName, tjx_data.EncodedConversations]
    n_left_out: int


def open_sft(config: Config, progress: tjx_data.Progress | None = None) -> OpenedTask:  # noqa: ARG001
    """Read, render and encode the conversations of ``data.path``, else those of tiny-chat."""
    tokenizer, template = open_chat(config)
    for note in check_tokenizer(config, tokenizer):
        log_info(f"note           {note}")
    config = with_teacher(fit_vocabulary(config, tokenizer.vocab_size), tokenizer)
    malformed: list[tjx_data.Malformed] = []
    if config.data.path is None:
        conversations = generated_conversations()[: config.data.max_documents]
    else:
        conversations, malformed = tjx_data.read_conversations(config.data.path, config.chat)
    encoded, left_out = tjx_data.encode_conversations(
        conversations, template, tokenizer, config.chat, seq_len=config.data.seq_len
    )
    splits = {
        name: tjx_data.EncodedConversations.of(part)
        for name, part in tjx_data.split_conversations(
            encoded, config.data.holdout_fraction
        ).items()
    }
    data = ChatData(tokenizer, template, splits, len(malformed) + len(left_out))
    return config, lambda share: SFTTask(config, data, share)


def open_chat(config: Config) -> tuple[tjx_data.Tokenizer, tjx_data.ChatTemplate]:
    """Return the tokenizer of ``data.tokenizer``, and the chat template of ``chat.template``.

    The tokenizer "byte" has the special tokens of the template "tjx".

    Raises
    ------
    tjx_data.HubError
        If the tokenizer cannot be downloaded and is not cached.
    ValueError
        If there is no such tokenizer or template.
    """
    kind = config.data.tokenizer_kind
    if kind == "byte":
        tokenizer = tjx_data.byte_tokenizer(("<|endoftext|>", *tjx_data.CHAT_TOKENS))
    else:
        tokenizer = tjx_data.Tokenizer.load(kind)
    return tokenizer, tjx_data.find_template(config.chat, tokenizer, kind)


class SFTTask(LoaderTask[tjx_data.ConversationLoader]):
    """Next-token prediction of the assistant's messages, packed into rows.

    Parameters
    ----------
    config : Config
        The resolved configuration.
    data : ChatData
        The conversations.
    share : DataShard
        The rows of this process.
    """

    def __init__(self, config: Config, data: ChatData, share: DataShard) -> None:
        def loader(split: SplitName, batch_size: int) -> tjx_data.ConversationLoader:
            return tjx_data.ConversationLoader(
                data.splits[split],
                seq_len=config.data.seq_len,
                batch_size=batch_size,
                seed=config.seed,
                process_index=share.process_index,
                process_count=share.process_count,
            )

        super().__init__(
            loader("train", share.batch_size),
            loader("validation", share.evaluation_batch_size),
            eval_limit=config.train.eval_tokens,
        )
        self.config, self.data = config, data
        self.accuracies = (1,) if config.log.accuracies else ()

    @property
    def data_summary(self) -> str:
        """Numbers of conversations and tokens, and the template."""
        train, held_out = self.train_data, self.validation_data
        rows = train.rows_per_epoch * train.seq_len
        left_out = f"{self.data.n_left_out:,} left out, " if self.data.n_left_out else ""
        return (
            f"{train.conversations.n_conversations:,} conversations to train on, "
            f"{held_out.conversations.n_conversations:,} held out, {left_out}"
            f"{train.n_labels:,} of {train.n_tokens:,} tokens are labels, rows are "
            f"{train.n_tokens / rows:.0%} full, template {self.data.template.name}"
        )

    def record(self, run: RunDirectory) -> None:
        """Write the tokenizer and the chat template to the run directory."""
        self.data.tokenizer.save(run.tokenizer)
        self.data.template.save(run.path)

    def sample(self, params: dict[str, Any], /) -> str | None:
        """Generate the answer to ``train.sample_prompt``, a message of the user."""
        train, model = self.config.train, self.config.model
        if not (train.sample_tokens and train.sample_prompt):
            return None
        assert isinstance(model, GPTConfig)
        message = {"role": "user", "content": train.sample_prompt}
        prompt = tjx_data.encode_chat_prompt(self.data.template, self.data.tokenizer, [message])
        inputs = generation_inputs(
            model,
            prompt,
            max_new_tokens=min(train.sample_tokens, max(model.max_seq_len - len(prompt), 0)),
            temperature=train.sample_temperature,
            top_k=train.sample_top_k,
            seed=self.config.seed,
        )
        [new] = jax.device_get(tjx_nn.generate(model, params, **inputs)).tolist()
        special = set(self.data.tokenizer.special_tokens.values())
        end = next((i for i, token in enumerate(new) if token in special), len(new))
        return f"> {train.sample_prompt}\n{decode_text(self.data.tokenizer, new[:end])}"

    def final_report(self, params: dict[str, Any], metrics: Mapping[str, float], /) -> list[str]:
        """Return loss and perplexity of the held-out answers, and a sample."""
        lines = [
            f"validation loss  {metrics['loss']:.4f} nats a token of the assistant, "
            f"perplexity {math.exp(metrics['loss']):.2f}"
        ]
        if (sample := self.sample(params)) is not None:
            lines = ["a sample", "--------", sample, "--------", *lines]
        return lines
