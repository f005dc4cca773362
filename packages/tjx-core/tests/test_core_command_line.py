"""Command lines: all mistakes at once, suggestions, exit codes."""

from argparse import Namespace

import pytest

from tjx_core import CommandParser, ConfigError, one_of, whole_number


def parser() -> CommandParser:
    top = CommandParser(prog="tool", description="A tool.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="show")
    show.add_argument("folder", metavar="DIR")
    show.add_argument("--step", type=whole_number(1))
    show.add_argument("--dtype", choices=["float32", "bfloat16"])
    show.add_argument("--out", required=True)
    commands.add_parser("verify", help="verify").add_argument("--quick", action="store_true")
    return top


def read(line: str, tool: CommandParser | None = None) -> Namespace:
    return (tool or parser()).read(line.split())


def problems(line: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(line)
    return [str(problem) for problem in caught.value.problems]


def test_values_are_converted() -> None:
    arguments = read("show here --step 7 --dtype bfloat16 --out x")
    assert (arguments.step, arguments.dtype, arguments.folder) == (7, "bfloat16", "here")


def test_every_wrong_value_and_flag_is_reported_with_its_path() -> None:
    assert problems("show here --step 0 --dtype float --oout x") == [
        "--step: got '0'; expected a whole number of at least 1",
        "--dtype: got 'float'; expected one of float32, bfloat16; did you mean float32?",
        "--oout: unknown flag; did you mean --out?",
    ]
    with pytest.raises(ConfigError) as caught:
        read("show here --step 0 --out x")
    assert [problem.path for problem in caught.value.problems] == ["--step"]


def test_a_missing_value_is_reported_beside_wrong_ones() -> None:
    assert problems("show here --step 0") == [
        "--step: got '0'; expected a whole number of at least 1",
        "the following arguments are required: --out",
    ]
    assert problems("show here --out") == ["--out: expected one argument"]


def test_an_unknown_command_is_answered_with_the_nearest() -> None:
    assert problems("sow here") == [
        "COMMAND: got 'sow'; expected one of show, verify; did you mean show?"
    ]


def test_flags_of_another_command_are_not_suggested() -> None:
    assert problems("show here --out x --quik") == ["--quik: unknown flag"]


def test_abbreviated_flags_and_stray_words_are_mistakes() -> None:
    assert problems("show here --out x --ste 3") == ["--ste: unknown flag; did you mean --step?"]
    assert problems("show here there --out x") == ["got 'there', which belongs to no flag"]


def test_a_parser_can_read_again_after_a_mistake() -> None:
    tool = parser()
    with pytest.raises(ConfigError):
        read("show here --step x --out x", tool)
    assert read("show here --step 2 --out x", tool).step == 2


def test_parse_args_prints_each_mistake_and_exits_with_code_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(["show", "here", "--step", "x", "--out", "y", "--jsn"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "tool: --step: got 'x'; expected a whole number of at least 1",
        "tool: --jsn: unknown flag",
        "`tool show --help` lists every flag.",
    ]


@pytest.mark.parametrize("text", ["", "-1", "1.5", "²", "٣", "1" * 5000])
def test_whole_numbers_are_plain_digits(text: str) -> None:
    with pytest.raises(ValueError, match="expected a whole number of at least 0"):
        whole_number(0)(text)


def test_one_of_accepts_its_choices() -> None:
    assert one_of(["a", "b"])("b") == "b"
