"""Every model family trains with its own data."""

import gzip
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from one_device import one_device  # noqa: F401
from process_harness import records

from tjx_core import ConfigError
from tjx_data import SpanLoader
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig
from tjx_trainer import main as program
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.tasks.registry import open_task
from tjx_trainer.training.build import build_job

SMALL = """
--model.n_layer=1 --model.n_head=2 --model.d_model=16 --train.max_steps=12 --train.batch_size=16
--train.eval_every=12 --train.sample_tokens=0 --log.every=1 --optimizer.learning_rate=1e-2
--schedule.warmup_steps=2 --checkpoint.every=6
""".split()  # noqa: SIM905  a list of words reads worse


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in MNIST's files: one bright quarter, which is the label."""
    folder = tmp_path_factory.mktemp("digits")
    labels = np.random.default_rng(0).integers(0, 4, 64)
    images = np.zeros((64, 8, 8), np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 255
    for prefix in ("train", "t10k"):
        for name, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            head = struct.pack(">BBBB", 0, 0, 8, array.ndim)
            head += struct.pack(f">{array.ndim}I", *array.shape)
            data = gzip.compress(head + array.astype(np.uint8).tobytes())
            (folder / f"{prefix}-{name}.gz").write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def words(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The flags of each family."""
    folder = tmp_path_factory.mktemp("text")
    text = folder / "text.txt"
    text.write_text("".join(f"{n} sheep and {'more ' * (n % 5)}\n" for n in range(300)))
    of_text = [
        "--model.max_seq_len=16", "--data.seq_len=16", "--data.tokenizer=char",
        "--data.holdout=tail", f"--data.path={text}", f"--data.cache_dir={folder / 'cache'}",
    ]  # fmt: skip
    return {
        "bert": [*SMALL, *of_text, "--config=bert_base", "--train.precision=fp32"],
        "spans": [*SMALL, *of_text, "--config=seq2seq_toy", "--model.n_encoder_layer=1"],
        "vit": [
            *SMALL, "--config=vit_mnist", "--model.image_size=8", "--model.patch_size=4",
            "--model.channels=1", "--model.n_classes=4", "--data.corpus=mnist",
            f"--data.path={digits}", "--model.pool=mean", "--model.init_std=0.2",
        ],
        "encoder_decoder": [
            *SMALL, "--config=seq2seq_toy", "--model.n_encoder_layer=1",
            "--model.max_seq_len=8", "--data.corpus=byte-reversal", "--data.seq_len=4",
            "--train.eval_tokens=40",
        ],
    }  # fmt: skip


def changed(words: list[str], *flags: str) -> list[str]:
    """Give flags in place of those of the same name."""
    names = {flag.partition("=")[0] for flag in flags}
    return [*(word for word in words if word.partition("=")[0] not in names), *flags]


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("bert", "of the masked tokens"),
        ("vit", "test accuracy"),
        ("encoder_decoder", "exact match"),
        # The model of the case before, with other data.
        pytest.param("spans", "of the tokens of the spans", marks=pytest.mark.slow),
    ],
)
@pytest.mark.key_reuse
def test_a_family_trains_and_resumes(
    words: dict[str, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    family: str,
    says: str,
) -> None:
    given = words[family]
    assert program.main([*given, f"--run_dir={tmp_path / 'whole'}"]) == 0
    assert says in capsys.readouterr().out
    found = records(tmp_path / "whole")
    losses = [record["train/loss"] for record in found if "train/loss" in record]
    assert losses[-1] < losses[0]

    # The run as it was after its first checkpoint.
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "12")
    assert program.main([*given, f"--run_dir={tmp_path / 'resumed'}"]) == 0
    assert "from step 6" in capsys.readouterr().err
    assert records(tmp_path / "resumed") == found


def test_masks_are_a_function_of_seed_and_step(words: dict[str, list[str]]) -> None:
    job = build_job(*open_task(resolve(words["bert"])))
    once, again, later = (job.task.train_data.batch(step) for step in (3, 3, 4))
    np.testing.assert_array_equal(once["tokens"], again["tokens"])
    assert (once["labels"] != -100).any()
    assert ((once["labels"] != -100) != (later["labels"] != -100)).any()
    # Validation masks are the same in each evaluation.
    first, second = (
        [labels for _, labels in job.task.evaluation_batches(job.put)] for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model.family=vit"], "give --data.corpus images"),
        (["--model.family=vit", "--data.corpus=mnist"], "give --data.path FOLDER"),
        (["--model.family=encoder_decoder", "--data.corpus=mnist"], "expected text"),
        (["--data.corpus=mnist"], "expected text"),
        (["--model.patch_size=4"], "with model.family gpt; expected vit"),
        (["--data.whole_words=true"], "with model.family gpt; expected bert"),
        (["--data.augment.flip=true"], "with model.family gpt; expected vit"),
        (["--model.family=vit", "--data.mixture=a.txt=1"], "with model.family vit; expected gpt"),
        (
            ["--model.family=encoder_decoder", "--data.corpus=byte-reversal",
             "--data.seq_len=16", "--model.max_seq_len=16"],
            "give --model.max_seq_len 17",
        ),
    ],
)  # fmt: skip
def test_data_of_another_kind_are_refused(flags: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve(flags)


@pytest.mark.parametrize(
    ("family", "flags", "says"),
    [
        ("vit", ["--model.image_size=16"], "give --model.image_size 8,8"),
        ("vit", ["--model.channels=3"], "give --model.channels 1"),
        ("vit", ["--model.n_classes=3"], "expected at least 4, .* give --model.n_classes 4"),
        ("spans", ["--model.pad_id=5"], r"model.pad_id: got 5; expected \d+"),
        ("spans", ["--model.vocab_size=20"], r"model.vocab_size: got 20; expected at least \d+"),
        ("spans", ["--model.source_vocab_size=20"], "model.source_vocab_size: got 20"),
        ("spans", ["--data.packing=documents"], "choose windows"),
        ("spans", ["--data.seq_len=2", "--model.max_seq_len=2"], "give --model.max_seq_len 3"),
        (
            "encoder_decoder",
            ["--model.start_id=5"],
            "model.start_id: got 5; expected 1, that of byte-reversal",
        ),
    ],
)
def test_a_model_for_other_data_is_refused(
    words: dict[str, list[str]], family: str, flags: list[str], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        open_task(resolve(changed(words[family], *flags)))


def test_spans_have_ids_after_those_of_the_text(words: dict[str, list[str]]) -> None:
    job = build_job(*open_task(resolve(words["spans"])))
    model, data = job.config.model, job.task.train_data
    assert isinstance(model, EncoderDecoderConfig)
    assert isinstance(data, SpanLoader)
    ids = (model.start_id, model.stop_id, model.pad_id, model.vocab_size)
    assert ids == (data.start_id, data.end_id, data.pad_id, data.n_ids)
    assert data.vocab_size < model.start_id
    # A resumed run gets the resolved configuration.
    again, _ = open_task(job.config)
    assert again.model == model


def test_whole_words_are_masked_on_request(words: dict[str, list[str]]) -> None:
    jobs = [
        build_job(*open_task(resolve([*words["bert"], *flags])))
        for flags in ([], ["--data.whole_words"])
    ]
    text = [job.task.train_data.batch(0)["labels"] for job in jobs]
    assert (text[0] != text[1]).any()
    kinds = [job.task.train_data.identity["whole_words"] for job in jobs]
    assert kinds[0] == "no"
    assert kinds[1] != "no"


def test_auxiliary_losses_are_logged(words: dict[str, list[str]], tmp_path: Path) -> None:
    text = [word for word in words["bert"] if not word.startswith("--config")]
    flags = [
        "--model.experts.count=4", "--model.sparse.top_k=4", "--model.sparse.head_dim=4",
        "--model.z_loss=0.1", "--train.max_steps=2", "--train.accumulation=2",
        f"--run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    assert program.main(changed(text, *flags)) == 0
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert record["train/balance_loss"] >= 1 - 1e-5
    assert record["train/indexer_loss"] > 0
    assert 0 <= record["train/dropped"] < 1
    assert record["train/router_z_loss"] > 0
    assert record["train/z_loss"] > 0
