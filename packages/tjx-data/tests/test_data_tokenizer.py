"""Text makes the round trip exactly, special tokens stay out of it, bytes are counted right."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_data import Tokenizer, char_tokenizer, train_bpe
from tjx_data.pieces import split_exactly

EOT = "<|endoftext|>"
WORDS = "the cat sat on the mat; the cat's hat sat on the bat. 12 12 été été\n\n  x = f(x)\n" * 20
BPE = train_bpe([WORDS], 280)
PLACES = [
    "Hello world",
    f"a{EOT}b",
    "  double  spaces \t\r\n mixed\n\n\n ends ",
    "naïve 日本語 🙂 e\u0301 \x00 \u2028 \ufeff",
    "don't we'll 1234 x==y...",
]


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_exactly_and_its_bytes_are_counted(text: str) -> None:
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    assert BPE.token_byte_lengths[ids].sum() == len(text.encode("utf-8"))


@given(st.text(min_size=1), st.data())
@settings(deadline=None)
def test_characters_seen_come_back_exactly(text: str, data: st.DataObject) -> None:
    tokenizer = char_tokenizer([text, text[::-1]])
    other = data.draw(st.text(st.sampled_from(sorted(set(text)))))
    ids = tokenizer.encode(other)
    assert len(ids) == len(other)
    assert tokenizer.decode(ids) == other
    assert tokenizer.token_byte_lengths[ids].sum() == len(other.encode("utf-8"))


def test_characters_have_nanogpt_ids_and_the_unseen_become_unk() -> None:
    tokenizer = char_tokenizer(["ba", "dc"], special_tokens=(EOT,))
    assert tokenizer.encode("abcd") == [0, 1, 2, 3]
    unknown = tokenizer.special_tokens["<unk>"]
    assert tokenizer.encode("aéb🙂") == [0, unknown, 1, unknown]
    # A text that spells a special token is text: here, letters never seen and one "d".
    assert tokenizer.encode("<unk>") == [unknown] * 5
    assert tokenizer.eot_id == 5
    assert tokenizer.vocab_size == 6


def test_special_tokens_in_text_are_text_unless_allowed() -> None:
    text = f"one{EOT}two"
    assert BPE.eot_id == 0
    assert BPE.eot_id not in BPE.encode(text)
    assert BPE.decode(BPE.encode(text)) == text
    allowed = BPE.encode(text, allowed_special=[EOT])
    assert allowed == [*BPE.encode("one"), 0, *BPE.encode("two")]
    assert BPE.decode(allowed) == text
    assert BPE.encode_batch([text, "two"]) == [BPE.encode(text), BPE.encode("two")]
    with pytest.raises(ValueError, match=r"did you mean '<\|endoftext\|>'"):
        BPE.encode(text, allowed_special=["<|endoftex|>"])


def test_a_lone_surrogate_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        BPE.encode("a\ud800b")


def test_saving_and_loading_changes_nothing(tmp_path: Path) -> None:
    for tokenizer in (BPE, char_tokenizer([WORDS], special_tokens=(EOT,))):
        tokenizer.save(tmp_path / "tokenizer.json")
        for place in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
            loaded = Tokenizer.load(place)
            assert loaded.fingerprint == tokenizer.fingerprint
            assert loaded.eot_id == tokenizer.eot_id
            assert loaded.vocab_size == tokenizer.vocab_size
            assert loaded.encode(WORDS + EOT) == tokenizer.encode(WORDS + EOT)
            np.testing.assert_array_equal(loaded.token_byte_lengths, tokenizer.token_byte_lengths)


def test_truncation_and_padding_in_a_file_do_not_change_documents(tmp_path: Path) -> None:
    BPE.save(tmp_path / "tokenizer.json")
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.enable_truncation(3)
    inner.enable_padding(length=2)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode_batch([WORDS, "a"]) == BPE.encode_batch([WORDS, "a"])


def test_what_is_no_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer here"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="no such file or folder"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_bytes_are_not_guessed_for_tokenizers_that_have_none() -> None:
    word_piece = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0}, unk_token="a"))  # noqa: S106  not a secret
    word_piece.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(ValueError, match="byte-level or character"):
        _ = Tokenizer(word_piece).token_byte_lengths


def test_gpt2_files_under_either_name_give_one_tokenizer(tmp_path: Path) -> None:
    """A hand-made vocabulary in GPT-2's format: bytes, one merge, the end of text last."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "th", EOT])}
    prints = set()
    for folder, (names, merges) in {
        "a": ("encoder.json", "vocab.bpe"),
        "b": ("vocab.json", "merges.txt"),
    }.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / names).write_text(json.dumps(vocabulary))
        (tmp_path / folder / merges).write_text("#version: 0.2\nt h\n")
        tokenizer = Tokenizer.load(tmp_path / folder)
        assert tokenizer.encode("th") == [256]
        assert tokenizer.eot_id == 257
        assert tokenizer.encode(EOT) == [vocabulary[c] for c in EOT]
        prints |= {tokenizer.fingerprint, Tokenizer.load(tmp_path / folder / merges).fingerprint}
    assert len(prints) == 1


@given(
    st.lists(st.sampled_from([*PLACES, " ", "\n", " \n", "a", "b.", "!", "é", "\t", "\u3000"])),
    st.integers(1, 12),
)
@settings(max_examples=300, deadline=None)
def test_pieces_have_the_tokens_of_the_whole(parts: list[str], size: int) -> None:
    text = "".join(parts)
    pieces = list(split_exactly(text, size))
    assert "".join(pieces) == text
    assert [i for ids in BPE.encode_batch(pieces) for i in ids] == BPE.encode(text)


def test_bpe_depends_on_the_documents_alone() -> None:
    documents = [WORDS[i : i + 80] for i in range(0, len(WORDS), 80)]
    expected = train_bpe(documents, 275).fingerprint
    assert train_bpe(iter(documents), 275).fingerprint == expected
    assert train_bpe(documents[::-1], 275).fingerprint == expected
    # One document longer than a piece is not cut where it would change words.
    long = WORDS * 100
    assert len(list(split_exactly(long))) > 1
    inner = tokenizers.ByteLevelBPETokenizer()
    inner.train_from_iterator([long], 280, show_progress=False, special_tokens=[EOT])
    assert train_bpe([long], 280).encode(WORDS) == inner.encode(WORDS).ids


def test_bpe_says_when_it_cannot_reach_the_size() -> None:
    with pytest.raises(ValueError, match=r"vocab_size=256 .* at least 257"):
        train_bpe([WORDS], 256)
    with pytest.raises(ValueError, match=r"vocab_size=5000 .* give (\d+) tokens"):
        train_bpe([WORDS], 5000)
    assert train_bpe(["the the"], 257).vocab_size == 257


@pytest.mark.skipif("TJX_TEST_DATA" not in os.environ, reason="TJX_TEST_DATA is not set")
def test_gpt2_ids_are_the_published_ones() -> None:
    data = Path(os.environ["TJX_TEST_DATA"])
    gpt2 = Tokenizer.load(data / "gpt2")
    assert gpt2.vocab_size == 50257
    assert gpt2.eot_id == 50256
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]
    assert gpt2.encode(f" {EOT}")[0] != 50256
    assert gpt2.encode(EOT, allowed_special=[EOT]) == [50256]
    tokens = gpt2.encode((data / "shakespeare.txt").read_text())
    assert len(tokens) == 338025  # nanoGPT's 301,966 and 36,059
    for file in sorted((data / "udhr").glob("*.txt")):
        text = file.read_text(encoding="utf-8")
        ids = gpt2.encode(text)
        assert gpt2.decode(ids) == text
        assert gpt2.token_byte_lengths[ids].sum() == len(text.encode("utf-8"))
