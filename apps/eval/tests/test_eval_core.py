"""CORE on a synthetic bundle: every type of task against NumPy, aggregation, and bad bundles."""

import json
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from eval_tiny_run import tiny_run

import tjx_nn
import tjx_parallel
from tjx_core import ConfigError
from tjx_data import byte_tokenizer
from tjx_eval.load_model import TrainedModel
from tjx_eval.main import main
from tjx_eval.scoring.continuations import ContinuationScorer
from tjx_eval.scoring.core import make_pairs, score_task
from tjx_eval.scoring.core_bundle import CoreTask, Example, read_bundle
from tjx_nn import GPTConfig, hf
from tjx_parallel.config import MeshConfig

WORDS = ["sheep", "and", "more", "no more", "one", "sheep and more", "a", "m"]
LENGTH = 48


def records(kind: str, count: int = 12) -> list[dict[str, Any]]:
    rng = np.random.default_rng(len(kind))

    def text() -> str:
        return " ".join(rng.choice(WORDS, rng.integers(1, 4)))

    def different(number: int) -> list[str]:
        return [f"{text()} {'aemno'[i]}" for i in range(number)]

    made: list[dict[str, Any]] = []
    for _ in range(count):
        number = int(rng.integers(2, 4))
        gold = int(rng.integers(number))
        by_kind: dict[str, dict[str, Any]] = {
            "multiple_choice": {"query": text(), "choices": different(number), "gold": gold},
            "schema": {
                "context_options": different(number), "continuation": text(), "gold": gold,
            },
            # Trailing spaces, as some data have them. The model likes to repeat a letter.
            "language_modeling": {
                "context": (context := text()) + "  ",
                "continuation": context[-1] * int(rng.integers(1, 4)),
            },
        }  # fmt: skip
        made.append(by_kind[kind])
    return made


KINDS = ("multiple_choice", "schema", "language_modeling")
SHOTS = {"multiple_choice": 0, "schema": 1, "language_modeling": 2}
BASELINES = {"multiple_choice": 40.0, "schema": 50.0, "language_modeling": 0.0}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "eval_bundle"
    (folder / "eval_data").mkdir(parents=True)
    lines, table = ["icl_tasks:"], ["Eval Task,Task Category,Random baseline"]
    for kind in KINDS:
        lines += [
            f"- label: {kind}_task", f"  dataset_uri: {kind}.jsonl",
            f"  num_fewshot: [{SHOTS[kind]}]", f"  icl_task_type: {kind}",
            *(["  continuation_delimiter: ''"] if kind == "language_modeling" else []),
        ]  # fmt: skip
        table.append(f"{kind}_task,synthetic,{BASELINES[kind]}")
        text = "".join(json.dumps(record) + "\n" for record in records(kind))
        (folder / "eval_data" / f"{kind}.jsonl").write_text(text)
    (folder / "core.yaml").write_text("\n".join(lines) + "\n")
    (folder / "eval_meta_data.csv").write_text("\n".join(table) + "\n")
    return folder


@pytest.fixture(scope="module")
def of_bytes() -> TrainedModel:
    """An untrained model of wide weights, whose tokens are bytes and the end-of-text token."""
    tokenizer = byte_tokenizer()
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size, max_seq_len=LENGTH, n_layer=1, n_head=2, d_model=16,
        init_std=1.0,
    )  # fmt: skip
    mesh = tjx_parallel.make_mesh(MeshConfig())
    with jax.transfer_guard("allow"):
        params = jax.jit(tjx_nn.init, static_argnums=0)(config, jax.random.key(0))
        # Only letters of the words are likely, so that greedy decoding is sometimes right.
        rare = np.full(len(params["wte"]["embedding"]), 0.2, np.float32)
        rare[[ord(c) for c in " aemno"]] = 1
        params["wte"]["embedding"] = params["wte"]["embedding"] * rare[:, None]
        spec: Any = jax.sharding.PartitionSpec  # JAX gives no types
        params = jax.device_put(params, jax.sharding.NamedSharding(mesh, spec()))
    return TrainedModel(Path("bytes"), config, params, mesh, tokenizer)


def common_start(texts: list[str]) -> int:
    return next(i for i in range(99) if len({text[: i + 1] for text in texts}) > 1)


def reference(model: TrainedModel, kind: str) -> list[bool]:
    """Score strings of bytes: every position of the logits of one row at a time."""
    data = records(kind)
    random.Random(1337).shuffle(data)  # noqa: S311  not for cryptography
    right, params = [], jax.device_get(model.params)
    network = jax.jit(lambda params, tokens: tjx_nn.bind(model.gpt, params)(tokens))
    for index, item in enumerate(data):
        rest = [number for number in range(len(data)) if number != index]
        rng = random.Random(1234 + index)  # noqa: S311  not for cryptography
        before = rng.sample(rest, SHOTS[kind])
        start = ""
        for shot in (data[number] for number in before):
            if kind == "schema":
                start += f"{shot['context_options'][shot['gold']]} {shot['continuation']}\n\n"
            elif kind == "language_modeling":
                start += f"{shot['context'].strip()}{shot['continuation']}\n\n"
        if kind == "multiple_choice":
            texts = [f"{start}{item['query']} {choice}" for choice in item["choices"]]
            given = [common_start(texts)] * len(texts)
        elif kind == "schema":
            texts = [f"{start}{each} {item['continuation']}" for each in item["context_options"]]
            suffix = common_start([text[::-1] for text in texts])
            given = [len(text) - suffix for text in texts]
        else:
            texts = [f"{start}{item['context'].strip()}{item['continuation']}"]
            given = [len(f"{start}{item['context'].strip()}")]
        losses, greedy = [], []
        for text, length in zip(texts, given, strict=True):
            ids = np.array([256, *text.encode()], np.int32)[-(LENGTH + 1) :]
            row = np.zeros((1, LENGTH), np.int32)
            row[0, : len(ids) - 1] = ids[:-1]
            scored = len(text) - length
            logits = np.asarray(jax.device_get(network(*jax.device_put((params, row)))))
            last = logits[0, len(ids) - 1 - scored : len(ids) - 1].astype(np.float64)
            labels = ids[-scored:]
            log_p = last - np.log(np.exp(last).sum(-1, keepdims=True))
            losses.append(-log_p[np.arange(scored), labels].mean())
            greedy.append(bool((last.argmax(-1) == labels).all()))
        best = int(np.argmin(losses))
        right.append(greedy[0] if kind == "language_modeling" else best == item["gold"])
    return right


def test_accuracies_equal_the_numpy_reference(bundle: Path, of_bytes: TrainedModel) -> None:
    scorer = ContinuationScorer(of_bytes, batch_size=16)
    for task, kind in zip(read_bundle(bundle), KINDS, strict=True):
        result = score_task(of_bytes, scorer, task)
        expected = np.mean(reference(of_bytes, kind))
        assert 0 < expected < 1, "of no use as a reference"
        assert result.accuracy == pytest.approx(expected)
        chance = BASELINES[kind] / 100
        assert result.centered == pytest.approx((expected - chance) / (1 - chance))
    assert scorer.truncated > 0


def test_core_is_the_mean_of_the_centered_accuracies(
    bundle: Path, of_bytes: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "model", tmp_path / "a.json"
    hf.save(folder, of_bytes.gpt, jax.device_get(of_bytes.params))
    of_bytes.tokenizer.save(folder / "tokenizer.json")
    words = ["core", str(folder), "--bundle", str(bundle), "--json", str(out), "--limit", "4"]
    assert main(words) == 0
    found = json.loads(out.read_text())
    assert [row["task"] for row in found["table"]] == [f"{kind}_task" for kind in KINDS]
    assert [row["examples"] for row in found["table"]] == [4, 4, 4]
    centered = [
        (row["accuracy"] - row["random_accuracy"]) / (1 - row["random_accuracy"])
        for row in found["table"]
    ]
    assert found["core"] == pytest.approx(np.mean(centered))
    assert "core" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "old", "new", "messages"),
    [
        ("core.yaml", "icl_tasks:", "icl_tasks: [", ["core.yaml:", "invalid YAML"]),
        ("core.yaml", "icl_tasks:", "tasks:", ["core.yaml:1: icl_tasks: got no list"]),
        ("core.yaml", "type: schema", "type: cloze",
         ["core.yaml:6: icl_task_type: got 'cloze'; expected one of multiple_choice, schema"]),
        ("core.yaml", "label: schema_task", "label: []", ["core.yaml:6: label: got []"]),
        ("core.yaml", "label: schema_task", "label: other",
         ["core.yaml:6: label: got 'other'; expected a name of its own, with a row in"]),
        ("core.yaml", "[1]", "[12]", ["schema.jsonl: got 12 examples; expected more than"]),
        ("core.yaml", "schema.jsonl", "none.jsonl", ["none.jsonl: cannot be read"]),
        ("eval_meta_data.csv", "40.0", "140",
         ["eval_meta_data.csv:2: Random baseline: got '140'; expected percent in [0, 100)"]),
        ("eval_meta_data.csv", "Random baseline", "chance", ["eval_meta_data.csv:1: got columns"]),
        ("eval_data/schema.jsonl", '"gold": 0', '"gold": 7', ["schema.jsonl:", "gold: got 7"]),
        ("eval_data/schema.jsonl", '"continuation": ', '"next": ',
         ["schema.jsonl:1: continuation: got None; expected a text", "schema.jsonl:2: "]),
        ("eval_data/language_modeling.jsonl", "}\n", "\n",
         ["language_modeling.jsonl:1: invalid JSON"]),
    ],
)  # fmt: skip
def test_bad_bundles_are_reported_by_file_and_line(
    bundle: Path, file: str, old: str, new: str, messages: list[str]
) -> None:
    text = (bundle / file).read_text()
    assert old in text
    (bundle / file).write_text(text.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        read_bundle(bundle)
    for message in messages:
        assert message in str(caught.value)


def test_a_choice_that_begins_another_is_scored_by_its_last_token(of_bytes: TrainedModel) -> None:
    example = Example(("one",) * 2, ("more", "more sheep"), 0)
    task = CoreTask("label", "multiple_choice", 0, " ", 50.0, (example,))
    given = [256, *b"one mor"]
    expected = [(given, [*b"e"]), (given, [*b"e sheep"])]
    assert make_pairs(of_bytes, task, [example], 0) == expected


def test_a_bundle_must_be_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["core", str(tiny_run()), "--bundle", "nowhere"]) == 2
    assert "--bundle: got nowhere; expected a folder with core.yaml" in capsys.readouterr().err
