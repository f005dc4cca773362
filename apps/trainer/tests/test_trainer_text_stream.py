"""Incremental detokenization: whole characters that concatenate to the full text."""

from typing import Any

import numpy as np
import pytest

from tjx_data import Tokenizer, byte_tokenizer, char_tokenizer, train_bpe
from tjx_trainer.tasks import text_stream
from tjx_trainer.tasks.text_stream import TextStream, decode_text

TEXT = "Grüße, 世界! 👩‍🚀 naïve ok\n" * 3


def tokenizers() -> list[Tokenizer]:
    return [byte_tokenizer(), char_tokenizer([TEXT]), train_bpe([TEXT] * 4, vocab_size=280)]


@pytest.mark.parametrize("kind", range(3))
def test_pieces_are_whole_characters_and_together_the_text(kind: int) -> None:
    tokenizer = tokenizers()[kind]
    tokens = tokenizer.encode(TEXT)
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokens]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == TEXT
    assert stream.close() == ""
    assert decode_text(tokenizer, tokens) == TEXT


def test_bytes_that_are_no_character_are_the_same_as_when_decoded_at_once() -> None:
    tokenizer = byte_tokenizer()
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = bytes(rng.integers(0, 256, 12)) + "é世".encode()[: int(rng.integers(0, 5))]
        assert decode_text(tokenizer, list(tokenizer.encode_bytes(data))) == data.decode(
            errors="replace"
        )


def test_a_document_s_end_cuts_a_character_and_is_a_blank_line() -> None:
    tokenizer = byte_tokenizer()
    eot = tokenizer.eot_id
    assert eot is not None
    tokens = [*b"a", 0xC3, eot, *b"b", tokenizer.vocab_size + 2]
    assert decode_text(tokenizer, tokens) == "a\ufffd\n\nb\ufffd"
    stream = TextStream(tokenizer, ["a!"], ends_with_document=True)
    assert "".join(map(stream.push, [*b"ba", eot, *b"c"])) + stream.close() == "ba"
    assert stream.stopped


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one. two", [". "], "one"),
        ("one.. two", [". "], "one."),
        ("aabaac", ["aac"], "aab"),
        ("abc", ["abcd"], "abc"),
        ("xyz", ["z", "yz"], "x"),
        ("a\n\nb", ["\n\n"], "a"),
        ("na\u00efve", ["\u00ef"], "na"),
        ("text", [""], "text"),
        ("abababac", ["ababac"], "ab"),
        ("xabcx", ["bc", "abcd"], "xa"),
    ],
)
def test_nothing_of_a_stop_text_is_given_out(text: str, stops: list[str], expected: str) -> None:
    stream = TextStream(byte_tokenizer(), stops)
    given = ""
    for token in text.encode():
        given += stream.push(token)
        assert expected.startswith(given)
    given += stream.close()
    assert given == expected
    assert stream.stopped == (given != text)
    assert not (stream.stopped and stream.push(1))


def test_a_long_stop_text_is_searched_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(tuple[int, ...]):
        looked_up = 0

        def __getitem__(self, place: Any) -> Any:
            Counted.looked_up += 1
            return super().__getitem__(place)

    fallbacks = text_stream._fallbacks
    monkeypatch.setattr(text_stream, "_fallbacks", lambda text: Counted(fallbacks(text)))
    stream = TextStream(byte_tokenizer(), ["a" * 500 + "b"])
    text = ("a" * 499 + "c") * 10
    given = "".join(stream.push(byte) for byte in text.encode())
    assert given == text
    assert Counted.looked_up <= len(text)  # each character is given back at most once
