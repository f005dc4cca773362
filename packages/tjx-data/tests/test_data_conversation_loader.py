"""Packed conversations: rows, labels, epochs, splits, truncation, and the command show-chat."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_data import (
    CHAT_TOKENS,
    ChatConfig,
    ChatTemplate,
    Conversation,
    ConversationLoader,
    EncodedConversation,
    EncodedConversations,
    byte_tokenizer,
    encode_conversations,
    split_conversations,
)
from tjx_data.main import main

SEQ_LEN = 12


def encoded(lengths: list[int]) -> list[EncodedConversation]:
    """Return conversations with distinct tokens, whose answers are the tokens divisible by 3."""
    ends = np.cumsum(lengths)
    ranges = [np.arange(end - n, end, dtype=np.int32) for end, n in zip(ends, lengths, strict=True)]
    return [EncodedConversation(tokens, tokens % 3 == 0) for tokens in ranges]


def loader(lengths: list[int], **options: Any) -> ConversationLoader:
    chosen = {"seq_len": SEQ_LEN, "batch_size": 1, **options}
    return ConversationLoader(EncodedConversations.of(encoded(lengths)), **chosen)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(2, SEQ_LEN + 1), min_size=1, max_size=20), st.integers(0, 3))
def test_an_epoch_has_each_conversation_once_with_labels_on_answers_only(
    lengths: list[int], epoch: int
) -> None:
    rows = loader(lengths, seed=5)
    first = epoch * rows.rows_per_epoch
    seen = []
    for index in range(first, first + rows.rows_per_epoch):
        batch = rows.rows(np.array([index]))
        tokens, labels, segments, positions = (
            batch[name][0] for name in ("tokens", "labels", "segment_ids", "positions")
        )
        is_label = labels != -100
        assert (labels[is_label] == tokens[is_label] + 1).all()
        assert (is_label == ((tokens + 1) % 3 == 0) & (segments > 0)).all()
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            assert positions[inside].tolist() == list(range(inside.sum()))
            seen.append(tokens[inside].tolist())
    assert sorted(seen) == [each.tokens[:-1].tolist() for each in encoded(lengths)]


def test_batches_are_a_function_of_seed_and_step() -> None:
    lengths = [5, 5, 5, 5, 3, 3, 3, 7, 9]
    first, again = loader(lengths, seed=1, batch_size=2), loader(lengths, seed=1, batch_size=2)
    later = first.batch(7)
    np.testing.assert_array_equal(later["tokens"], again.batch(7)["tokens"])
    halves = [
        loader(lengths, seed=1, batch_size=2, process_index=i, process_count=2).batch(7)["tokens"]
        for i in range(2)
    ]
    np.testing.assert_array_equal(later["tokens"], np.concatenate(halves))

    def rows(seed: int, epoch: int) -> set[bytes]:
        one = loader(lengths, seed=seed)
        start = epoch * one.rows_per_epoch
        indices = np.arange(start, start + one.rows_per_epoch)
        return {row.tobytes() for row in one.rows(indices)["tokens"]}

    assert len({frozenset(rows(s, e)) for s, e in ((0, 0), (0, 1), (0, 2), (1, 0), (2, 0))}) > 1


def test_evaluation_reads_every_conversation_once_in_batches_of_one_shape() -> None:
    lengths = [5, 5, 3, 7, 9, 13]
    batches = list(loader(lengths, batch_size=4).evaluation_batches())
    assert {batch["tokens"].shape for batch in batches} == {(4, SEQ_LEN)}
    n_labels = sum((batch["labels"] != -100).sum() for batch in batches)
    assert n_labels == loader(lengths).n_labels
    assert len(list(loader(lengths, batch_size=1).evaluation_batches(SEQ_LEN + 1))) == 2


def test_splits_do_not_depend_on_the_order_and_keep_equal_conversations_together() -> None:
    given_ = encoded([4, 5, 6, 7, 8] * 4)
    both = [*given_, *given_]
    splits = split_conversations(both, 0.2)
    backwards = split_conversations(both[::-1], 0.2)
    keys = {name: {e.tokens.tobytes() for e in part} for name, part in splits.items()}
    assert keys == {n: {e.tokens.tobytes() for e in part} for n, part in backwards.items()}
    assert not keys["train"] & keys["validation"]
    assert len(splits["validation"]) == 8
    with pytest.raises(ValueError, match="got 1 different conversations; expected at least 2"):
        split_conversations(given_[:1] * 3, 0.1)


def conversation(question: str, answer: str) -> Conversation:
    messages = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    return Conversation(messages, location=f"chat.jsonl:{len(question)}")


@pytest.mark.parametrize(
    ("truncation", "kept"),
    [("drop", None), ("right", "<|user|>1234567<|end|><|assistant|>abc"),
     ("left", "567<|end|><|assistant|>abcdefg<|end|>")],
)  # fmt: skip
def test_long_conversations_are_truncated(truncation: Any, kept: str | None) -> None:
    tokenizer = byte_tokenizer(CHAT_TOKENS)
    template = ChatTemplate.built_in("tjx")
    given_ = [conversation("1", "2"), conversation("1234567", "abcdefg")]
    with pytest.raises(ValueError, match=r"1 of 2 conversations are longer, such as chat\.jsonl:7"):
        encode_conversations(given_, template, tokenizer, ChatConfig(), seq_len=SEQ_LEN)
    config = ChatConfig(truncation=truncation)
    found, left_out = encode_conversations(given_, template, tokenizer, config, seq_len=SEQ_LEN)
    assert [tokenizer.decode(each.tokens) for each in found[1:]] == ([] if kept is None else [kept])
    assert len(left_out) == (kept is None)
    # Without a label left it is dropped.
    question = [conversation("1", "2"), conversation("1" * 30, "2")]
    found, left_out = encode_conversations(
        question, template, tokenizer, ChatConfig(truncation="right"), seq_len=SEQ_LEN
    )
    assert (len(found), left_out[0].line) == (1, 30)


def test_rejected_conversations_are_listed_or_skipped() -> None:
    tokenizer = byte_tokenizer(CHAT_TOKENS)
    given_ = [conversation("1", "2"), conversation("<|user|>", "2")]
    arguments = (given_, ChatTemplate.built_in("tjx"), tokenizer)
    with pytest.raises(ValueError, match=r"chat\.jsonl:8: message 1 contains <\|user\|>"):
        encode_conversations(*arguments, ChatConfig(), seq_len=SEQ_LEN)
    config = ChatConfig(skip_malformed=True)
    found, left_out = encode_conversations(*arguments, config, seq_len=SEQ_LEN)
    assert (len(found), len(left_out)) == (1, 1)


def test_loader_refuses_conversations_longer_than_a_row() -> None:
    with pytest.raises(ValueError, match="seq_len: got 12 with conversations of 3 to 14 tokens"):
        loader([3, 14])
    with pytest.raises(ValueError, match="conversations: got none"):
        loader([])


def test_show_chat_prints_the_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    byte_tokenizer(CHAT_TOKENS).save(tmp_path / "tokenizer.json")
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"prompt": "1+2", "completion": "3\u00e9\x1b"}))
    arguments = ["show-chat", str(file), "--tokenizer", str(tmp_path)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "1 conversations, 0 malformed, tjx" in shown
    assert "|+|2|<|end|>|<|assistant|>⟦3|" in shown
    assert "\\x1b|<|end|>⟧" in shown
    assert main([*arguments, "--truncation", "cut"]) == 2
    assert "truncation: got 'cut'" in capsys.readouterr().err
