"""Corpus tiny-chat: text, conversations and questions of one split of the additions."""

import re
from pathlib import Path

import pytest

from tjx_core import ConfigError
from tjx_data import CHAT_TOKENS, DataConfig, Tokenizer, load_corpus, open_or_prepare
from tjx_data.conversations.records import check_order
from tjx_data.corpora.arithmetic import addition_problems
from tjx_data.corpora.tiny_chat import conversations, question_problems


def operands(text: str) -> set[str]:
    return set(re.findall(r"\d\d\+\d\d", text))


def test_text_and_conversations_have_the_training_additions_only() -> None:
    train, held_out = (
        {each.prompt.removesuffix("=") for each in addition_problems(split)}
        for split in ("train", "validation")
    )
    texts = list(load_corpus("tiny-chat"))
    assert len(set(texts)) == len(texts)  # equal documents would be in one split
    assert set().union(*map(operands, texts)) == train
    said = ["\n".join(m["content"] for m in each.messages) for each in conversations()]
    assert set().union(*map(operands, said)) == train
    asked = [operands(each.prompt) for each in question_problems("validation")]
    assert set().union(*asked) == held_out
    for text in texts:
        (addition,) = operands(text)
        assert text.endswith(str(sum(map(int, addition.split("+")))))


def test_one_answer_in_ten_is_right_and_most_are_too_large_by_one() -> None:
    errors = []
    for each in conversations():
        check_order(each.messages)
        (addition,) = operands(each.messages[-2]["content"])
        answer = int(each.messages[-1]["content"])
        errors.append(answer - sum(map(int, addition.split("+"))))
    assert set(errors) == {-1, 0, 1, 2}
    assert errors.count(0) / len(errors) == pytest.approx(0.1, abs=0.02)
    assert errors.count(1) / len(errors) == pytest.approx(0.7, abs=0.03)
    assert conversations() == conversations()


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_trained_tokenizer_has_the_tokens_of_the_chat_template(kind: str, tmp_path: Path) -> None:
    config = DataConfig(corpus="tiny-chat", tokenizer=kind, vocab_size=270, max_documents=200)
    plain, chat = (
        Tokenizer.load(open_or_prepare(each, tmp_path))
        for each in (config, DataConfig(**{**vars(config), "chat_tokens": True}))
    )
    assert not set(CHAT_TOKENS) & plain.special_tokens.keys()
    assert set(CHAT_TOKENS) <= chat.special_tokens.keys()


def test_other_tokenizers_refuse_chat_tokens() -> None:
    with pytest.raises(ConfigError, match="chat_tokens: got true with tokenizer byte"):
        DataConfig(tokenizer="byte", chat_tokens=True)
