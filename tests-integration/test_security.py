"""Source scan for SECURITY.md: no code executes files, listens or fetches without review.

The sources are parsed, so that comments are ignored. Findings must be in `ALLOWED` with a reason.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Modules that execute their input, listen or fetch.
RUNS_WHAT_IT_READS = {
    "pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle",
}  # fmt: skip
LISTENS = {
    "socketserver", "http.server", "xmlrpc.server", "wsgiref", "multiprocessing.managers",
    "multiprocessing.connection.Listener", "grpc", "flask", "fastapi", "uvicorn", "tornado",
}  # fmt: skip
FETCHES = {
    "urllib.request", "http.client", "requests", "httpx", "urllib3", "ftplib", "smtplib",
    "telnetlib", "huggingface_hub", "datasets", "datasets.load", "distributed", "fsspec", "s3fs",
    "wandb", "trackio", "lm_eval",
}  # fmt: skip
UNPACKS = {"tarfile"}
# Attributes, by the last components of their dotted name.
CALLS = {
    "eval": "runs text", "exec": "runs text", "compile": "runs text", "__import__": "runs text",
    "os.system": "a shell", "os.popen": "a shell", "subprocess.getoutput": "a shell",
    "subprocess.getstatusoutput": "a shell", "tempfile.mktemp": "a name that others can take",
    "yaml.unsafe_load": "runs YAML", "yaml.full_load": "runs YAML", "yaml.load_all": "runs YAML",
    "yaml.unsafe_load_all": "runs YAML", "yaml.full_load_all": "runs YAML",
    "jax.profiler.start_server": "listens",
    "socket.socket": "a socket", "socket.create_server": "listens",
    "jax.distributed.initialize": "listens on process 0", "asyncio.start_server": "listens",
    "shutil.unpack_archive": "unpacks anywhere",
}  # fmt: skip
SHARED_PLACES = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108  named in order to reject them
SECRETS = ("TOKEN", "API_KEY", "SECRET", "PASSWORD", "CREDENTIAL")

MULTIPROCESS = "packages/tjx-parallel/src/tjx_parallel/multiprocess"
ALLOWED = {
    ("packages/tjx-data/src/tjx_data/corpora/hub.py", "fetches: urllib.request"):
        "a corpus at a fixed address, whose SHA-256 is checked",
    ("packages/tjx-data/src/tjx_data/corpora/hub.py", "fetches: huggingface_hub"):
        "tokenizer.json of a tokenizer given by name",
    ("packages/tjx-data/src/tjx_data/corpora/hub.py", "fetches: datasets"):
        "rows of a dataset pinned by commit; the library executes none of its code",
    ("packages/tjx-data/src/tjx_data/corpora/remote.py", "fetches: fsspec"):
        "text at a URL that data.path names, parsed as a local file is",
    ("packages/tjx-data/src/tjx_data/corpora/containers.py", "unpacks: tarfile"):
        "members are read in memory, of bounded size; nothing is extracted",
    ("packages/tjx-data/src/tjx_data/images/hf_datasets.py", "fetches: datasets"):
        "as above, of images",
    ("packages/tjx-data/src/tjx_data/main.py", "fetches: distributed"):
        "a Dask scheduler, if --dask names one",
    ("packages/tjx-nn/src/tjx_nn/hf/hub.py", "fetches: huggingface_hub"):
        "a model given by name; safetensors and JSON, never pickles",
    (f"{MULTIPROCESS}/startup.py", "jax.distributed.initialize"):
        "a multi-process run, if configured",
    (f"{MULTIPROCESS}/rendezvous.py", "socket.create_server"):
        "as above: barrier at the coordinator's address before JAX listens there",
    ("packages/tjx-ckpt/src/tjx_ckpt/store/remote_folder.py", "fetches: fsspec"):
        "checkpoints at a URL given by the user",
    ("packages/tjx-metrics/src/tjx_metrics/trackers/wandb.py", "fetches: wandb"):
        "sends records if --log.trackers names it; it manages its own key",
    ("packages/tjx-metrics/src/tjx_metrics/trackers/trackio.py", "fetches: trackio"):
        "writes to a local database, if --log.trackers names it",
    ("tools/notebooks.py", "compile"): "cells of the repository's own notebooks",
    ("tools/notebooks.py", "exec"): "as above",
    ("apps/eval/src/tjx_eval/serving/server.py", "listens: uvicorn"):
        "`serve`: on loopback, on other addresses only with a key",
    ("apps/eval/src/tjx_eval/serving/server.py", "socket.create_server"): "as above",
    ("apps/eval/src/tjx_eval/serving/connections.py", "listens: uvicorn.protocols.http.h11_impl"):
        "connections of `serve`, with limits on their number and on headers",
    ("apps/eval/src/tjx_eval/serving/connections.py",
     "listens: uvicorn.protocols.http.h11_impl.H11Protocol"): "as above",
    ("apps/eval/src/tjx_eval/commands/serve.py", "a secret: TJX_API_KEY"):
        "name of the variable with the key of `serve`; never written",
    ("apps/eval/src/tjx_eval/commands/tasks.py", "fetches: lm_eval"):
        "data of the given tasks; none for local tasks",
    ("apps/eval/src/tjx_eval/scoring/lm_harness.py", "fetches: lm_eval"): "as above",
    ("tools/golden/make_gguf_golden.py", "fetches: http"):
        "the server of llama.cpp that the script starts on this machine",
    ("tools/fetch_wheels.py", "fetches: urllib.request"):
        "files of the package index, whose SHA-256 the locks hold",
    ("tools/campaigns/fork_server.py", "listens"):
        "on a socket in a new folder of this user alone, during tests",
    ("tools/campaigns/fork_server.py", "socket.socket"): "as above",
    ("tools/campaigns/meshes.py", "socket.socket"):
        "closed before use: finds a free port of the loopback interface",
    ("tools/api_diff.py", "unpacks: tarfile"):
        "`git archive` of a revision of this repository, extracted with the data filter",
    ("tools/campaigns/fuzz_config.py", "yaml.load"): "its loader makes texts and nothing else",
    ("tools/bench/training_torch.py", "np.load without allow_pickle=False"):
        "NumPy's default is the same, and the file is the benchmark's own",
    ("tools/golden/check_saved.py", "np.load without allow_pickle=False"): "as above",
}  # fmt: skip
SOURCES = [
    path
    for pattern in ("packages/*/src/**/*.py", "apps/*/src/**/*.py", "tools/**/*.py")
    for path in sorted(ROOT.glob(pattern))
]


def dotted(node: ast.AST) -> str:
    """Return the dotted name of an attribute, such as yaml.safe_load."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed([*parts, node.id])) if isinstance(node, ast.Name) else ""


def aliases(tree: ast.AST) -> dict[str, str]:
    """Map imported names to full names: `from yaml import load as f` maps f to yaml.load."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def dangers(source: str) -> Iterator[str]:
    """Return the operations of a source that need review."""
    tree = ast.parse(source)
    short = aliases(tree)
    for name in imports(tree):
        package = name.split(".")[0]
        if name in RUNS_WHAT_IT_READS or package in RUNS_WHAT_IT_READS:
            yield f"runs what it reads: {name}"
        if name in LISTENS or package in LISTENS:
            yield f"listens: {name}"
        if name in FETCHES or package in FETCHES:
            yield f"fetches: {name if name == 'urllib.request' else package}"
        if package in UNPACKS:
            yield f"unpacks: {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from call_dangers(node, short)
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            yield "trust_remote_code"
        if isinstance(node, ast.Attribute) and dotted(node) in YAML_LOADERS:
            yield f"{dotted(node)}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from text_dangers(node.value)


YAML_LOADERS = {f"yaml.{kind}" for kind in ("Loader", "UnsafeLoader", "FullLoader", "CLoader")}


def call_dangers(node: ast.Call, short: dict[str, str]) -> Iterator[str]:
    name = dotted(node.func)
    first, dot, rest = name.partition(".")
    name = f"{short.get(first, first)}{dot}{rest}"
    given = {word.arg: word.value for word in node.keywords}

    def is_given(argument: str, value: object) -> bool:
        found = given.get(argument)
        return isinstance(found, ast.Constant) and found.value == value

    if name in CALLS:
        yield name
    own = name.rpartition(".")[2]
    is_numpy = name.split(".")[0] in ("np", "numpy", "jnp")
    if own == "load" and is_numpy and not is_given("allow_pickle", False):
        yield "np.load without allow_pickle=False"
    if name == "torch.load" and not is_given("weights_only", True):
        yield "torch.load without weights_only=True"
    if name == "yaml.load" or (name == "yaml.compose" and "Loader" not in given):
        yield name
    if "shell" in given and not is_given("shell", False):
        yield "shell=True"
    unpacks = own == "extractall" or (own == "extract" and "tar" in name)
    if unpacks and not is_given("filter", "data"):
        yield "unpacks without the data filter"
    if own == "listen":
        yield "listens"


def text_dangers(text: str) -> Iterator[str]:
    """Return shared paths and names of secrets in a source."""
    if text.startswith(SHARED_PLACES):
        yield f"a shared place: {text}"
    if text.isupper() and text.isascii() and any(text.endswith(secret) for secret in SECRETS):
        yield f"a secret: {text}"


def test_sources_have_only_reviewed_operations() -> None:
    assert len(SOURCES) > 200
    held = {
        (path.relative_to(ROOT).as_posix(), danger)
        for path in SOURCES
        for danger in dangers(path.read_text())
    }
    assert held - ALLOWED.keys() == set(), "leave it out, or say in ALLOWED why it is safe"
    unneeded = {place for place in ALLOWED.keys() - held if (ROOT / place[0]).is_file()}
    assert unneeded == set(), "these exceptions are not needed any more"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "eval(text)",
        "exec(text)",
        "import yaml\nyaml.load(text, Loader=yaml.UnsafeLoader)",
        "from yaml import load\nload(text)",
        "import yaml\nyaml.unsafe_load(text)",
        "import yaml as y\ny.full_load(text)",
        "import subprocess\nsubprocess.run(words, shell=True)",
        "from subprocess import run as r\nr(words, shell=flag)",
        "import os\nos.system(text)",
        "import tarfile",
        "archive.extractall(folder)",
        "import socket\nsocket.socket()",
        "server.listen(5)",
        "import http.server",
        "from multiprocessing.connection import Listener",
        "import jax\njax.profiler.start_server(9999)",
        "import jax\njax.distributed.initialize()",
        "import requests",
        "from urllib.request import urlopen",
        "load(name, trust_remote_code=True)",
        "path = '/tmp/tjx'",
        "import tempfile\ntempfile.mktemp()",
        "import os\nos.environ['HF_TOKEN']",
        "import os\nos.environ.get('WANDB_API_KEY')",
    ],
)
def test_scan_detects(source: str) -> None:
    assert [*dangers(source)]


@pytest.mark.parametrize(
    "source",
    [
        "# import pickle, eval(x)\n'a pickle is never loaded, nor by yaml.load'",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import yaml\nyaml.safe_load(text)\nyaml.compose(text, Loader=yaml.SafeLoader)",
        "import subprocess\nsubprocess.run(words, shell=False)",
        "archive.extractall(folder, filter='data')",
        "model.eval()\nre.compile(text)\njitted.lower().compile()",
        "tjx_nn.bind(model, params)",
        "import socket\nsocket.gethostname()",
        "import tempfile\ntempfile.mkdtemp()",
        "eos_token_id = 'token'",
    ],
)
def test_scan_accepts(source: str) -> None:
    assert not [*dangers(source)]


# A run of one process, monitored by Python's audit events from its first import. What libraries
# unpickle of their own installed files is theirs; a find_class means that objects were made.
WATCHED = """
import os, sys
events = set()
def watch(event, arguments):
    if event in ("pickle.find_class", "os.system", "socket.connect", "socket.getaddrinfo"):
        events.add(f"{event} {arguments[-2:]}")
    if event == "socket.bind":
        events.add(f"bind {arguments[1]}")
sys.addaudithook(watch)
from tjx_trainer.main import main
status = max(main([*sys.argv[1:], "--train.max_steps", steps]) for steps in ("2", "4"))
inodes = set()
for entry in os.scandir("/proc/self/fd"):
    try:
        inodes.add(os.readlink(entry.path).removeprefix("socket:[").rstrip("]"))
    except OSError:
        pass
for table in ("tcp", "tcp6", "udp", "udp6"):
    for line in open(f"/proc/self/net/{table}").readlines()[1:]:
        words = line.split()
        if words[9] in inodes and (words[3] == "0A" or table.startswith("udp")):
            events.add(f"{table} listens on {words[1]}")
print("EVENTS", sorted(events))
raise SystemExit(status)
"""
TINY = {
    "model.family": "encoder_decoder", "model.n_layer": 1, "model.n_encoder_layer": 1,
    "model.n_head": 1, "model.d_model": 16, "model.max_seq_len": 18, "data.corpus": "byte-reversal",
    "data.seq_len": 16, "train.batch_size": 4, "train.eval_every": 2, "train.eval_tokens": 64,
    "train.sample_tokens": 0, "checkpoint.every": 2, "log.every": 1, "schedule.warmup_steps": 1,
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="sockets are looked up in /proc")
def test_run_and_resume_unpickle_nothing_and_do_not_listen(tmp_path: Path) -> None:
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
    secret = "hf_abcdefghijklmnopqrstuvwxyz"  # noqa: S105  a fake one
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": path,
        "HF_TOKEN": secret, "WANDB_API_KEY": secret,
        "AWS_SECRET_ACCESS_KEY": secret,
        # How tests compile quickly.
        **{name: os.environ[name] for name in os.environ if name.startswith(("JAX_", "XLA_"))},
    }  # fmt: skip
    words = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *words, "--run_dir", str(tmp_path / "run"),
         "--schedule.name", "constant"],
        env=environment, capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "from step 2" in done.stderr
    assert "EVENTS []" in done.stdout, done.stdout.splitlines()[-1]
    assert secret not in done.stdout + done.stderr
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file
