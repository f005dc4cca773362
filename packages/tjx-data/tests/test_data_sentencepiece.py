"""SentencePiece models give the ids of SentencePiece, and tokens their bytes."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders

from tjx_data import Tokenizer

# Made by tools/golden/make_sentencepiece_golden.py.
GOLDEN = json.loads((Path(__file__).parent / "golden" / "sentencepiece.json").read_text())
MODELS: dict[str, Any] = GOLDEN["models"]


def load(name: str, folder: Path) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(base64.b64decode(MODELS[name]["model"]))
    return Tokenizer.load(folder)


@pytest.mark.parametrize("name", MODELS)
def test_ids_and_texts_are_those_of_sentencepiece(name: str, tmp_path: Path) -> None:
    tokenizer = load(name, tmp_path)
    assert set(MODELS[name]["control"]) < set(tokenizer.special_tokens.values())
    for text, ids, decoded in zip(
        GOLDEN["texts"], MODELS[name]["ids"], MODELS[name]["decoded"], strict=True
    ):
        if "<0x41>" not in text or name != "unigram_bytes":
            assert (text, tokenizer.encode(text)) == (text, ids)
        assert (text, tokenizer.decode(ids)) == (text, decoded.replace(" \u2047 ", "<unk>"))


@pytest.mark.parametrize("name", MODELS)
def test_names_of_special_tokens_in_a_text_are_ordinary_text(name: str, tmp_path: Path) -> None:
    tokenizer = load(name, tmp_path)
    control = set(MODELS[name]["control"])
    for special in tokenizer.special_tokens:
        assert not control & set(tokenizer.encode(f"a{special} b {special}"))
    end = tokenizer.special_tokens["</s>"]
    assert tokenizer.encode("a</s>b", allowed_special=["</s>"]).count(end) == 1
    assert tokenizer.eot_id == end
    # Of a copy as tokenizer.json, too.
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert [again.encode(text) for text in GOLDEN["texts"]] == [
        tokenizer.encode(text) for text in GOLDEN["texts"]
    ]
    assert again.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("name", ["bpe_bytes", "bpe_user_defined", "unigram_bytes"])
def test_bytes_of_tokens_are_those_of_the_text(name: str, tmp_path: Path) -> None:
    tokenizer = load(name, tmp_path)
    added = 0 if name == "bpe_user_defined" else 1  # the space before each text
    for text, ids in zip(MODELS[name]["decoded"], MODELS[name]["ids"], strict=True):
        n_bytes = int(tokenizer.token_byte_lengths[ids].sum())
        assert (text, n_bytes) == (text, len(text.encode()) + (added if ids else 0))


def test_metaspace_tokens_count_a_space_as_one_byte() -> None:
    # The decoders of the tokenizer.json of T5 and of Llama 2.
    vocabulary = {"\u2581the": 0, "\u2581": 1, "<0x0A>": 2, "e": 3}
    for decoder in (
        decoders.Metaspace(),
        decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        ),
    ):
        inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
        inner.decoder = decoder
        n_bytes = Tokenizer(inner).token_byte_lengths.tolist()
        assert n_bytes == [4, 1, 6 if isinstance(decoder, decoders.Metaspace) else 1, 1]
    inner.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match=r"decodes with .*WordPiece.*; expected a byte-level"):
        _ = Tokenizer(inner).token_byte_lengths


def test_damaged_models_are_named(tmp_path: Path) -> None:
    file = tmp_path / "spiece.model"
    whole = base64.b64decode(MODELS["bpe_bytes"]["model"])
    for data, reason in (
        (b"", "0 unknown pieces"),
        (whole[: len(whole) // 2], "truncated|unknown pieces"),
        (b"{}", "unknown type"),
        (b"\xff" * 20, "too many bytes"),
        (b"\x08\x01", "is a number"),
        (whole.replace(b"\x18\x02", b"\x18\x03"), "."),
        (whole + b"\x1a\x06\x12\x04\x00\x00\x80\xc0", "character map is truncated"),
    ):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=f"spiece.model: not a SentencePiece model.*{reason}"):
            Tokenizer.load(file)
