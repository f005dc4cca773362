"""Losses of texts: equal to NumPy's for any batch size, with exact byte counts."""

import csv
import functools
import io
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from eval_tiny_run import as_transformers, tiny_run

import tjx_nn
import tjx_parallel
from tjx_data import byte_tokenizer, char_tokenizer
from tjx_eval.load_model import TrainedModel, load_model
from tjx_eval.main import main
from tjx_eval.scoring.bootstrap import estimate_mean
from tjx_eval.scoring.comparison import compare
from tjx_eval.scoring.encoding import encode
from tjx_eval.scoring.eval_data import Document
from tjx_eval.scoring.score import score_tokens
from tjx_eval.scoring.text_loss import TextLoss, WindowConfig, measure_text_loss
from tjx_nn import GPTConfig
from tjx_parallel.config import MeshConfig

TEXTS = ["3 sheep and more\n", "12 sheep", "\n".join(f"{n} sheep and more more" for n in range(9))]


@pytest.fixture(scope="module")
def model() -> TrainedModel:
    return load_model(tiny_run())


@pytest.fixture(scope="module")
def of_bytes() -> TrainedModel:
    """An untrained model whose tokens are bytes and the end-of-text token."""
    tokenizer = byte_tokenizer()
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size, max_seq_len=16, n_layer=1, n_head=2, d_model=16,
        init_std=1.0,
    )  # fmt: skip
    mesh = tjx_parallel.make_mesh(MeshConfig())
    with jax.transfer_guard("allow"):
        params = jax.jit(tjx_nn.init, static_argnums=0)(config, jax.random.key(0))
        spec: Any = jax.sharding.PartitionSpec  # JAX gives no types
        params = jax.device_put(params, jax.sharding.NamedSharding(mesh, spec()))
    return TrainedModel(Path("bytes"), config, params, mesh, tokenizer)


def measured(model: TrainedModel, texts: list[str], *, per_document: bool = True) -> TextLoss:
    documents = (Document(f"text {n}", text) for n, text in enumerate(texts))
    encoded = encode(documents, model.tokenizer)
    return measure_text_loss(model, encoded, WindowConfig(16, 16), per_document=per_document)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config: GPTConfig, params: Any, tokens: jax.Array) -> jax.Array:
    return tjx_nn.bind(config, params)(tokens)


def reference(model: TrainedModel, sequence: np.ndarray, window: int, stride: int) -> np.ndarray:
    """Losses as Hugging Face's guide to perplexity computes them, in float64."""
    params = jax.device_get(model.params)
    losses = np.full(len(sequence) - 1, np.nan)
    end_before = 0
    for begin in range(0, len(sequence) - 1, stride):
        end = min(begin + window, len(sequence) - 1)
        padded = np.zeros((1, window), np.int32)
        padded[0, : end - begin] = sequence[begin:end]
        logits = np.asarray(
            jax.device_get(logits_of(model.gpt, *jax.device_put((params, padded)))), np.float64
        )[0]
        chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for place in range(end_before, end):
            assert np.isnan(losses[place]), "each token is scored once"
            assert place - begin >= min(window - stride, place), "with at least this much context"
            losses[place] = -chances[place - begin, sequence[place + 1]]
        end_before = end
        if end == len(sequence) - 1:
            break
    return losses


@pytest.mark.parametrize("stride", [16, 5, 1])
def test_losses_are_numpys_for_any_stride_and_batch(model: TrainedModel, stride: int) -> None:
    tokens = np.asarray(model.tokenizer.encode("".join(TEXTS)[:70]), np.int32)
    sequences = [tokens, tokens[:9], tokens[20:37]]
    expected = [reference(model, sequence, 16, stride) for sequence in sequences]
    found = [
        score_tokens(model, sequences, window=16, stride=stride, batch_size=rows)
        for rows in (1, 20)
    ]
    for scores in found:
        for own, right in zip(scores.losses, expected, strict=True):
            np.testing.assert_allclose(own, right, rtol=2e-5)
        assert scores.correct == found[0].correct
    assert 0 < found[0].correct[1] < found[0].correct[5] < found[0].correct[10]


def test_chunked_logits_give_the_same_losses(
    model: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = [np.asarray(model.tokenizer.encode(TEXTS[2]), np.int32)]
    whole = score_tokens(model, sequence, window=16, stride=16, batch_size=8)
    monkeypatch.setattr("tjx_eval.scoring.score._MAX_LOGITS", 5 * model.gpt.vocab_rows)
    pieces = score_tokens(model, sequence, window=16, stride=16, batch_size=8)
    np.testing.assert_allclose(pieces.losses[0], whole.losses[0], rtol=1e-5)
    assert pieces.correct == whole.correct


def test_bytes_are_counted_for_tokens_that_split_characters(of_bytes: TrainedModel) -> None:
    text = "naïve 数据 🐑 and the last of it\n"
    found = measured(of_bytes, [text])
    metrics = found.metrics()
    n_bytes = len(text.encode())
    assert metrics["text_bytes"] == metrics["tokens"] == n_bytes > len(text)
    nats = float(np.concatenate(found.tokens.losses).astype(np.float64).sum())
    assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes)
    assert metrics["word_perplexity"] == pytest.approx(math.exp(nats / 8))
    # The first byte is predicted from the end-of-text token.
    eot = of_bytes.tokenizer.eot_id
    sequence = np.array([eot, *text.encode()], np.int32)
    np.testing.assert_allclose(
        found.tokens.losses[0], reference(of_bytes, sequence, 16, 16), rtol=1e-4
    )
    # Truncation does not split a character.
    documents = iter([Document("text", text)])
    (cut,) = encode(documents, of_bytes.tokenizer, max_tokens=3)
    assert (cut.document.text, len(cut.tokens)) == ("na", 2)


def test_documents_are_concatenated_or_scored_separately(of_bytes: TrainedModel) -> None:
    alone = measured(of_bytes, TEXTS)
    for number, text in enumerate(TEXTS):
        own = measured(of_bytes, [text]).sums.total()
        assert alone.sums.loss_sums[number] == pytest.approx(own.loss_sum, rel=1e-6)
        assert alone.sums.text_bytes[number] == own.text_bytes == len(text)
    together = measured(of_bytes, TEXTS, per_document=False)
    # The two end-of-text tokens between three texts are predicted too, and have no bytes.
    assert together.sums.total().tokens == alone.sums.total().tokens + 2
    assert together.sums.total().text_bytes == alone.sums.total().text_bytes
    assert together.sums.tokens.tolist() == [len(TEXTS[0]) + 1, len(TEXTS[1]) + 1, len(TEXTS[2])]
    eot = of_bytes.tokenizer.eot_id
    sequence = np.array([
        token for text in TEXTS for token in (eot, *text.encode())
    ], np.int32)  # fmt: skip
    expected = reference(of_bytes, sequence, 16, 16)
    np.testing.assert_allclose(together.tokens.losses[0], expected, rtol=1e-4)


def test_validation_text_is_scored_as_in_training(tmp_path: Path) -> None:
    found = []
    int8 = ["--quantization", "int8"]
    for words in ([], ["--window", "16"], ["--window", "16", "--stride", "4"], int8):
        assert main(["loss", str(tiny_run()), "--json", str(tmp_path / "a.json"), *words]) == 0
        found.append(json.loads((tmp_path / "a.json").read_text()))
    training, windows, overlapping, quantized = found
    for name in ("loss", "bits_per_byte", "tokens", "text_bytes", "top5_accuracy"):
        assert windows[name] == pytest.approx(training[name], rel=1e-6)
    assert overlapping["tokens"] == training["tokens"]
    assert overlapping["loss"] != pytest.approx(training["loss"], rel=1e-4)
    assert quantized["loss"] == pytest.approx(training["loss"], rel=1e-2)
    assert quantized["loss"] != training["loss"]


def test_a_table_of_documents_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    words = [f"--data={tmp_path}/*.txt", "--per_document", "--window=16"]
    out = [f"--json={tmp_path}/a.json", f"--csv={tmp_path}/a.csv"]
    assert main(["loss", str(tiny_run()), *words, *out]) == 0
    assert "12 sheep" in capsys.readouterr().out
    found = json.loads((tmp_path / "a.json").read_text())
    rows = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text())))
    assert [row["document"] for row in rows] == ["0.txt 1", "1.txt 1", "2.txt 1"]
    # Without an end-of-text token, the first character has no context and is not scored.
    assert [int(row["tokens"]) for row in rows] == [len(text) - 1 for text in TEXTS]
    total = sum(row["loss"] * row["tokens"] for row in found["table"])
    assert total / found["tokens"] == pytest.approx(found["loss"])


def test_an_estimated_mean_has_the_expected_standard_error() -> None:
    rng = np.random.default_rng(0)
    differences, sizes = rng.normal(0.5, 2, 400), np.full(400, 10)
    found = estimate_mean(differences, sizes)
    assert found is not None
    expected = differences.std(ddof=1) / np.sqrt(400) / 10
    assert found.mean == pytest.approx(differences.mean() / 10)
    assert found.standard_error == pytest.approx(expected)
    assert found.low == pytest.approx(found.mean - 1.96 * expected, abs=0.1 * expected)
    assert found.high == pytest.approx(found.mean + 1.96 * expected, abs=0.1 * expected)
    # Differences proportional to the sizes have no variance.
    sizes = rng.integers(1, 100, 30)
    exact = estimate_mean(np.asarray(0.25 * sizes, np.float64), sizes)
    assert exact is not None
    assert exact.standard_error == pytest.approx(0, abs=1e-12)
    assert estimate_mean(differences[:1], sizes[:1]) is None


def test_two_checkpoints_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    run, words = str(tiny_run()), [f"--data={tmp_path}/*.txt", "--window=16"]
    out = [f"--json={tmp_path}/a.json", f"--plot={tmp_path}/a.png"]
    assert main(["compare", run, run, "--step_a=2", *words, *out]) == 0
    assert "(step 2)" in capsys.readouterr().out
    found = json.loads((tmp_path / "a.json").read_text())
    losses = []
    for step in ("2", "4"):
        more = ["--per_document", f"--step={step}", f"--json={tmp_path}/b.json"]
        assert main(["loss", run, *words, *more]) == 0
        losses.append(json.loads((tmp_path / "b.json").read_text()))
    assert found["difference"] == pytest.approx(losses[1]["loss"] - losses[0]["loss"])
    assert found["low_95"] <= found["difference"] <= found["high_95"]
    for row in found["table"]:
        a, b = (
            next(each["loss"] for each in loss["table"] if each["document"] == row["document"])
            for loss in losses
        )
        assert (row["a"], row["b"]) == pytest.approx((a, b))
    apart = [abs(row["difference"]) for row in found["table"]]
    assert apart == sorted(apart, reverse=True)
    texts = {f"{number}.txt 1": text for number, text in enumerate(TEXTS)}
    for row in found["tokens"]:
        assert row["context"] + row["token"] in texts[row["document"]]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_models_with_different_tokenizers_are_compared_by_bytes(
    model: TrainedModel, of_bytes: TrainedModel, tmp_path: Path
) -> None:
    other = as_transformers(tiny_run(), tmp_path / "model")
    # Another character, which the texts do not have, changes all token ids.
    char_tokenizer(["0123456~89 sheepandmor\n"]).save(other / "tokenizer.json")
    pair = [measured(each, TEXTS[:2]) for each in (model, load_model(other))]
    found = compare(*pair, same_tokenizer=False)
    assert found.unit == "bits per byte"
    bits = [each.sums.total().loss_sum / math.log(2) for each in pair]
    assert found.difference is not None
    n_bytes = sum(len(text) - 1 for text in TEXTS[:2])
    assert found.difference.mean == pytest.approx((bits[1] - bits[0]) / n_bytes)
    with pytest.raises(ValueError, match="did not score the same bytes"):
        compare(pair[0], measured(of_bytes, TEXTS[:2]), same_tokenizer=False)


def test_attention_is_plotted_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "seen"
    words: list[Any] = ["attention", str(tiny_run()), "--prompt", "12 sheep and", "--out", str(out)]
    assert main(words) == 0
    kept = np.load(out / "attention.npz")
    assert kept["weights"].shape == (2, 2, 12, 12)
    np.testing.assert_allclose(kept["weights"].sum(-1), 1, atol=1e-6)
    assert "".join(kept["pieces"]) == "12 sheep and"
    assert kept["distances"].sum(-1) == pytest.approx(1)
    for name in ("attention_maps.png", "attention_distances.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main([*words[:3], "12 sheep and more more"]) == 2
    assert "the text has 22 tokens; the model's max_seq_len is 16" in capsys.readouterr().err
    assert main(words[:2]) == 2
    assert "give either --prompt TEXT or --file FILE" in capsys.readouterr().err
