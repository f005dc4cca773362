"""A package outside of tjx adds models, an optimizer, a backend, a task and the rest."""

import json
import re
import subprocess
import sys
from pathlib import Path

from campaigns.tiny_run import clean_environment

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "example_extension"


def test_example_trains_and_evaluates_by_the_command_lines(tmp_path: Path) -> None:
    def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words],
            env={**clean_environment(tmp_path), **variables},
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip

    trained = run(str(EXAMPLE.parent / "custom_task.py"), "--run_dir", "run")
    assert trained.returncode == 0, trained.stderr
    assert "example_extension.attention (requested by name)" in trained.stdout + trained.stderr
    loss = re.search(r"counting loss +([\d.]+) nats", trained.stdout)
    assert loss is not None, trained.stdout
    assert float(loss[1]) < 1.0, "a constant guess has log(16) = 2.77"
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    entropy = [x["eval/example_extension.metric"] for x in records if "eval/loss" in x][-1]
    assert 0 < entropy < 1.0, "that of a constant guess is log(16) = 2.77"
    lines = (tmp_path / "run" / "losses.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["1", "10", "20"]

    refused = run("-m", "tjx_eval.main", "loss", "run")
    assert refused.returncode == 2
    assert "set the environment variable TJX_EXTENSIONS=example_extension." in refused.stderr
    evaluated = run("-m", "tjx_eval.main", "loss", "run", TJX_EXTENSIONS="example_extension")
    assert evaluated.returncode == 0, evaluated.stderr
    assert re.search(rf"loss +{loss[1]}", evaluated.stdout)
    assert f"{entropy:.4f}" in evaluated.stdout


# A model of the example's Hugging Face family is saved and loaded; flags name corpus, environment.
SAVE_LOAD_AND_READ = """
import json, pathlib, sys
import jax, numpy as np, tjx_rl
from tjx_data import load_corpus
from tjx_nn import GPTConfig, hf, init
from tjx_trainer.cli.arguments import resolve
folder = pathlib.Path(sys.argv[1])
config = GPTConfig(
    vocab_size=11, max_seq_len=8, n_layer=2, n_head=2, n_kv_head=1, d_model=8, d_ff=12, bias=False,
    positions="rope", norm="rmsnorm", activation="relu2", tied_head=False,
)
params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
try:
    hf.save(folder, config, params)
except ValueError as error:
    assert "no transformers family can represent this model" in str(error), error
else:
    raise AssertionError("saved without the family")
import example_extension.hf_family
hf.save(folder, config, params)
assert json.loads((folder / "config.json").read_text())["architectures"] == ["ArceeForCausalLM"]
loaded = hf.load(folder)
assert loaded[0] == config, loaded[0]
jax.tree.map(np.testing.assert_array_equal, loaded[1], params)
of_corpus = resolve(["--data.corpus", "example_extension.corpus"])
assert list(load_corpus(of_corpus.data.corpus))[101] == "1+1=2"
words = "--task grpo --train.init_from x --rl.environment example_extension.environment"
name = resolve([*words.split(), "--data.path", "examples.jsonl"]).rl.environment
episode = tjx_rl.registered_environments[name]("A number?", "7")
assert [episode.step(x) for x in ("5", "7")] == [(" too small: ", 0.0), (None, 0.5)]
"""


def test_corpus_environment_and_hugging_face_family_of_the_example(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SAVE_LOAD_AND_READ, str(tmp_path / "saved")],
        env=clean_environment(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_code_of_the_guide_is_the_example() -> None:
    guide = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"```python\n# example_extension/(\w+\.py)\n(.*?)```", guide, re.S))
    files = {path.name: path.read_text(encoding="utf-8") for path in EXAMPLE.glob("*.py")}
    assert blocks == files
