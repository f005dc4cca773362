"""Tokenizers: exact round trips, isolated special tokens, byte counts."""

import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_data import Tokenizer, char_tokenizer, train_bpe
from tjx_data.corpora.documents import Stage
from tjx_data.tokenization import text_splitting
from tjx_data.tokenization.builders import byte_tokenizer
from tjx_data.tokenization.text_splitting import BATCH_CHARACTERS, split_at_token_boundaries

EOT = "<|endoftext|>"
WORDS = "the cat sat on the mat; the cat's hat sat on the bat. 12 12 été été\n\n  x = f(x)\n" * 20
BPE = train_bpe([WORDS], 280)
BYTES = byte_tokenizer()
PLACES = [
    "Hello world",
    f"a{EOT}b",
    "  double  spaces \t\r\n mixed\n\n\n ends ",
    "naïve 日本語 🙂 e\u0301 \x00 \u2028 \ufeff",
    "don't we'll 1234 x==y...",
]


@given(st.text())
@settings(max_examples=300)
def test_any_text_round_trips_and_its_bytes_are_counted(text: str) -> None:
    for tokenizer in (BPE, BYTES):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_byte_lengths[ids].sum() == len(text.encode("utf-8"))


# Random bytes are hardly ever UTF-8; these are partly valid, and cut at any byte.
MIXED = st.lists(st.binary(max_size=8) | st.text(max_size=8).map(str.encode)).map(b"".join)


@given(MIXED, st.integers(0, 3))
@settings(max_examples=300)
def test_any_bytes_round_trip(data: bytes, n_cut: int) -> None:
    data = data[n_cut:]
    for tokenizer in (BPE, BYTES):
        ids = tokenizer.encode_bytes(data)
        assert tokenizer.decode_bytes(ids) == data
        assert tokenizer.decode(ids) == data.decode("utf-8", errors="replace")
        assert tokenizer.token_byte_lengths[ids].sum() == len(data)
    assert BYTES.encode_bytes(data) == list(data)


def test_text_has_the_same_tokens_as_its_bytes() -> None:
    text = f"{WORDS}{EOT} 日本語"
    assert BPE.encode_bytes(text.encode()) == BPE.encode(text)
    # The text around an invalid byte keeps its tokens.
    assert BPE.encode_bytes(b"the cat\xff the") == [
        *BPE.encode("the cat"),
        *BPE.encode_bytes(b"\xff"),
        *BPE.encode(" the"),
    ]


def test_bytes_that_would_not_round_trip_are_rejected(tmp_path: Path) -> None:
    characters = char_tokenizer(["abc"])
    with pytest.raises(ValueError, match="expected a byte-level tokenizer"):
        characters.encode_bytes(b"abc")
    with pytest.raises(ValueError, match="expected a byte-level tokenizer"):
        characters.decode_bytes([0])
    BPE.save(tmp_path / "tokenizer.json")
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.normalizer = tokenizers.normalizers.Lowercase()
    normalizing = Tokenizer(inner)
    assert normalizing.decode_bytes(normalizing.encode_bytes(b"small")) == b"small"
    with pytest.raises(ValueError, match="got one that changes texts"):
        normalizing.encode_bytes(b"LARGE")


def test_unknown_ids_are_rejected() -> None:
    decoders: list[Callable[[Iterable[int]], object]] = [
        BPE.decode, BPE.decode_bytes, char_tokenizer(["abc"]).decode,
    ]  # fmt: skip
    for decode in decoders:
        for wrong in (280, -1, 2**32 + 1):
            with pytest.raises(ValueError, match=rf"ids: got \[{wrong}\]; .* from 0 to"):
                decode([0, wrong])
    # A vocabulary may skip ids.
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 2}, merges=[]))
    inner.decoder = tokenizers.decoders.Fuse()
    assert Tokenizer(inner).decode([2, 0]) == "ba"
    assert Tokenizer(inner).token_byte_lengths.tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match=r"ids: got \[1\]"):
        Tokenizer(inner).decode([1])


def test_ids_of_bytes_are_their_values_and_special_tokens_follow() -> None:
    assert BYTES.encode("hé") == [104, 0xC3, 0xA9]
    assert BYTES.special_tokens == {EOT: 256}
    assert BYTES.eot_id == 256
    assert BYTES.vocab_size == 257
    assert byte_tokenizer([]).vocab_size == 256
    assert byte_tokenizer([EOT, "<é>"]).decode([256, 257, 104]) == f"{EOT}<é>h"
    assert BYTES.always_splits_before_space
    assert BYTES.encode(EOT + WORDS * 30) == list((EOT + WORDS * 30).encode())


def test_encode_iterable_gives_the_ids_of_each_text_alone(tmp_path: Path) -> None:
    BPE.save(tmp_path / "tokenizer.json")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = ["", "a", WORDS, WORDS * 40, "", "x" * 50_000, *PLACES[2:], "last"]
    expected = [library.encode(text).ids for text in texts]
    assert len(list(split_at_token_boundaries(WORDS * 40))) > 1
    assert list(BPE.encode_iterable(text for text in texts)) == expected
    assert BPE.encode_batch(texts) == expected
    assert list(BPE.encode_iterable([])) == []


def test_an_endless_stream_is_encoded_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_splitting, "available_cpus", lambda: 3)
    n_read = 0

    def endless(text: str) -> Iterator[str]:
        nonlocal n_read
        while True:
            n_read += 1
            yield text

    for text in ("the cat " * 1000, ""):
        n_read = 0
        encoded = BYTES.encode_iterable(endless(text))
        for _ in range(100):
            assert len(next(encoded)) == len(text)
        # A batch for each core, and the one in use.
        assert n_read <= 100 + 4 * (1 + BATCH_CHARACTERS // max(len(text), 64))


@given(st.text(min_size=1), st.data())
def test_known_characters_round_trip(text: str, data: st.DataObject) -> None:
    tokenizer = char_tokenizer([text, text[::-1]])
    other = data.draw(st.text(st.sampled_from(sorted(set(text)))))
    ids = tokenizer.encode(other)
    assert len(ids) == len(other)
    assert tokenizer.decode(ids) == other
    assert tokenizer.token_byte_lengths[ids].sum() == len(other.encode("utf-8"))


def test_characters_have_nanogpt_ids_and_unknown_ones_are_named() -> None:
    tokenizer = char_tokenizer(["ba", "dc"], special_tokens=(EOT,))
    assert tokenizer.encode("abcd") == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"got the characters 'é' \(U\+00E9\), '🙂' \(U\+1F642\);"):
        tokenizer.encode("aéb🙂é")
    # The name of a special token is text, here of unknown characters.
    with pytest.raises(ValueError, match="'<'"):
        tokenizer.encode_batch(["abcd", "<unk>"])
    with pytest.raises(ValueError, match="'é'"):
        tokenizer.encode("é", allowed_special=[EOT])
    assert tokenizer.encode(f"a{EOT}", allowed_special=[EOT]) == [0, 5]
    assert tokenizer.special_tokens["<unk>"] == 4
    assert tokenizer.eot_id == 5
    assert tokenizer.vocab_size == 6


def test_empty_prompt_is_a_newline_or_the_first_token() -> None:
    assert char_tokenizer(["ab"]).encode_prompt("") == [0]
    lines = char_tokenizer(["a\t\nb"])
    assert lines.encode_prompt("") == lines.encode("\n") == [1]


def test_prompts_start_with_end_of_text_here_and_in_other_libraries(tmp_path: Path) -> None:
    byte = byte_tokenizer()
    assert byte.encode_prompt("ab") == [byte.eot_id, 97, 98]
    assert byte.encode_prompt("") == [byte.eot_id]
    assert char_tokenizer(["a\n"]).encode_prompt("") == [0]
    byte.save(tmp_path / "tokenizer.json", begins_prompts=True)
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert other.encode("ab").ids == byte.encode_prompt("ab")
    again = Tokenizer.load(tmp_path)
    assert again.encode("ab") == [97, 98]
    assert again.fingerprint == byte.fingerprint
    again.save(tmp_path / "twice.json", begins_prompts=True)
    assert (tmp_path / "twice.json").read_text() == (tmp_path / "tokenizer.json").read_text()


def test_special_tokens_in_text_are_text_unless_allowed() -> None:
    text = f"one{EOT}two"
    assert BPE.eot_id == 0
    assert BPE.eot_id not in BPE.encode(text)
    assert BPE.decode(BPE.encode(text)) == text
    allowed = BPE.encode(text, allowed_special=[EOT])
    assert allowed == [*BPE.encode("one"), 0, *BPE.encode("two")]
    assert BPE.decode(allowed) == text
    assert BPE.encode_batch([text, "two"]) == [BPE.encode(text), BPE.encode("two")]
    with pytest.raises(ValueError, match=r"did you mean <\|endoftext\|>"):
        BPE.encode(text, allowed_special=["<|endoftex|>"])


def test_lone_surrogate_is_rejected() -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        BPE.encode("a\ud800b")
    with pytest.raises(ValueError, match="lone surrogate"):
        train_bpe(["the cat", "a\ud800b"], 257)
    with pytest.raises(ValueError, match="lone surrogate"):
        char_tokenizer(["a\ud800b"])


def test_saving_and_loading_changes_nothing(tmp_path: Path) -> None:
    for tokenizer in (BPE, BYTES, char_tokenizer([WORDS + EOT], special_tokens=(EOT,))):
        tokenizer.save(tmp_path / "tokenizer.json")
        for place in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
            loaded = Tokenizer.load(place)
            assert loaded.fingerprint == tokenizer.fingerprint
            assert loaded.eot_id == tokenizer.eot_id
            assert loaded.vocab_size == tokenizer.vocab_size
            assert loaded.encode(WORDS + EOT) == tokenizer.encode(WORDS + EOT)
            np.testing.assert_array_equal(loaded.token_byte_lengths, tokenizer.token_byte_lengths)


def test_another_process_gets_the_same_tokenizer() -> None:
    for tokenizer in (BPE, BYTES, char_tokenizer([WORDS + EOT], special_tokens=(EOT,))):
        copy = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301  our own
        assert copy.fingerprint == tokenizer.fingerprint
        assert copy.encode(f"the{EOT}cat") == tokenizer.encode(f"the{EOT}cat")
        assert copy.eot_id not in copy.encode(EOT)


def test_special_tokens_are_never_text() -> None:
    """A special token equal to a text token would be produced by ordinary text."""
    makers: list[Callable[[list[str]], Tokenizer]] = [
        lambda names: train_bpe([WORDS], 280, names),
        byte_tokenizer,
        lambda names: char_tokenizer([WORDS], names),
    ]
    for make in makers:
        with pytest.raises(ValueError, match=r"'a', which is also a token of text.*'<\|a\|>'"):
            make(["a"])
        with pytest.raises(ValueError, match=r"got ''; expected a name[^\0]*'<x>' 2 times"):
            make(["<x>", "", "<x>"])
        assert make(["<x>"]).decode(make(["<x>"]).encode("<x>", ["<x>"])) == "<x>"
    with pytest.raises(ValueError, match="'at', which is also a token of text"):
        makers[0](["at"])
    with pytest.raises(ValueError, match="'<unk>' 2 times"):
        char_tokenizer(["abc"], ["<unk>"])


def _words(tokenizer: Tokenizer, text: str) -> str:
    """Mark each token that starts a word with a bar, each continuation with a dot."""
    marks = {True: "|", False: "·"}
    return "".join(
        marks[bool(tokenizer.starts_word[i])] + tokenizer.decode([i])
        for i in tokenizer.encode(text, tokenizer.special_tokens)
    )


def test_continuation_tokens_start_no_word() -> None:
    assert _words(BPE, "the hats, sat") == "·the| ·hat·s|,| sat"
    assert _words(BPE, f"a\n\nb{EOT}") == f"·a|\n|\n·b|{EOT}"
    characters = char_tokenizer(["ab é日本कि7,.\n_"], [EOT])
    assert _words(characters, f"ab éa7, b.\na_{EOT}") == f"·a·b| ·é·a·7|,| ·b|.|\n·a|_|{EOT}"
    assert _words(characters, "कि日本") == "·क·ि|日|本"
    assert _words(BYTES, "a b") == "·a| ·b"
    # Of an incomplete character only the first token may start a word: here "é", "日", "🙂".
    starts = {text: BYTES.starts_word[list(text.encode())].tolist() for text in "é日🙂"}
    assert starts == {"é": [0, 0], "日": [1, 0, 0], "🙂": [0, 0, 0, 0]}
    # A special token is a word, whatever its name.
    named = byte_tokenizer(["mask"])
    assert named.starts_word[256]
    assert named.token_byte_lengths[255:].tolist() == [1, 0]
    with pytest.raises(ValueError, match="read-only"):
        BPE.starts_word[0] = False


def test_word_piece_vocabulary_marks_continuations() -> None:
    vocabulary = {"[UNK]": 0, "play": 1, "##ing": 2, "##": 3}
    model = tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]")  # noqa: S106  not a secret
    inner = tokenizers.Tokenizer(model)
    inner.decoder = tokenizers.decoders.WordPiece()
    assert Tokenizer(inner).starts_word.tolist() == [True, True, False, False]


def test_truncation_and_padding_in_a_file_do_not_change_documents(tmp_path: Path) -> None:
    BPE.save(tmp_path / "tokenizer.json")
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.enable_truncation(3)
    inner.enable_padding(length=2)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode_batch([WORDS, "a"]) == BPE.encode_batch([WORDS, "a"])


def test_invalid_tokenizer_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer here"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="no such file or folder"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_byte_lengths_need_a_byte_or_character_tokenizer() -> None:
    word_piece = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0}, unk_token="a"))  # noqa: S106  not a secret
    word_piece.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(ValueError, match="expected a byte-level, character"):
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
@settings(max_examples=300)
def test_segments_have_the_tokens_of_the_whole_text(parts: list[str], size: int) -> None:
    text = "".join(parts)
    pieces = list(split_at_token_boundaries(text, size))
    assert "".join(pieces) == text
    assert [i for ids in BPE.encode_batch(pieces) for i in ids] == BPE.encode(text)


def test_bpe_depends_on_the_documents_only() -> None:
    documents = [WORDS[i : i + 80] for i in range(0, len(WORDS), 80)]
    expected = train_bpe(documents, 275).fingerprint
    assert train_bpe(iter(documents), 275).fingerprint == expected
    assert train_bpe(documents[::-1], 275).fingerprint == expected
    # A document longer than a segment is not split inside a word.
    long = WORDS * 100
    assert len(list(split_at_token_boundaries(long))) > 1
    inner = tokenizers.ByteLevelBPETokenizer()
    inner.train_from_iterator([long], 280, show_progress=False, special_tokens=[EOT])
    assert train_bpe([long], 280).encode(WORDS) == inner.encode(WORDS).ids


def test_bpe_is_independent_of_the_number_of_threads() -> None:
    code = (
        "from tjx_data import train_bpe\n"
        "texts = [f'{n % 97} apples and {n % 89} pears cost {n}\\n' for n in range(3000)]\n"
        "print(train_bpe(texts, 400).fingerprint)"
    )
    prints = set()
    for n_threads in ("1", "2", "5"):
        environment = {**os.environ, "RAYON_NUM_THREADS": n_threads}
        ran = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, check=True
        )
        prints.add(ran.stdout.strip())
    assert len(prints) == 1


@pytest.mark.parametrize(
    "train", [lambda texts: train_bpe(texts, 270), char_tokenizer], ids=["bpe", "characters"]
)
def test_corpus_is_streamed_through_memory(
    train: Callable[[Iterable[str]], Tokenizer],
) -> None:
    tracemalloc.start()
    train(f"{WORDS} {n}" for n in range(2000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 2000 * len(WORDS) > 3_000_000
    assert peak < 500_000


def test_training_reports_progress() -> None:
    stages: list[Stage] = []
    train_bpe(["the cat", " the été"], 257, progress=stages.append)
    assert stages == [Stage("train tokenizer", 7), Stage("train tokenizer", 17)]


def test_unreachable_vocab_size_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"vocab_size: got 256; expected at least 257"):
        train_bpe([WORDS], 256)
    with pytest.raises(ValueError, match=r"vocab_size: got 5000; expected at most (\d+)"):
        train_bpe([WORDS], 5000)
    assert train_bpe(["the the"], 257).vocab_size == 257


@pytest.mark.skipif("TJX_TEST_DATA" not in os.environ, reason="TJX_TEST_DATA is not set")
def test_gpt2_ids_match_the_published_counts() -> None:
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
