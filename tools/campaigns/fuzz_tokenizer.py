"""Fuzzing of tokenizer.json files and SentencePiece models."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from campaigns.fuzz_kind import Kind
from campaigns.fuzz_mutations import draws, mutate_bytes, mutate_tree, render, spoil_file

from tjx_data import Tokenizer, byte_tokenizer, char_tokenizer, train_bpe

_TEXT = "The quick brown fox, 1234 times!\n\nÜber \U0001f600 <|endoftext|> \x00 end" * 3
LARGEST_VOCABULARY = 1 << 22


def _word_piece() -> dict[str, Any]:
    vocabulary = ["[UNK]", "[CLS]", "[SEP]", "the", "quick", "##ly", "fox", "a", "##b", ","]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": {
            "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
            "strip_accents": None, "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {token: i for i, token in enumerate(vocabulary)},
        },
    }  # fmt: skip


def _unigram() -> dict[str, Any]:
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": {"type": "NFKC"},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        "post_processor": None,
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        "model": {
            "type": "Unigram", "unk_id": 0, "byte_fallback": False,
            "vocab": [["<unk>", 0.0], ["▁the", -2.0], ["▁", -3.0], ["f", -4.0], ["ox", -4.5]],
        },
    }  # fmt: skip


def _sentence_piece(model_type: int) -> bytes:
    """Return a model of Protocol Buffers fields: pieces, then the specification of the trainer."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    pieces = [("<unk>", 2), ("</s>", 3), ("<x>", 4), ("<0x0A>", 6)]
    pieces += [(text, 1) for text in ("▁", "t", "h", "e", "he", "the", "▁the", "f", "o", "x")]
    model = b"".join(
        field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", -i) + bytes([0x18, kind]))
        for i, (text, kind) in enumerate(pieces)
    )
    return model + field(2, bytes([0x18, model_type])) + field(3, field(1, b"identity"))


class TokenizerFile(Kind):
    """Fuzz kind: an untrusted tokenizer.json or tokenizer.model."""

    name = "tokenizer"

    def prepare(self, scratch: Path) -> None:
        """Create a tokenizer of each kind."""
        texts = ["the cat and the hat and the bat, then the cat again; " * 3, "<>|"]
        made = [
            byte_tokenizer(),
            char_tokenizer([_TEXT], ("<|endoftext|>",)),
            train_bpe(texts, 268),
        ]
        self._models = [_sentence_piece(model_type) for model_type in (1, 2)]
        self._trees = [_word_piece(), _unigram()]
        for tokenizer in made:
            tokenizer.save(scratch / "made.json")
            self._trees.append(json.loads((scratch / "made.json").read_text()))

    def build(self, steps: Sequence[Random], folder: Path) -> None:
        """Write a tokenizer and mutate its tree or bytes."""
        if steps and steps[0].random() < 0.2:
            model = steps[0].choice(self._models)
            for step in steps[1:]:
                model = mutate_bytes(model, step)
            (folder / "tokenizer.model").write_bytes(model)
            return
        file = folder / "tokenizer.json"
        tree: Any = self._trees[-1]
        if steps:
            tree = steps[0].choice(self._trees)
        data: bytes | None = None
        for step in steps:
            if data is None and step.random() < 0.85:
                tree = mutate_tree(tree, step)
            else:
                data = mutate_bytes(render(tree, step) if data is None else data, step)
                if step.random() < 0.1:
                    spoil_file(file, step)
                    return
        file.write_bytes(
            render(tree, steps[-1] if steps else draws("sound")) if data is None else data
        )

    def check(self, folder: Path) -> None:
        """Load the tokenizer, encode and decode, and compute the tables for training."""
        tokenizer = Tokenizer.load(folder)
        assert 0 < tokenizer.vocab_size <= LARGEST_VOCABULARY
        assert len(tokenizer.fingerprint) == 64
        for name in ("token_byte_lengths", "starts_word"):
            try:
                table = getattr(tokenizer, name)
            except ValueError as error:  # kinds without this table
                self._expect_ours(error)
            else:
                assert len(table) <= tokenizer.vocab_size
        try:
            ids = tokenizer.encode(_TEXT)
            assert all(0 <= token < tokenizer.vocab_size for token in ids)
            assert isinstance(tokenizer.decode(ids), str)
        except ValueError as error:
            self._expect_ours(error)
        assert tokenizer.always_splits_before_space in (True, False)
        assert tokenizer.eot_id is None or tokenizer.eot_id < tokenizer.vocab_size

    def _expect_ours(self, error: ValueError) -> None:
        assert "token" in str(error) or "text" in str(error), str(error)
