"""Golden ids: GPT-2's tokenizer equals tiktoken on text files and difficult strings.

`tools/golden/make_tiktoken_golden.py` wrote the golden file; the vocabulary and the texts lie where
TJX_TEST_DATA says.
"""

import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_data import Tokenizer
from tjx_data.tokenization.tokenizer import Backend

DATA = Path(os.environ.get("TJX_TEST_DATA", "."))
GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parent / "golden" / "tiktoken_gpt2.json").read_text(encoding="utf-8")
)
pytestmark = pytest.mark.skipif(
    "TJX_TEST_DATA" not in os.environ, reason="TJX_TEST_DATA is not set"
)


@cache
def _gpt2(backend: Backend = "auto") -> Tokenizer:
    return Tokenizer.load(DATA / "gpt2").with_backend(backend)


@pytest.mark.parametrize("most_tokens", [200_000, pytest.param(2**31, marks=pytest.mark.slow)])
def test_every_file_has_tiktokens_ids(most_tokens: int) -> None:
    assert {file.relative_to(DATA).as_posix() for file in DATA.rglob("*.txt")} == set(
        GOLDEN["files"]
    )
    assert sum(name.startswith("udhr/") for name in GOLDEN["files"]) == 26
    files = {
        name: expected
        for name, expected in GOLDEN["files"].items()
        if expected["n_tokens"] <= most_tokens
    }
    texts = []
    for name, expected in files.items():
        content = (DATA / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == expected["file_sha256"], f"another {name}"
        texts.append(content.decode("utf-8"))
    encoded = _gpt2().encode_iterable(texts)
    for text, ids, (name, expected) in zip(texts, encoded, files.items(), strict=True):
        assert len(ids) == expected["n_tokens"], name
        digest = hashlib.sha256(np.array(ids, "<u4").tobytes()).hexdigest()
        assert digest == expected["ids_sha256"], name
        assert _gpt2().decode(ids) == text
        assert _gpt2().token_byte_lengths[ids].sum() == len(text.encode("utf-8"))


@pytest.mark.parametrize("string", GOLDEN["strings"], ids=lambda string: ascii(string["text"])[:30])
def test_hard_strings_have_tiktokens_ids(string: dict[str, Any]) -> None:
    text, ids = string["text"], string["ids"]
    assert _gpt2().encode(text) == ids
    assert _gpt2("tokenizers").encode(text) == ids
    assert _gpt2().encode_bytes(text.encode("utf-8")) == ids
    assert _gpt2().decode(ids) == text


@given(st.lists(st.binary(max_size=8) | st.text(max_size=8).map(str.encode)).map(b"".join))
@settings(max_examples=100)
def test_golden_vocabulary_round_trips_any_bytes(data: bytes) -> None:
    assert _gpt2().decode_bytes(_gpt2().encode_bytes(data)) == data


def test_golden_vocabulary_survives_saving(tmp_path: Path) -> None:
    _gpt2().save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == _gpt2().fingerprint
    assert loaded.encode(GOLDEN["strings"][12]["text"]) == GOLDEN["strings"][12]["ids"]
