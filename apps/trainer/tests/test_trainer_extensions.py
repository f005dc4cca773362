"""Extensions: modules that the command line names are imported; files cause no import."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tjx_core import ConfigError
from tjx_nn.config import TransformerConfig
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.registry import registered_models
from tjx_trainer import extensions
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.config.config_tree import flatten, leaves
from tjx_trainer.extensions import register_task

MODULE = """
from tjx_trainer.extensions import register_task
register_task(__name__, lambda config, progress: (config, None))
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a package with a task outside of tjx, and remove all traces of its import."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "task.py").write_text(MODULE)
    (folder / "empty.py").write_text("")
    (folder / "broken.py").write_text("import no_such_library")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(extensions, "registered_tasks", extensions.registered_tasks)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "outside"]:
        del sys.modules[name]
    extensions.registered_tasks.clear()


def problems(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(argv)
    return str(caught.value)


def test_dotted_name_imports_its_module(package: Path) -> None:
    assert resolve(["--task", "outside.task"]).task == "outside.task"
    assert resolve(["--task=outside.task"]).task == "outside.task"
    (package.parent / "my.yaml").write_text("task: outside.task\n")
    # Once imported, files may name it.
    assert resolve(["--config", str(package.parent / "my.yaml")]).task == "outside.task"


def test_files_cause_no_import(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = package.parent / "my.yaml"
    file.write_text("task: outside.task\nlog:\n  trackers: [wandb, outside.empty]\n")
    said = problems("--config", str(file))
    assert "outside" not in sys.modules
    assert "got task outside.task, log.trackers outside.empty; expected modules that are" in said
    assert said.endswith("set the environment variable TJX_EXTENSIONS=outside.task,outside.empty")
    monkeypatch.setenv("TJX_EXTENSIONS", "outside.task,outside.empty")
    assert "trackers: got 'outside.empty'" in problems("--config", str(file))
    file.write_text("task: outside.task\n")
    assert resolve(["--config", str(file)]).task == "outside.task"


def test_value_of_another_type_in_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("log: {metrics: [[a.b]]}")
    with pytest.raises(ConfigError, match=r"log\.metrics: expected one value"):
        resolve(["--config", str(tmp_path / "x.yaml")])


def test_errors_name_the_known_names_and_the_register_function(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_task("sorting", lambda config, _: (config, None))
    said = problems("--task", "outside.empty")
    expected = "expected one of none, sft, grpo, dpo, kto, sorting; add it with "
    assert f"task: got 'outside.empty'; {expected}" in said
    assert "register_task" in said
    assert "did you mean sorting?" in problems("--task", "sortin")
    with pytest.raises(ValueError, match=r"name: got 'sft'; expected a name that is not built in"):
        register_task("sft", lambda config, _: (config, None))
    said = problems("--task", "outsid.task")
    assert "--task: got outsid.task; expected a module that can be imported (No module" in said
    for flag, register in {
        "model.family": "tjx_nn.register",
        "optimizer.name": "tjx_optim.register_optimizer",
        "schedule.name": "tjx_optim.register_schedule",
        "log.trackers": "tjx_metrics.register_tracker",
        "log.metrics": "tjx_metrics.register_metric",
    }.items():
        assert f"; add it with {register}" in problems(f"--{flag}", "outside.empty"), flag
    monkeypatch.setenv("TJX_EXTENSIONS", "nowhere")
    assert "TJX_EXTENSIONS: got nowhere; expected a module" in problems()


@pytest.mark.usefixtures("package")
def test_error_inside_of_a_module_propagates() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        resolve(["--task", "outside.broken"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class WideConfig(GPTConfig):
    """Subclass of a built-in family."""

    family: str = "wide"  # type: ignore[assignment]
    width: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherConfig(TransformerConfig):
    """Own family."""

    family: str = "other"


def test_fields_of_registered_families_are_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "model.width" not in leaves()
    assert "model.width: got a value" not in problems("--model.width", "5")
    monkeypatch.setitem(registered_models, WideConfig, object)
    monkeypatch.setitem(registered_models, OtherConfig, object)
    config = resolve(["--model.family", "wide", "--model.width", "5"])
    assert isinstance(config.model, WideConfig)
    assert flatten(config)["model.width"] == 5
    said = problems("--model.width", "5")
    assert "expected wide; leave it out, or give --model.family" in said
    assert "task: got none with model.family other; expected a registered task" in problems(
        "--model.family", "other"
    )
