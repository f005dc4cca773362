"""The command `tjx-optim schedule`: table, plot and error messages."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tjx_optim import ScheduleConfig, learning_rates
from tjx_optim.main import main
from tjx_optim.schedule_plot import plot_schedules

WSD = ["schedule", "--name", "wsd", "--warmup_steps", "100", "--max_steps", "1000"]


def rows(text: str) -> list[list[str]]:
    return [line.split("  ") for line in text.splitlines()[1:] if not line.startswith("wrote")]


def table(text: str) -> dict[tuple[str, str], Any]:
    """Read the table back: (schedule, place) to (step, rate)."""
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows(text)]
    return {(name, at): (int(step), float(rate)) for name, at, step, rate in cells}


def error_of(capsys: Any, *words: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(["schedule", *words])
    assert left.value.code == 2
    first, *_, last = capsys.readouterr().err.splitlines()
    assert last == "`tjx-optim schedule --help` lists every flag."
    return str(first)


def pixels(file: Path) -> np.ndarray[Any, Any]:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def shows(file: Path, color: str) -> bool:
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return bool((np.abs(pixels(file) - rgb[None, None, :]).sum(axis=-1) < 12).sum() > 100)


def test_the_table_has_the_rates_at_start_warm_up_middle_and_end(capsys: Any) -> None:
    assert main([*WSD, "--learning_rate", "3e-4", "--final_fraction", "0"]) == 0
    found = table(capsys.readouterr().out)
    want = {
        ("wsd", "start"): (0, 3e-4 / 101),
        ("wsd", "end of warm-up"): (100, 3e-4),
        ("wsd", "middle"): (500, 3e-4),
        ("wsd", "end"): (999, 3e-4 / 200),  # a fifth of the run falls, and 1 step of it is left
    }
    assert found.keys() == want.keys()
    for at, (step, rate) in want.items():
        assert found[at] == (step, pytest.approx(rate, rel=1e-5))


def test_each_schedule_uses_the_flags_that_apply_to_it(capsys: Any) -> None:
    words = "--name wsd --name cosine --name piecewise --max_steps 50 --cooldown_steps 25"
    words += " --boundaries 0.5,0.9 --factors 0.5,0.25"
    assert main(["schedule", *words.split()]) == 0
    found = table(capsys.readouterr().out)
    assert found["wsd", "middle"] == (25, 1.0)
    assert found["cosine", "middle"] == (25, pytest.approx(0.55))
    assert found["piecewise", "middle"] == (25, 0.5)
    assert found["piecewise", "end"] == (49, 0.25)
    assert not any(at == "end of warm-up" for _, at in found)


def test_boundaries_are_steps_or_fractions(capsys: Any) -> None:
    words = ["schedule", "--name", "piecewise", "--factors", "0.5,0.25", "--max_steps", "100"]
    main([*words, "--boundaries", "50,99"])
    in_steps = capsys.readouterr().out
    main([*words, "--boundaries", "0.5,0.99"])
    assert capsys.readouterr().out == in_steps
    assert table(in_steps)["piecewise", "end"] == (99, 0.25)


def test_the_plot_has_every_schedule(tmp_path: Path, capsys: Any) -> None:
    blue, orange = "#0072B2", "#D55E00"
    one, two, pdf = tmp_path / "one.png", tmp_path / "new" / "two.png", tmp_path / "two.pdf"
    assert main([*WSD, "--picture", str(one)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {one}"
    main([*WSD, "--name", "cosine", "--picture", str(two)])
    main([*WSD, "--name", "cosine", "--picture", str(pdf)])
    assert shows(one, blue)
    assert not shows(one, orange)
    assert shows(two, blue)
    assert shows(two, orange)
    assert pdf.read_bytes().startswith(b"%PDF")


def test_a_jump_is_vertical_for_long_runs(tmp_path: Path) -> None:
    # Only some of the 10^7 steps are plotted.
    config = ScheduleConfig(name="piecewise", boundaries=(5_000_003,), factors=(0.0,))
    run: Any = {"learning_rate": 1.0, "max_steps": 10**7}
    # As TeX, the label would be an error.
    plot_schedules({r"jump $\to$ 0 $\frac$": config}, tmp_path / "jump.png", **run)
    blue = (np.abs(pixels(tmp_path / "jump.png") - np.array([0, 114, 178])[None, None, :])).sum(-1)
    columns = np.flatnonzero((blue < 12).sum(axis=0) > 200)  # columns of a long upright line
    assert 1 <= len(columns) <= 8


def test_errors_suggest_the_nearest_name(capsys: Any) -> None:
    near = error_of(capsys, "--name", "wds", "--max_steps", "10")
    assert near.startswith("tjx-optim: --name: got 'wds'; expected one of constant, linear")
    assert near.endswith("did you mean wsd?")
    unknown = error_of(capsys, "--cooldown_step", "10", "--max_steps", "10")
    assert unknown == "tjx-optim: --cooldown_step: unknown flag; did you mean --cooldown_steps?"
    assert "required: --max_steps" in error_of(capsys, "--name", "wsd")
    stray = error_of(capsys, "--max_steps", "10", "cosine")
    assert stray == "tjx-optim: got 'cosine', which belongs to no flag"


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("--max_steps 1e3", "got '1e3'; expected a whole number, such as 100"),
        ("--max_steps 0", "max_steps: got 0; expected at least 1"),
        ("--max_steps 9 --learning_rate nan", "learning_rate: got nan; expected a finite number"),
        ("--max_steps 9 --boundaries 3,x", "got 'x'; expected a number"),
        (
            "--max_steps 9 --cooldown_steps 3",
            "cooldown_steps: got 3; expected None, since cosine does not use it",
        ),
        (
            "--max_steps 9 --name wsd --warmup_steps 5 --cooldown_steps 5",
            "got 5 steps in a run of max_steps=9; expected at most the 4",
        ),
        (
            "--max_steps 9 --picture a.bmp",
            "picture: got a.bmp; expected a name ending in .png, .pdf, .svg",
        ),
    ],
)
def test_invalid_values_are_reported(words: str, answer: str, capsys: Any) -> None:
    assert answer in error_of(capsys, *words.split())


def test_without_matplotlib_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = error_of(capsys, *WSD[1:], "--picture", str(tmp_path / "a.png"))
    assert message == "tjx-optim: picture: plots need the extra: pip install 'tjx-optim[plot]'"
    assert not list(tmp_path.iterdir())
    assert main(WSD) == 0  # the table needs none


def test_the_help_describes_every_field(capsys: Any) -> None:
    with pytest.raises(SystemExit) as left:
        main(["schedule", "--help"])
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in ScheduleConfig.__dataclass_fields__:
        assert f"--{name}" in text
    assert "Length of the cool-down of wsd, which ends at decay_steps. [none]" in text


def test_help_needs_no_jax_and_the_table_no_accelerator() -> None:
    code = (
        "import os, sys; from tjx_optim.main import main\n"
        "os.environ.pop('JAX_PLATFORMS', None)\n"
        "try: main(['schedule', '--help'])\n"
        "except SystemExit: assert 'jax' not in sys.modules\n"
        "main(['schedule', '--max_steps', '9'])\n"
        "import jax; assert jax.config.jax_platforms == 'cpu'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_number_of_schedules_in_a_plot_is_limited(tmp_path: Path) -> None:
    run: Any = {"learning_rate": 1.0, "max_steps": 10}
    for count in (0, 8):
        with pytest.raises(ValueError, match=f"schedules: got {count}; expected 1 to 7"):
            plot_schedules(
                {str(number): ScheduleConfig() for number in range(count)},
                tmp_path / "a.png",
                **run,
            )


def test_the_table_has_the_rates_of_training(capsys: Any) -> None:
    main(["schedule", "--name", "one_cycle", "--max_steps", "77", "--learning_rate", "0.5"])
    found = table(capsys.readouterr().out)
    want = learning_rates(ScheduleConfig(name="one_cycle"), learning_rate=0.5, max_steps=77)
    assert [want[step] for step, _ in found.values()] == [
        pytest.approx(rate, rel=1e-5) for _, rate in found.values()
    ]
