"""Job files in docs/jobs: valid flags, exit codes and environment variables."""

import functools
import operator
import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml

import tjx_parallel.multiprocess.startup
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.runtime.exit_codes import EXIT_INFO, ExitCode

ROOT = Path(__file__).resolve().parents[1]
JOBS = ROOT / "docs" / "jobs"
FILES = sorted(path for path in JOBS.iterdir() if path.name != "BUILD")
SCRIPTS = ("slurm.sbatch", "tpu.sh")
JOBSETS = ("jobset.yaml", "kustomization.yaml")

# Codes after which a restart would fail again. The other final codes are intended ends.
NOT_RETRYABLE = {
    int(code)
    for code, meaning in EXIT_INFO.items()
    if not meaning.again
    and code not in (ExitCode.FINISHED, ExitCode.GAVE_UP, ExitCode.INTERRUPTED, ExitCode.TERMINATED)
}


def read(name: str) -> str:
    return (JOBS / name).read_text(encoding="utf-8")


def jobset(name: str = "jobset.yaml") -> Any:
    """Return a JobSet; that of kustomization.yaml is jobset.yaml with its JSON patch (RFC 6902)."""
    found = yaml.safe_load(read("jobset.yaml"))
    if name == "jobset.yaml":
        return found
    changes = yaml.safe_load(read(name))
    assert changes["resources"] == ["jobset.yaml"]
    (patch,) = changes["patches"]
    assert patch["target"] == {"kind": found["kind"], "name": found["metadata"]["name"]}
    for change in yaml.safe_load(patch["patch"]):
        assert change["op"] == "replace"
        *path, last = [
            int(step) if step.isdecimal() else step for step in change["path"].split("/")[1:]
        ]
        place = functools.reduce(operator.getitem, path, found)
        assert isinstance(place, list) or last in place
        assert not isinstance(place[last], dict) or place[last]["name"] == change["value"]["name"]
        place[last] = change["value"]
    return found


def container(name: str = "jobset.yaml") -> Any:
    job = jobset(name)["spec"]["replicatedJobs"][0]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return container


@dataclass(frozen=True)
class ScriptResult:
    """Exit code of a script and the calls of its stub programs."""

    code: int
    calls: list[list[str]]

    def of(self, program: str) -> list[str]:
        """Return the arguments of the only call of a program."""
        (words,) = [words for name, *words in self.calls if name == program]
        return words


# Exits with CODE; with PROGRESS it creates a checkpoint first.
NOTE = """#!/usr/bin/env bash
printf '%s\\0' "$(basename "$0")" "$@" >> "$NOTES"; printf '\\n' >> "$NOTES"
[ -z "${PROGRESS:-}" ] || mkdir -p "$RUN_DIR/checkpoints/200"
exit "${CODE:-0}"
"""


def run_script(script: str, folder: Path, *words: str, **variables: str) -> ScriptResult:
    """Run a script in Bash with stubs that record the calls of cluster programs."""
    programs, notes = folder / "bin", folder / "notes"
    programs.mkdir(exist_ok=True)
    notes.write_text("")
    for name in ("srun", "scontrol", "gcloud", "tjx-train"):
        (programs / name).write_text(NOTE)
        (programs / name).chmod(0o755)
    (folder / "run" / "checkpoints" / "100").mkdir(parents=True, exist_ok=True)
    given = {
        "PATH": f"{programs}:{os.environ['PATH']}", "NOTES": str(notes), "ZONE": "zone",
        "RUN_DIR": str(folder / "run"), "SLURM_JOB_ID": "7", "SKYPILOT_NODE_RANK": "3",
        "SKYPILOT_NUM_NODES": "4", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", script, "script", *words], env={**given, **variables}, check=False
    )
    calls = [line.split("\0")[:-1] for line in notes.read_text().splitlines()]
    return ScriptResult(done.returncode, calls)


def trainer_words(name: str, folder: Path) -> list[str]:
    """Return the trainer arguments of a job file."""
    if name in JOBSETS:
        words = [*container(name)["command"], *container(name)["args"]]
    elif name == "slurm.sbatch":
        words = run_script(read(name), folder).of("srun")
    elif name == "tpu.sh":
        call = run_script(read(name), folder, "tpu").of("gcloud")
        words = shlex.split(call[call.index("--command") + 1])
    else:
        words = [
            "tjx-train",
            *run_script(yaml.safe_load(read(name))["run"], folder).of("tjx-train"),
        ]
    assert words.pop(0) == "tjx-train"
    return words


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_bash(name: str) -> None:
    subprocess.run(["bash", "-n", JOBS / name], check=True)


def test_run_section_of_a_yaml_file_is_bash() -> None:
    task = yaml.safe_load(read("skypilot.yaml"))
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)


@pytest.mark.parametrize("name", [path.name for path in FILES])
def test_each_job_calls_the_trainer_with_valid_flags(name: str, tmp_path: Path) -> None:
    config = resolve(trainer_words(name, tmp_path))  # raises for unknown or contradictory flags
    assert config.run_dir is not None  # needed to resume
    assert config.distributed.heartbeat_timeout < 100
    assert (config.task == "grpo") == (name == "kustomization.yaml")


def test_slurm_job_takes_the_flags_of_its_comment(tmp_path: Path) -> None:
    text = "\n".join(line.removeprefix("# ") for line in read("slurm.sbatch").splitlines())
    (command,) = re.findall(r"sbatch (docs/jobs/slurm.sbatch --task.*?[^\\])\n", text, re.DOTALL)
    _, *flags = shlex.split(command.replace("\\\n", " "))
    words = run_script(read("slurm.sbatch"), tmp_path, *flags).of("srun")
    config = resolve(words[1:])
    assert (config.task, config.rl.slots, config.train.max_steps) == ("grpo", 128, 500)


@pytest.mark.parametrize(
    ("code", "progress", "is_requeued"),
    [
        ("0", "yes", False),
        ("143", "", True),  # the time limit came before the first checkpoint
        ("134", "yes", True),
        ("1", "", False),
        *((str(code), "yes", False) for code in sorted(NOT_RETRYABLE)),
    ],
)
def test_slurm_job_is_requeued_after_retryable_codes(
    tmp_path: Path, code: str, progress: str, *, is_requeued: bool
) -> None:
    # The stubs of srun and scontrol exit with the same code; that of scontrol is ignored.
    result = run_script(read("slurm.sbatch"), tmp_path, CODE=code, PROGRESS=progress)
    requeues = [words for words in result.calls if words[0] == "scontrol"]
    assert requeues == ([["scontrol", "requeue", "7"]] if is_requeued else [])
    assert result.code == int(code)


def test_jax_variables_exist() -> None:
    sources = [
        *(Path(jax.__file__).parent / "_src" / "clusters").glob("*.py"),
        Path(jax.__file__).parent / "_src" / "distributed.py",
        Path(tjx_parallel.multiprocess.startup.__file__),
    ]
    known = {
        name
        for source in sources
        for name in re.findall(r"""["'](JAX_[A-Z_]+)["']""", source.read_text(encoding="utf-8"))
    }
    assert {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_COORDINATOR_PORT"} <= known
    texts = [path.read_text(encoding="utf-8") for path in FILES]
    texts.append((ROOT / "docs" / "distributed_training.md").read_text(encoding="utf-8"))
    named = {name for text in texts for name in re.findall(r"\bJAX_[A-Z_]+\b", text)}
    # JAX reads configuration options by their lower-case names.
    options = {name for name in named if hasattr(jax.config, name.lower())}
    assert named - options <= known


def test_jobs_do_not_retry_final_exit_codes() -> None:
    assert {2, 3, 4, 7, 10} == NOT_RETRYABLE
    (case,) = re.findall(r"^ +([\d |]+)\) exit", read("slurm.sbatch"), re.MULTILINE)
    assert {int(code) for code in case.split("|")} == {0, *NOT_RETRYABLE}
    (rule,) = jobset()["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert set(rule["onExitCodes"]["values"]) == NOT_RETRYABLE
    assert rule["onExitCodes"]["containerName"] == container()["name"]
    recovery = yaml.safe_load(read("skypilot.yaml"))["resources"]["job_recovery"]
    assert NOT_RETRYABLE.isdisjoint(recovery["recover_on_exit_codes"])
    assert ExitCode.TERMINATED in recovery["recover_on_exit_codes"]


@pytest.mark.parametrize("file", JOBSETS)
def test_jobset_pods_connect_to_pod_zero(file: str) -> None:
    whole = jobset(file)
    spec, name = whole["spec"], whole["metadata"]["name"]
    (job,) = spec["replicatedJobs"]
    given = {each["name"]: each.get("value") for each in container(file)["env"]}
    count = job["template"]["spec"]["completions"]
    assert job["replicas"] == 1
    assert job["template"]["spec"]["completionMode"] == "Indexed"
    assert job["template"]["spec"]["parallelism"] == count == int(given["JAX_NUM_PROCESSES"])
    host, port = given["JAX_COORDINATOR_ADDRESS"].split(":")
    assert host == f"{name}-{job['name']}-0-0.{spec['network']['subdomain']}"
    assert f"--distributed.bind_address=$(POD_IP):{port}" in container(file)["args"]
