"""The command tjx-metrics: plots, comparison, HTML report and error messages."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tjx_metrics.main import main
from tjx_metrics.plotting.curves import PlotOptions, metric_figure
from tjx_metrics.plotting.run_data import open_run
from tjx_metrics.report.comparison import cell, differences
from tjx_metrics.report.page import pipeline_page
from tjx_metrics.report.summary import config_of, environment_of, summarize, warnings_of

EVIL = "</pre><script>alert('x')</script><img src=http://example.org/a.png onerror=\"go()\">"


def write_run(folder: Path, *, lift: float = 0.0, settings: dict[str, Any] | None = None) -> Path:
    """Write a run of ten records with all metrics of the trainer."""
    folder.mkdir(parents=True)
    lines = []
    for i in range(11):
        step = 10 * i
        record: dict[str, Any] = {
            "step": step, "train/loss": 4.0 - 0.2 * i + lift, "train/learning_rate": 1e-3,
            "train/grad_norm": 1.0, "train/tokens": 5000 * i, "train/hours": 0.1 * i,
            "train/tokens_per_sec": 100.0 if i < 5 else 200.0 + i, "train/mfu": 0.25,
            "train/skipped": 0, "compile/count": 2, "time/device": 9.0, "time/data_wait": 1.0,
            "norms/gradient/blocks/kernel/0": 1.0, "norms/gradient/blocks/kernel/1": 2.0,
        }  # fmt: skip
        if i % 5 == 0:
            loss = 4.2 - 0.2 * i + lift
            record |= {"eval/loss": loss, "eval/perplexity": 9.0, "eval/bits_per_byte": loss / 2}
            record["samples/text"] = {"text": f"step {step}: {EVIL}"}
            record["histograms/parameter/w"] = {"counts": [1, 2], "edges": [0.0, 1.0, 2.0]}
        lines.append(json.dumps(record) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    logged = {
        "config": {"optimizer.learning_rate": 1e-3, "name": EVIL, "train.max_steps": 100}
        | (settings or {}),
        "versions": {"jax": "0.11.2"}, "git": "abc123", "devices": "1 cpu",
    }  # fmt: skip
    (folder / "metrics.hyperparameters.json").write_text(json.dumps(logged))
    (folder / "metrics.summary.json").write_text(json.dumps({"parameters": 1_500_000}))
    return folder


class Page(HTMLParser):
    """Tags, texts and external resources of an HTML page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.words = ""
        self.hovers: list[Any] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                self.loads.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "data-hover":
                self.hovers.append(json.loads(value or ""))

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def page_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = write_run(tmp_path_factory.mktemp("runs") / "base")
    assert main(["report", str(run)]) == 0
    return (run / "report.html").read_text()


def test_the_page_loads_no_external_resources_or_scripts(page_text: str) -> None:
    page = Page(page_text)
    assert page.tags.count("script") == 1
    assert not page.handlers
    assert all(each.startswith(("#", "data:image/png")) for each in page.loads)
    assert not re.search(r"@import|url\((?!#)", page_text)
    assert page.tags.count("img") == page.tags.count("link") == page.tags.count("iframe") == 0
    assert "default-src 'none'" in page_text
    assert EVIL not in page_text
    assert EVIL in page.words  # as text


def test_the_page_has_all_sections_and_valid_references(page_text: str) -> None:
    page = Page(page_text)
    sections = ["summary", "curves", "speed", "layers", "histograms", "samples", "config",
                "environment", "results", "last-values"]  # fmt: skip
    assert [each for each in page.ids if each in sections] == sections
    assert len(set(page.ids)) == len(page.ids)
    used = {each[1:] for each in page.loads if each.startswith("#")}
    used |= set(re.findall(r"url\(#([^)]*)\)", page_text))
    assert used <= set(page.ids)
    for text in ("step 100, 50.00k tokens, 60.0 minutes, 1.50M parameters", "0.11.2", "abc123",
                 "Evaluation loss 4.200 at first, 2.200 at best (step 100).", "25.0%",
                 "No problems found", "No records: Parameter norms by layer"):  # fmt: skip
        assert text in page.words


def test_a_page_of_several_runs_has_the_sections_of_each(tmp_path: Path) -> None:
    stages = [open_run(write_run(tmp_path / name)) for name in ("one", "two")]
    rewards = [{**record, "train/reward": 0.5} for record in stages[1].records]
    page = Page(pipeline_page("both", [stages[0], replace(stages[1], records=rewards)]))
    assert len(set(page.ids)) == len(page.ids)
    for number in (1, 2):
        assert {f"stage{number}-{name}" for name in ("summary", "curves", "samples")} <= {*page.ids}
    assert ("stage1-responses" in page.ids, "stage2-responses" in page.ids) == (False, True)
    assert page.tags.count("script") == 1
    used = {each[1:] for each in page.loads if each.startswith("#")}
    assert {"stage1-summary", "stage2-summary"} <= used <= set(page.ids)


def test_the_plot_of_an_accuracy_shows_all_values(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "run"))
    values = [0.02, *(0.9 + 0.001 * i for i in range(10))]
    records = [{**r, "eval/accuracy": v} for r, v in zip(run.records, values, strict=True)]
    figure = metric_figure([replace(run, records=records)], "eval/accuracy", PlotOptions())
    low, high = figure.axes[0].get_ylim()
    assert low < 0.02 < max(values) < high


def test_hover_data_has_the_values_of_curves(page_text: str) -> None:
    loss = Page(page_text).hovers[0][0]
    names = [series["name"] for series in loss["series"]]
    assert names == ["training", "evaluation (lowest 2.200)"]
    assert loss["series"][1]["x"] == [0, 50, 100]
    assert loss["series"][1]["y"] == pytest.approx([4.2, 3.2, 2.2])
    left, top, right, bottom = loss["box"]
    assert 0 < left < right < 1
    assert 0 < top < bottom < 1


def test_the_page_reports_missing_records(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "train/loss": "NaN"}\n')
    (tmp_path / "config.yaml").write_text("name: <b>\n")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "p.html")]) == 0
    page = Page((tmp_path / "p.html").read_text())
    for text in ("The last training loss is not finite.", "There is no evaluation.",
                 "No records: Histograms.", "The run recorded no texts.", "name: <b>",
                 "Nothing is recorded in metrics.summary.json."):  # fmt: skip
        assert text in page.words


def test_the_summary_equals_the_records(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "base"))
    summary = summarize(run)
    assert (summary.steps, summary.tokens, summary.parameters) == (100, 50_000, 1_500_000)
    assert summary.best_eval == pytest.approx(2.2)
    assert summary.best_step == 100
    assert summary.final_loss == pytest.approx(2.0)
    assert summary.tokens_per_sec == 207.5  # the median of the second half
    assert summary.waiting == pytest.approx(0.1)
    assert warnings_of(run, summary) == []
    assert config_of(run)["train.max_steps"] == 100
    assert environment_of(run) == {"versions.jax": "0.11.2", "git": "abc123", "devices": "1 cpu"}


def test_problems_of_a_run_cause_warnings(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "bad", settings={"train.max_steps": 500})
    with (folder / "metrics.jsonl").open("a") as file:
        for step, count in ((110, 5), (120, 1), (130, 2)):  # a resume counts compilations anew
            record = {"step": step, "eval/loss": 2.5, "train/skipped": 7, "compile/count": count,
                      "time/data_wait": 50.0, "checkpoint/failed": 1}  # fmt: skip
            file.write(json.dumps(record) + "\n")
    run = open_run(folder)
    summary = summarize(run)
    assert summary.recompiles == 4
    text = " ".join(warnings_of(run, summary))
    for part in ("7 steps were skipped", "rose from 2.2000 at step 100 to 2.5000",
                 "4 compilations", "62% of the time", "1 checkpoints could not",
                 "step 130 of 500"):  # fmt: skip
        assert part in text


def test_a_comparison_has_summaries_and_config_differences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worse = write_run(tmp_path / "worse", lift=0.5, settings={"optimizer.learning_rate": 3e-3})
    base = write_run(tmp_path / "base", settings={"model.n_layer": 4})
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text('{"step": 7, "train/loss": 2.0}\n')
    runs = [str(worse), str(base), str(bare)]
    assert main(["compare", *runs, "--out", str(tmp_path / "c.svg")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    header = "run steps tokens hours final eval best eval perplexity bits/byte tokens/s MFU params"
    assert lines[0] == header.split()
    # Sorted by the best evaluation; unrecorded values are dashes.
    assert lines[1] == ["base", "100", "50.00k", "1.000", "2.2000", "2.2000", "9.00", "1.1000",
                        "208", "25.0%", "1.50M"]  # fmt: skip
    assert lines[2][:5] == ["worse", "100", "50.00k", "1.000", "2.7000"]
    assert lines[3] == ["bare", "7"] + ["-"] * 9
    assert ["setting", "worse", "base"] in lines
    assert ["optimizer.learning_rate", "0.003", "0.001"] in lines
    assert ["model.n_layer", "-", "4"] in lines
    assert ["bare:", "its", "config", "was", "not", "recorded."] in lines
    assert not any(line[:1] == ["train.max_steps"] for line in lines)
    assert (tmp_path / "c.svg").stat().st_size > 10_000
    assert cell(summarize(open_run(bare)), "MFU") == "-"
    assert set(differences([open_run(worse), open_run(base)])) == {
        "optimizer.learning_rate", "model.n_layer",
    }  # fmt: skip


def test_plot_writes_available_plots_and_reports_missing_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "base")
    assert main(["plot", str(run), "--x", "hours", "--log_y", "--smooth", "3"]) == 0
    output = capsys.readouterr()
    names = [Path(line).name for line in output.out.splitlines()]
    assert names == ["loss.png", "learning_rate.png", "grad_norm.png", "throughput.png",
                     "time_split.png", "norms_gradient.png", "histograms.png"]  # fmt: skip
    assert all(Path(line).is_file() for line in output.out.splitlines())
    assert "no plot norms_update" in output.err
    other = write_run(tmp_path / "other")
    both = ["plot", str(run), str(other), "--out", str(tmp_path / "both"), "--format", "svg"]
    assert main([*both, "--metric", "train/mfu", "eval/bits_per_byte"]) == 0
    found = sorted(path.name for path in (tmp_path / "both").iterdir())
    assert found == ["eval_bits_per_byte.svg", "train_mfu.svg"]


MISTAKES = [
    (["plot", "{tmp}/missing"], "there is no such run directory"),
    (["plot", "{tmp}/a\x1b[31m"], "a\\x1b[31m: there is no such run directory"),
    (["plot", "{tmp}/runn"], "did you mean {tmp}/run?"),
    (["plot", "{tmp}"], "no run folder (runs in it: damaged, empty, run)"),
    (["report", "{tmp}/empty"], "holds no record yet"),
    (["compare", "{tmp}/damaged"], "metrics.jsonl, line 1: got no JSON object"),
    (["plot", "{tmp}/run", "--metric", "train/los"], "no metric 'train/los'; nearest: train/loss"),
    (["plot", "{tmp}/run", "--x", "tokens"], "which the axis tokens needs: choose steps"),
    (
        ["compare", "{tmp}/run", "--out", "a.gif"],
        "--out: got a.gif; expected an ending of png, pdf",
    ),
    (["report", "{tmp}/run", "--out", "a.png"], "--out: got a.png; expected an ending of .html"),
    (["report", "{tmp}/torn"], "metrics.summary.json is no JSON"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_are_reported_in_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in {
        "run": '{"step": 1, "train/loss": 2.0}\n', "empty": "", "damaged": "{]\n{}\n",
    }.items():  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    if words[1].endswith("torn"):
        (tmp_path / "run" / "metrics.summary.json").write_text('{"a": ')
        (tmp_path / "run").rename(tmp_path / "torn")
    assert main([word.replace("{tmp}", str(tmp_path)) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message.replace("{tmp}", str(tmp_path)) in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compar", "run"], "did you mean compare?"),
        (["plot", "run", "--formt", "pdf"], "--formt: unknown flag; did you mean --format?"),
        (["plot", "run", "--format", "jpg"], "got 'jpg'; expected one of png, pdf, svg"),
    ],
)
def test_mistyped_words_are_reported_with_the_nearest_name(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_mistakes_are_reported_before_heavy_imports() -> None:
    code = (
        "import sys; from tjx_metrics.main import main\n"
        "assert main(['plot', 'x', '--x', 'miles']) == main(['report', '/nowhere']) == 2\n"
        "sys.exit(any(m in sys.modules for m in ('jax', 'matplotlib')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
