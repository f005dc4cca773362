"""The example job files under docs/jobs ask for what there is."""

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
from tjx_trainer.cli.command_line import resolve
from tjx_trainer.runtime.exit_codes import EXIT_INFO, ExitCode

ROOT = Path(__file__).resolve().parents[1]
JOBS = ROOT / "docs" / "jobs"
FILES = sorted(path for path in JOBS.iterdir() if path.name != "BUILD")
SCRIPTS = ("slurm.sbatch", "tpu.sh")

# With these another start would end alike; the others that nothing follows were asked for.
WRONG = {
    int(code)
    for code, meaning in EXIT_INFO.items()
    if not meaning.again
    and code not in (ExitCode.FINISHED, ExitCode.GAVE_UP, ExitCode.INTERRUPTED, ExitCode.TERMINATED)
}


def read(name: str) -> str:
    return (JOBS / name).read_text(encoding="utf-8")


def jobset() -> Any:
    return yaml.safe_load(read("jobset.yaml"))["spec"]


def container() -> Any:
    (container,) = jobset()["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ]
    return container


@dataclass(frozen=True)
class Played:
    """What a script did where the programs that it calls only note what they are given."""

    code: int
    calls: list[list[str]]

    def of(self, program: str) -> list[str]:
        """Return the words of the one call of a program."""
        (words,) = [words for name, *words in self.calls if name == program]
        return words


# Ends with CODE; with PROGRESS set it has made a checkpoint before.
NOTE = """#!/usr/bin/env bash
printf '%s\\0' "$(basename "$0")" "$@" >> "$NOTES"; printf '\\n' >> "$NOTES"
[ -z "${PROGRESS:-}" ] || mkdir -p "$RUN_DIR/checkpoints/200"
exit "${CODE:-0}"
"""


def play(script: str, folder: Path, *words: str, **variables: str) -> Played:
    """Run a script in Bash, the programs of clusters being ones that take notes."""
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
    return Played(done.returncode, calls)


def trainer_words(name: str, folder: Path) -> list[str]:
    """Return the words that a job file gives to the trainer."""
    if name == "jobset.yaml":
        words = [*container()["command"], *container()["args"]]
    elif name == "slurm.sbatch":
        words = play(read(name), folder).of("srun")
    elif name == "tpu.sh":
        call = play(read(name), folder, "tpu").of("gcloud")
        words = shlex.split(call[call.index("--command") + 1])
    else:
        words = ["tjx-train", *play(yaml.safe_load(read(name))["run"], folder).of("tjx-train")]
    assert words.pop(0) == "tjx-train"
    return words


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_bash(name: str) -> None:
    subprocess.run(["bash", "-n", JOBS / name], check=True)


def test_the_run_of_a_yaml_file_is_bash() -> None:
    task = yaml.safe_load(read("skypilot.yaml"))
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)


@pytest.mark.parametrize("name", [path.name for path in FILES])
def test_each_calls_the_trainer_with_flags_that_it_takes(name: str, tmp_path: Path) -> None:
    config = resolve(trainer_words(name, tmp_path))  # every flag is there, and they go together
    assert config.run_dir is not None  # so that the next start goes on with it
    assert config.distributed.heartbeat_timeout < 100


@pytest.mark.parametrize(
    ("code", "progress", "comes_back"),
    [
        ("0", "yes", False),
        ("143", "", True),  # its time was over before the first checkpoint
        ("134", "yes", True),
        ("1", "", False),
        *((str(code), "yes", False) for code in sorted(WRONG)),
    ],
)
def test_a_job_of_slurm_comes_back_where_that_helps(
    tmp_path: Path, code: str, progress: str, *, comes_back: bool
) -> None:
    # What tells srun's end to the script is the same for scontrol, whose code nobody reads.
    played = play(read("slurm.sbatch"), tmp_path, CODE=code, PROGRESS=progress)
    asked = [words for words in played.calls if words[0] == "scontrol"]
    assert asked == ([["scontrol", "requeue", "7"]] if comes_back else [])
    assert played.code == int(code)


def test_variables_of_jax_are_those_that_somebody_reads() -> None:
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
    # Options of JAX's configuration are read by their names in small letters.
    options = {name for name in named if hasattr(jax.config, name.lower())}
    assert named - options <= known


def test_they_do_not_start_again_what_would_end_alike() -> None:
    assert {2, 3, 4, 7, 10} == WRONG
    (case,) = re.findall(r"^ +([\d |]+)\) exit", read("slurm.sbatch"), re.MULTILINE)
    assert {int(code) for code in case.split("|")} == {0, *WRONG}
    (rule,) = jobset()["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert set(rule["onExitCodes"]["values"]) == WRONG
    assert rule["onExitCodes"]["containerName"] == container()["name"]
    recovery = yaml.safe_load(read("skypilot.yaml"))["resources"]["job_recovery"]
    assert WRONG.isdisjoint(recovery["recover_on_exit_codes"])
    assert ExitCode.TERMINATED in recovery["recover_on_exit_codes"]


def test_the_pods_of_the_jobset_find_the_first_of_them() -> None:
    spec = jobset()
    (job,) = spec["replicatedJobs"]
    name = yaml.safe_load(read("jobset.yaml"))["metadata"]["name"]
    given = {each["name"]: each.get("value") for each in container()["env"]}
    count = job["template"]["spec"]["completions"]
    assert job["replicas"] == 1
    assert job["template"]["spec"]["completionMode"] == "Indexed"
    assert job["template"]["spec"]["parallelism"] == count == int(given["JAX_NUM_PROCESSES"])
    host, port = given["JAX_COORDINATOR_ADDRESS"].split(":")
    assert host == f"{name}-{job['name']}-0-0.{spec['network']['subdomain']}"
    assert f"--distributed.bind_address=$(POD_IP):{port}" in container()["args"]
