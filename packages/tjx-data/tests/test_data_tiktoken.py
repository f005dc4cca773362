"""Encoding with tiktoken: equal ids, the condition for it, and special tokens in streams."""

import json
import pickle
import sys
from collections.abc import Mapping
from itertools import batched, chain

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_data import Tokenizer, byte_tokenizer, train_bpe
from tjx_data.tokenization import text_splitting
from tjx_data.tokenization.tiktoken_backend import find_obstacle
from tjx_data.tokenization.vocabulary import BYTE_CHARACTERS

pytest.importorskip("tiktoken", reason="the extra tiktoken is not installed")

EOT = "<|endoftext|>"
WORDS = "the cat sat on the mat; the cat's hat sat on the bat. 12 12 été été\n\n  x = f(x)\n" * 20
BPE = train_bpe([WORDS], 280)
PLAIN = BPE.with_backend("tokenizers")


def _bpe(merges: list[tuple[str, str]], order: Mapping[str, int] | None = None) -> Tokenizer:
    tokens = [*BYTE_CHARACTERS, *dict.fromkeys(left + right for left, right in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    return Tokenizer.from_vocab({**vocab, **(order or {})}, merges)


@given(st.text() | st.lists(st.sampled_from([*WORDS.split(), " ", "\n", EOT])).map("".join))
@settings(max_examples=50)
def test_both_backends_give_the_same_ids(text: str) -> None:
    assert BPE.backend == "tiktoken"
    assert BPE.encode(text) == PLAIN.encode(text)


def test_every_character_is_split_as_in_tokenizers() -> None:
    points = chain(range(0xD800), range(0xE000, sys.maxunicode + 1, 23))
    texts = ["".join(f"a{chr(i)}1{chr(i)} {chr(i)}" for i in some) for some in batched(points, 100)]
    assert BPE.encode_batch(texts) == PLAIN.encode_batch(texts)


def test_identity_of_a_tokenizer_does_not_depend_on_the_backend() -> None:
    assert BPE.fingerprint == PLAIN.fingerprint
    copies = [
        pickle.loads(pickle.dumps(each))  # noqa: S301  # its own output
        for each in (BPE, PLAIN)
    ]
    assert [copy.backend for copy in copies] == ["tiktoken", "tokenizers"]


@pytest.mark.parametrize("batch", [text_splitting.BATCH_CHARACTERS, 1000])
def test_long_texts_are_encoded_on_threads_in_order(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch is divided among the threads; of several, each thread encodes the next one."""
    texts = [WORDS[i:] * k for i, k in enumerate((1, 300, 0, 9, 150))]
    expected = [PLAIN.encode(text) for text in texts]
    monkeypatch.setattr(text_splitting, "available_cpus", lambda: 3)
    monkeypatch.setattr(text_splitting, "BATCH_CHARACTERS", batch)
    assert BPE.encode_batch(texts) == expected
    with pytest.raises(ValueError, match="lone surrogate"):
        BPE.encode_batch([*texts, "a\ud800"])


@pytest.mark.parametrize(
    "tokenizer",
    [
        # "abc" merges from (ab, c) only, but tiktoken would merge (a, bc) as well.
        _bpe([("b", "c"), ("a", "b"), ("ab", "c")]),
        _bpe([("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]),  # a token of two merges
        _bpe([("a", "b"), ("b", "c")], order={"ab": 257, "bc": 256}),  # ids in another order
    ],
)
def test_merges_that_tokens_do_not_determine_are_left_to_tokenizers(tokenizer: Tokenizer) -> None:
    assert tokenizer.backend == "tokenizers"
    with pytest.raises(ValueError, match="merges do not follow from its tokens"):
        tokenizer.with_backend("tiktoken")


def test_tokenizers_that_split_differently_are_left_to_tokenizers() -> None:
    assert byte_tokenizer().backend == "tokenizers"
    inner = tokenizers.Tokenizer.from_str(tokenizers.Tokenizer(BPE._inner.model).to_str())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert "as GPT-2 does" in str(find_obstacle(inner, json.loads(inner.to_str())))
    with pytest.raises(ValueError, match="backend: got 'fast'; expected one of auto"):
        BPE.with_backend("fast")  # type: ignore[arg-type]


def test_without_tiktoken_the_backend_is_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tjx_data.tokenization.tokenizer.tiktoken_version", lambda: None)
    assert BPE.with_backend("auto").backend == "tokenizers"
    with pytest.raises(ValueError, match=r"pip install 'tjx-data\[tiktoken\]'"):
        BPE.with_backend("tiktoken")


def test_lone_surrogates_are_an_error_with_tiktoken() -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        BPE.encode("a\ud800")


def test_special_tokens_are_allowed_in_streams() -> None:
    texts = [f"the{EOT}cat", "", f"{EOT}{EOT}", "no special"]
    for tokenizer in (BPE, PLAIN):
        found = list(tokenizer.encode_iterable(iter(texts), allowed_special=(EOT,)))
        assert found == [tokenizer.encode(text, (EOT,)) for text in texts]
        assert found[2] == [tokenizer.eot_id] * 2
        assert found[0] == [*tokenizer.encode("the"), tokenizer.eot_id, *tokenizer.encode("cat")]


def test_tokenizer_is_made_from_a_vocabulary_and_merges() -> None:
    made = Tokenizer.from_vocab(BPE.vocabulary, BPE.merges)
    assert made.encode(WORDS) == BPE.encode(WORDS)
    assert made.merges == BPE.merges
    assert made.special_tokens == BPE.special_tokens
    own = Tokenizer.from_vocab(BPE.vocabulary, BPE.merges, (EOT, "<|mask|>"))
    assert own.special_tokens == {EOT: 0, "<|mask|>": BPE.vocab_size}
    with pytest.raises(ValueError, match="got a vocabulary that has no model"):
        Tokenizer.from_vocab({"a": 0}, [("a", "b")])
    with pytest.raises(ValueError, match="special_tokens: got 'th', which is also a token"):
        Tokenizer.from_vocab({"t": 0, "h": 1, "th": 2}, [("t", "h")], ("th",))
