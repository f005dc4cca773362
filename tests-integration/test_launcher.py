"""Launcher `./pants`, tested with stub interpreters: no network, no real installation.

The stub replaces a CPython with its venv, pip and pex. It logs one line for each installation, and
its arguments when it runs as Pants.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

# In a Pants sandbox the launcher is at the sandbox root, as in the checkout.
LAUNCHER = Path(os.environ.get("TJX_LAUNCHER") or Path(__file__).resolve().parents[1] / "pants")

# Programs that the launcher may call besides the interpreters; its PATH has no others.
TOOLS = ["awk", "cat", "cksum", "cp", "cut", "df", "dirname", "grep", "head", "mkdir", "mv", "rm"]
TOOLS += ["sed", "sh", "sha256sum", "sleep", "tail", "tr", "uname"]

STUB = r"""#!/bin/sh
install() {
  echo "$1" >>"$STUB_DIR/installs"
  [ ! -e "$STUB_DIR/pip-sleeps" ] || sleep "$(cat "$STUB_DIR/pip-sleeps")"
  if [ -e "$STUB_DIR/fail-${1%%=*}" ]; then cat "$STUB_DIR/fail-${1%%=*}" >&2; exit 1; fi
  case $1 in
    pantsbuild*) : >"$2/pants" ;;
    uv) cp "$0" "$2/uv" ;;
  esac
}
case "$*" in
  *sys.version_info*)  # the probe: -I -c CODE VERSION [MODULE...]
    [ "$4" = VERSION ] || [ "$4" = 3 ] || exit 1
    printf '%s\n' "$0" ;;
  "-I -c "*) exec "REAL_PYTHON" "$@" ;;  # the lock and the digest are real
  *"-m venv "*)
    while [ $# -gt 1 ]; do shift; done
    mkdir -p "$1/bin" && cp "$0" "$1/bin/python" ;;
  *"-m pip install "*)
    while [ $# -gt 1 ]; do shift; done
    install "$1" "${0%/*}" ;;
  "pip install --python "*)
    [ ! -e "$STUB_DIR/fail-by-uv" ] || exit 1
    install "$5" "${4%/*}" ;;
  *fetch_wheels.py*)
    install wheels && mkdir -p "$4" ;;
  *"-m pex "*)
    while [ $# -gt 1 ]; do shift; done
    echo "a pex file" >"$1" ;;
  */bin/pants*)
    exec "REAL_PYTHON" -c 'import json, os, sys
with open(os.environ["STUB_DIR"] + "/pants.json", "w") as file:
    json.dump({"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}, file)
sys.exit(int(os.environ.get("STUB_EXIT", "0")))' "$@" ;;
  *) echo "the stub does not know: $*" >&2; exit 99 ;;
esac
"""


class Machine:
    """Simulated machine: home, PATH, a checkout whose path has spaces, stub interpreters."""

    def __init__(self, folder: Path):
        self.home = folder / "home"
        self.checkout = folder / "a check out"
        self.bin = folder / "bin"
        self.stub = folder / "stub"
        tools = folder / "tools"
        locks = self.checkout / "tools/locks"
        for new in (self.home, self.checkout / "sub", locks, self.bin, self.stub, tools):
            new.mkdir(parents=True)
        for name in TOOLS:
            path = shutil.which(name)
            assert path, f"this machine has no {name}"
            (tools / name).symlink_to(path)
        shutil.copy(LAUNCHER, self.checkout / "pants")
        (locks / "cpu.txt").write_text("numpy==2.5.5\n")
        self.env = {
            "HOME": str(self.home),
            "PATH": f"{self.bin}:{tools}",
            "STUB_DIR": str(self.stub),
        }

    def add_python(self, version: str, folder: Path | None = None) -> Path:
        text = STUB.replace("VERSION", version).replace("REAL_PYTHON", sys.executable)
        return self.add_program(f"python{version}", text, folder)

    def add_program(self, name: str, text: str, folder: Path | None = None) -> Path:
        path = (folder or self.bin) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def start(self, *arguments: str, cwd: Path | None = None, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.checkout / "pants"), *arguments],
            cwd=cwd or self.checkout,
            env=self.env | env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def run(self, *arguments: str, cwd: Path | None = None, **env: str) -> tuple[int, str]:
        """Run the launcher; return exit code and standard error."""
        process = self.start(*arguments, cwd=cwd, **env)
        out, err = process.communicate(timeout=60)
        assert out == "", "standard output belongs to Pants"
        return process.returncode, err

    def fails(self, **env: str) -> str:
        """Return the message of a run that must fail before starting Pants."""
        code, err = self.run("test", "::", cwd=None, **env)
        assert code == 1
        assert all(line.startswith("pants: ") for line in err.splitlines())
        assert not (self.stub / "pants.json").exists()
        return err

    @property
    def installs(self) -> list[str]:
        """What was installed, sorted: downloads run beside installations."""
        file = self.stub / "installs"
        return sorted(file.read_text().split()) if file.exists() else []

    @property
    def seen(self) -> Any:
        """Arguments, environment and working directory of the last run of Pants."""
        return json.loads((self.stub / "pants.json").read_text())

    @property
    def cache(self) -> Path:
        (found,) = (self.home / ".cache" / "tjx").glob("pants-*")
        return found


@pytest.fixture
def bare(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def machine(bare: Machine) -> Machine:
    """Return a machine with both interpreters on PATH."""
    bare.add_python("3.9")
    bare.add_python("3.12")
    return bare


PANTS, PEX = "pantsbuild.pants==2.17.1", "pex==2.98.4"
ALL = [PANTS, PEX, "uv", "wheels"]


def test_an_invocation_during_another_one_runs_without_the_daemon(machine: Machine) -> None:
    assert machine.run("test", "::")[0] == 0
    (client,) = machine.cache.glob("client-*.pid")
    ended = int(client.read_text())
    assert "PANTS_CONCURRENT" not in machine.seen["env"]
    client.write_text(f"{os.getpid()}\n")  # a process that runs
    assert machine.run("test", "::")[0] == 0
    assert machine.seen["env"]["PANTS_CONCURRENT"] == "true"
    assert client.read_text() == f"{os.getpid()}\n"
    client.write_text(f"{ended}\n")
    assert machine.run("test", "::")[0] == 0
    assert "PANTS_CONCURRENT" not in machine.seen["env"]
    assert int(client.read_text()) != ended


def test_arguments_and_exit_code_pass_unchanged(machine: Machine) -> None:
    arguments = ["test", "a b::", "", "*", "--x=$HOME 'q' \"r\"", "--", "-v", "two\nlines"]
    for _ in ("cold", "warm"):
        code, _ = machine.run(*arguments, STUB_EXIT="37")
        assert code == 37
        assert machine.seen["argv"] == [str(machine.cache / "venv/bin/pants"), *arguments]


def test_pants_gets_the_pex_that_was_built_and_the_interpreter(machine: Machine) -> None:
    elsewhere = machine.home / "elsewhere"
    (machine.bin / "python3.12").unlink()
    machine.add_python("3.12", elsewhere / ".pyenv/versions/3.12.1/bin")
    machine.run(PYENV_ROOT=str(elsewhere / ".pyenv"), PYTHONPATH="/x", PYTHONHOME="/y", OTHER="z")
    env = machine.seen["env"]
    url = env["PANTS_PEX_CLI_URL_TEMPLATE"]
    assert url.startswith("file:///")
    data = Path(url.removeprefix("file://")).read_bytes()
    digest = f"{hashlib.sha256(data).hexdigest()}|{len(data)}"
    platforms = ["linux_x86_64", "linux_arm64", "macos_x86_64", "macos_arm64"]
    # Pants evaluates the list as Python.
    assert json.loads(env["PANTS_PEX_CLI_KNOWN_VERSIONS"].replace(", ]", "]")) == [
        f"v2.98.4|{platform}|{digest}" for platform in platforms
    ]
    assert env["PANTS_PEX_CLI_VERSION"] == "v2.98.4"
    assert env["PATH"] == f"{machine.env['PATH']}:{elsewhere}/.pyenv/versions/3.12.1/bin"
    assert env["OTHER"] == "z"
    assert not {"PYTHONPATH", "PYTHONHOME"} & set(env)


def test_mypys_cache_of_the_checkout_exists(machine: Machine) -> None:
    machine.run("check")
    checkout = hashlib.sha256(bytes(machine.checkout)).hexdigest()
    caches = machine.home / ".cache" / "pants" / "named_caches"
    assert (caches / "mypy_cache" / checkout / "3.12").is_dir()


def test_current_folder_stays_inside_the_checkout(machine: Machine) -> None:
    machine.run(cwd=machine.checkout / "sub")
    assert machine.seen["cwd"] == str(machine.checkout / "sub")
    machine.run(cwd=machine.home)
    assert machine.seen["cwd"] == str(machine.checkout)


def test_warm_run_installs_nothing_and_needs_no_python_on_path(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = machine.run()
    assert (code, machine.installs) == (0, ALL)
    assert all(line.startswith("pants: first run") for line in err.splitlines())
    (machine.bin / "python3.9").write_text("#!/bin/sh\nexit 1\n")
    fake = machine.cache / "venv/bin/python"
    fake.write_text("#!/bin/sh\n")  # measures the launcher only
    start = time.perf_counter()
    runs = 10
    for _ in range(runs):
        assert machine.run() == (0, "")
    took = (time.perf_counter() - start) / runs
    assert machine.installs == ALL
    with capsys.disabled():
        print(f"[the launcher's own time, warm: {1000 * took:.0f} ms]", end=" ")  # noqa: T201  the figure is the point


def test_folder_is_recreated_if_its_interpreter_is_gone(machine: Machine) -> None:
    machine.run()
    (machine.cache / "venv/bin/python").unlink()
    assert machine.run()[0] == 0
    assert machine.installs == [PANTS, *ALL]


def test_interpreter_of_the_code_may_move(machine: Machine) -> None:
    machine.run()
    (machine.bin / "python3.12").unlink()
    moved = machine.add_python("3.12", machine.home / ".pyenv/versions/3.12.9/bin")
    assert machine.run() == (0, "")
    assert machine.seen["env"]["PATH"].endswith(f":{moved.parent}")
    assert machine.installs == ALL


def test_two_first_runs_at_once_install_once(machine: Machine) -> None:
    (machine.stub / "pip-sleeps").write_text("1")
    both = [machine.start("--version") for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert machine.installs == ALL
    assert sum("waiting for it" in err for err in errors) >= 1


def test_killed_installation_is_repeated(machine: Machine) -> None:
    sleeps = machine.stub / "pip-sleeps"
    sleeps.write_text("60")
    process = machine.start()
    deadline = time.monotonic() + 30
    while not machine.installs and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    half = machine.cache / "tools/bin/half-written"
    half.touch()
    sleeps.unlink()
    assert machine.run()[0] == 0
    assert machine.installs == sorted([*ALL, "uv"])
    assert not half.exists()


def test_failing_pyenv_shim_is_skipped(bare: Machine) -> None:
    bare.add_program(
        "python3.9", "#!/bin/sh\necho 'pyenv: python3.9: command not found' >&2\nexit 127\n"
    )
    bare.add_python("3.9", bare.home / ".pyenv/versions/3.9.18/bin")
    bare.add_python("3.12")
    assert bare.run()[0] == 0
    assert bare.installs == ALL


@pytest.mark.parametrize("version", ["3.9", "3.12"])
def test_missing_interpreter_error_says_what_to_install(machine: Machine, version: str) -> None:
    (machine.bin / f"python{version}").unlink()
    machine.add_program("uv", "#!/bin/sh\necho 'no network' >&2\nexit 1\n")
    (machine.stub / "fail-uv").write_text("no network")
    err = machine.fails()
    assert f"no working CPython {version} was found" in err
    assert f"uv python install {version}" in err
    assert f"apt install python{version}" in err
    assert PANTS not in machine.installs, "the slow part comes after the check"


def test_no_python_at_all(bare: Machine) -> None:
    assert "no working CPython 3.9 was found" in bare.fails()


def test_broken_interpreter_is_named_with_its_reason(machine: Machine) -> None:
    trace = "Traceback (most recent call last):\nModuleNotFoundError: No module named 'ensurepip'"
    broken = machine.add_program("python3.9", f'#!/bin/sh\nprintf "%s\\n" "{trace}" >&2\nexit 1\n')
    (machine.stub / "fail-uv").write_text("no network")
    err = machine.fails()
    assert (
        f"found, but not usable: {broken} (ModuleNotFoundError: No module named 'ensurepip')" in err
    )
    assert "python3.9-venv" in err


def test_interpreter_of_uv_is_used(machine: Machine) -> None:
    (machine.bin / "python3.12").unlink()
    managed = machine.add_python("3.12", machine.home / "uv/cpython-3.12/bin")
    machine.add_program(
        "uv",
        f'#!/bin/sh\ncase "$*" in "python find"*" 3.12") echo "{managed}" ;; *) exit 1 ;; esac\n',
    )
    assert machine.run()[0] == 0
    assert machine.seen["env"]["PATH"].endswith(f":{managed.parent}")


def test_offline_error_and_rerun(machine: Machine) -> None:
    noise = "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError'\n"
    failing = machine.stub / "fail-pex"
    failing.write_text(noise + "ERROR: No matching distribution found for pex==2.98.4\n")
    err = machine.fails()
    assert "the package index could not be reached: building pex 2.98.4 failed" in err
    assert "Run ./pants again" in err
    failing.unlink()
    assert machine.run()[0] == 0
    # uv and then pip tried to install pex; what was whole is kept.
    assert machine.installs == sorted([*ALL, PEX, PEX])


def test_pip_installs_if_uv_fails(machine: Machine) -> None:
    (machine.stub / "fail-by-uv").touch()
    assert machine.run()[0] == 0
    assert machine.installs == ALL


def test_pants_finds_the_wheels_of_the_locks(machine: Machine) -> None:
    machine.run()
    folder = machine.home / ".cache/tjx/wheels"
    assert machine.seen["env"]["PANTS_PYTHON_REPOS_FIND_LINKS"] == f"['file://{folder}']"
    assert machine.seen["env"]["PANTS_PYTHON_REPOS_INDEXES"] == "[]"
    (machine.checkout / "tools/locks/cpu.txt").write_text("numpy==2.5.6\n")
    assert machine.run()[0] == 0
    assert machine.installs == [*ALL, "wheels"]


def test_other_locks_use_the_index(machine: Machine) -> None:
    machine.run("--pants-config-files=pants.cuda13.toml", "test", "::")
    assert "PANTS_PYTHON_REPOS_INDEXES" not in machine.seen["env"]


def test_pants_uses_the_index_without_wheels(machine: Machine) -> None:
    (machine.stub / "fail-wheels").write_text("ValueError: jax 0.11.2 has another SHA-256\n")
    code, err = machine.run()
    assert code == 0
    assert "ValueError: jax 0.11.2 has another SHA-256" in err
    assert "Pants downloads the files itself" in err
    assert "PANTS_PYTHON_REPOS_INDEXES" not in machine.seen["env"]


def test_full_disk_error_names_the_folder_and_free_space(machine: Machine) -> None:
    (machine.stub / "fail-pantsbuild.pants").write_text(
        "ERROR: [Errno 28] No space left on device\n"
    )
    err = machine.fails()
    assert "the disk is full: installing Pants 2.17.1 failed" in err
    assert f"{machine.cache} has " in err
    assert "MB free" in err


def test_any_other_failure_shows_the_end_of_the_output(machine: Machine) -> None:
    (machine.stub / "fail-pantsbuild.pants").write_text("ERROR: something odd\n")
    code, err = machine.run()
    assert code == 1
    assert "ERROR: something odd\n" in err
    assert f"pants: installing Pants 2.17.1 failed. The whole output is in {machine.cache}" in err


@pytest.mark.parametrize(
    ("system", "words"),
    [
        ("FreeBSD amd64", "not on FreeBSD amd64"),
        ("Linux riscv64", "not on Linux riscv64"),
        ("MINGW64_NT-10.0 x86_64", "WSL 2"),
    ],
)
def test_unsupported_platforms(machine: Machine, system: str, words: str) -> None:
    machine.add_program("uname", f"#!/bin/sh\necho '{system}'\n")
    assert words in machine.fails()
    assert list(machine.home.iterdir()) == []


@pytest.mark.parametrize("system", ["Linux aarch64", "Darwin arm64", "Darwin x86_64"])
def test_each_platform_has_its_own_folder(machine: Machine, system: str) -> None:
    machine.add_program("uname", f"#!/bin/sh\necho '{system}'\n")
    assert machine.run()[0] == 0
    os_name, arch = system.lower().replace("darwin", "macos").replace("aarch64", "arm64").split()
    assert machine.cache.name == f"pants-2.17.1-pex-2.98.4-{os_name}_{arch}"


def test_unusable_home(machine: Machine) -> None:
    assert "neither HOME nor XDG_CACHE_HOME is set" in machine.fails(HOME="")
    a_file = machine.home / "file"
    a_file.touch()
    err = machine.fails(HOME=str(a_file))
    assert f"cannot write to {a_file}/" in err
    assert "XDG_CACHE_HOME" in err
    assert "special character" in machine.fails(HOME=str(machine.home / "with space"))


def test_xdg_cache_home(machine: Machine) -> None:
    wanted = machine.home / "my-cache"
    assert machine.run(XDG_CACHE_HOME=str(wanted))[0] == 0
    assert (wanted / "tjx").is_dir()
    assert not (machine.home / ".cache").exists()


def test_the_checkout_stays_clean(machine: Machine) -> None:
    machine.run()
    assert sorted(path.name for path in machine.checkout.iterdir()) == ["pants", "sub", "tools"]
