"""``--nanogpt``: translate the arguments of nanoGPT's train.py to the trainer's."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tjx_core import ConfigError, Problem, did_you_mean, nearest_name
from tjx_data.corpora.registry import CORPORA
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.cli.nanogpt.config_files import BUNDLED_CONFIGS, read_config_file, unknown_names
from tjx_trainer.cli.nanogpt.flags import (
    FLAGS,
    GPT2_CONTEXT,
    GPT2_SIZES,
    INIT_FROM,
    PRECISIONS,
    corpus_of,
    from_config_values,
    has_token_files,
    input_file,
    to_config_values,
)
from tjx_trainer.cli.values import convert, format_value
from tjx_trainer.config.config_tree import Leaf, flatten, leaves
from tjx_trainer.config.presets import RawValue, suggest_names
from tjx_trainer.config.run_config import GPT2_VOCAB_SIZE

MODE = "--nanogpt"
BASE_PRESET = "nanogpt"

_CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")

# The trainer's own flags that are accepted too, besides names with a dot.
_OWN = ("seed", "name", "run_dir", "supervise", "dry_run")  # nanoGPT has eval_only
# Fields of --dataset that do not apply if the data are given by the trainer's own flags.
_FOLLOW_DATASET = ("data.path", "data.corpus", "model.vocab_size")
# Model sizes, which a checkpoint determines, and their field in the configuration.
_SIZES = {
    "n_layer": "model.n_layer",
    "n_head": "model.n_head",
    "n_embd": "model.d_model",
    "bias": "model.bias",
    "block_size": "model.max_seq_len",
}


@dataclass(frozen=True)
class Translation:
    """Translated arguments.

    Attributes
    ----------
    words : list of str
        Arguments for `tjx_trainer.cli.command_line`.
    notes : list of str
        Differences from nanoGPT, a line each.
    environment : mapping of str to str
        Environment variables that select the device.
    """

    words: list[str]
    notes: list[str]
    environment: Mapping[str, str]


@dataclass
class _Read:
    """Parsed arguments, and the mistakes in them."""

    values: dict[str, Any] = field(default_factory=dict)
    on_the_line: set[str] = field(default_factory=set)  # set by a flag or a user's own file
    files: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)  # the trainer's own flags and their values
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def own_names(self) -> set[str]:
        """The trainer's own flags that are given."""
        return {word.partition("=")[0][2:] for word in self.rest if word.startswith("--")}


def translate(argv: Sequence[str]) -> Translation:
    """Translate nanoGPT's arguments to the trainer's.

    Parameters
    ----------
    argv : sequence of str
        Flags of train.py (``--batch_size=32``), config files, ``--nanogpt``, and the trainer's own
        flags (``--data.path FILE``), which take precedence over nanoGPT's.

    Raises
    ------
    ConfigError
        With all mistakes.
    """
    read = _read(argv)
    _check_choices(read)
    if read.problems:
        raise ConfigError(read.problems)
    if read.values.get("init_from") == "resume":
        words, notes = _resume(read)
    else:
        words, notes = _start(read)
    try:
        resolve([*words, *read.rest])
    except ConfigError as error:
        raise ConfigError([_with_flags(problem) for problem in error.problems]) from None
    given = [f"--{name}={read.values[name]}: {FLAGS[name].note}"
             for name in FLAGS if name in read.on_the_line and FLAGS[name].note]  # fmt: skip
    return Translation([*words, *read.rest], [*read.notes, *given, *notes], _environment(read))


def _read(argv: Sequence[str]) -> _Read:
    """Split the arguments into nanoGPT's flags, config files and the trainer's own flags."""
    read, rest = _Read(), [word for word in argv if word != MODE]
    flags: dict[str, str] = {}
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            read.files.append(word)
            continue
        known = name in FLAGS or "." in name or name in _OWN
        takes = not equals and bool(rest) and not rest[0].startswith("--")
        if takes and not rest[0].endswith(".py"):
            value, equals = rest.pop(0), "="
        if not known:
            read.problems.append(f"--{name}: not a flag of nanoGPT's train.py{_hint(name)}")
        elif name not in FLAGS:
            read.rest.append(f"--{name}={value}" if equals else word)
        elif name in flags:
            read.problems.append(f"--{name}: given twice; keep one")
        else:
            flags[name] = value if equals else "true"
    for file in read.files:
        _take_file(read, file)
    shipped = f"train_{flags.get('dataset', '')}"
    if not read.files and shipped in BUNDLED_CONFIGS:
        read.values |= BUNDLED_CONFIGS[shipped]
        read.notes.append(
            f"--dataset={flags['dataset']}: defaults are those of nanoGPT's config/{shipped}.py; "
            "for train.py's own defaults add the argument train.py"
        )
    for name, written in flags.items():
        _take(read, name, written, f"--{name}")
    return read


def _take_file(read: _Read, word: str) -> None:
    if word == "train.py":  # selects train.py's defaults, without a config file
        return
    settings = read_config_file(word)
    problems, notes = unknown_names(settings, list(FLAGS))
    read.problems += [*settings.problems, *problems]
    read.notes += notes
    for name, value in settings.values.items():
        if name in FLAGS and name not in settings.lines:
            read.values[name] = value
        elif name in FLAGS:
            _take(read, name, value, f"{settings.lines[name]}: {name}")


def _take(read: _Read, name: str, written: Any, where: str) -> None:
    """Convert a value to the type of train.py's default."""
    default = FLAGS[name].default
    text = format_value(written)
    if isinstance(default, str) and len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    try:
        value = convert(Leaf(name, type(default), default, type(None)), RawValue(text, where))
    except ValueError as error:
        read.problems.append(str(error))
    else:
        read.values[name] = value
        read.on_the_line.add(name)


def _hint(name: str) -> str:
    if name == "config":
        return "; give a config file without a flag, such as config/train_shakespeare_char.py"
    wanted = name.lower().replace("-", "_")
    initials = [flag for flag in FLAGS if "".join(w[:1] for w in flag.split("_")) == wanted]
    near = next(iter(initials), None) or nearest_name(wanted, FLAGS)
    if near:
        return f"; did you mean --{near}?"
    ours = suggest_names(name)
    return f"; did you mean --{ours[0]}?" if ours else f"; it has {', '.join(FLAGS)}"


def _check_choices(read: _Read) -> None:
    """Check values with a fixed set of choices, and unsupported combinations."""
    values = read.values
    for name, allowed in (("init_from", INIT_FROM), ("dtype", tuple(PRECISIONS))):
        value = values.get(name, FLAGS[name].default)
        if value not in allowed:
            hint = did_you_mean(value, allowed)
            read.problems.append(
                f"--{name}: got {value}; expected one of {', '.join(allowed)}{hint}"
            )
    device = values.get("device", "cuda")
    if device not in ("cpu", "cuda") and not device.removeprefix("cuda:").isdecimal():
        read.problems.append(
            f"--device: got {device}; expected cpu, cuda, or one GPU such as cuda:1"
        )
    if values.get("eval_only") and values.get("init_from") == "resume":
        read.problems.append(
            "--eval_only=True: got it with --init_from=resume; expected scratch or gpt2*; evaluate "
            f"a run by ./pants run apps/eval -- loss {values.get('out_dir', 'out')}"
        )
    for name in ("batch_size", "gradient_accumulation_steps", "block_size", "eval_iters"):
        if values.get(name, 1) < 1:
            read.problems.append(f"--{name}: got {values[name]}; expected at least 1")


def _start(read: _Read) -> tuple[list[str], list[str]]:
    """Return the arguments of a new run, and notes."""
    values = {name: flag.default for name, flag in FLAGS.items()} | read.values
    own_data = read.own_names & {"data.path", "data.corpus", "data.mixture"}
    problems = _check_start(values, read.own_names, has_data=bool(own_data))
    if problems:
        raise ConfigError(problems)
    ours = to_config_values(values)
    if own_data:
        ours = {n: v for n, v in ours.items() if n not in _FOLLOW_DATASET}
    notes = []
    if (gpt2 := values["init_from"]) in GPT2_SIZES:
        ours["model.vocab_size"] = GPT2_VOCAB_SIZE
        notes += [
            f"--{name}={values[name]}: ignored, {gpt2} has its own"
            for name in _SIZES
            if name != "block_size" and name in read.on_the_line
        ]
    if values["device"] == "cpu" and "dtype" in read.on_the_line:
        notes.append(f"--dtype={values['dtype']}: float32 on a CPU, as in train.py")
    if "train.eval_tokens" not in read.own_names:
        notes.append(_evaluation_note(ours["train.eval_tokens"], values["eval_iters"]))
    switches = ["--eval_only"] if values["eval_only"] else []
    return [f"--config={BASE_PRESET}", *switches, *_words(ours, read)], notes


def _check_start(values: Mapping[str, Any], own: Set[str], *, has_data: bool) -> list[str]:
    """Return the errors of a new run: missing data, or a folder that holds a run."""
    dataset, gpt2, folder = values["dataset"], values["init_from"], Path(values["out_dir"])
    problems = []
    has_data |= has_token_files(dataset) or input_file(dataset).is_file()
    if not has_data and corpus_of(dataset) not in CORPORA:
        near = nearest_name(corpus_of(dataset), CORPORA)
        ending = "_char" if dataset.endswith("_char") else ""
        hint = f"; did you mean {near}{ending}?" if near else ""
        problems.append(
            f"--dataset={dataset}: there is no {input_file(dataset)}, nor a corpus of this "
            f"name ({', '.join(CORPORA)}){hint}; or give the text by --data.path FILE"
        )
    if "run_dir" not in own and (folder / "config.yaml").is_file():
        problems.append(
            f"--out_dir={folder}: holds a run, which is never overwritten; resume it by "
            "--init_from=resume, or give another --out_dir"
        )
    if gpt2 in GPT2_SIZES and values["block_size"] > GPT2_CONTEXT:
        problems.append(
            f"--block_size: got {values['block_size']}; expected at most {GPT2_CONTEXT}, the "
            f"positions of {gpt2}"
        )
    if gpt2 in GPT2_SIZES and dataset.endswith("_char") and "data.tokenizer" not in own:
        problems.append(
            f"--dataset: got {dataset}; expected GPT-2's tokens for {gpt2}, not characters; give "
            f"--dataset={corpus_of(dataset)}"
        )
    return problems


def _evaluation_note(tokens: int, batches: int) -> str:
    return (
        f"evaluation: the same {tokens:,} validation tokens, or all if there are fewer; nanoGPT "
        f"draws {batches} random batches"
    )


def _resume(read: _Read) -> tuple[list[str], list[str]]:
    """Return the arguments of a resumed run, and notes.

    The configuration is the run's own config.yaml, changed by the flags that differ from it.
    """
    folder = Path(read.values.get("out_dir", FLAGS["out_dir"].default))
    file = folder / "config.yaml"
    if not file.is_file():
        there = " (a ckpt.pt of nanoGPT cannot be read)" if (folder / "ckpt.pt").exists() else ""
        raise ConfigError([
            f"--init_from=resume: --out_dir={folder} holds no run{there}; give the folder of one, "
            "or leave --init_from out"
        ])  # fmt: skip
    saved = flatten(resolve([f"--config={file}"]))
    base = {name: flag.default for name, flag in FLAGS.items()} | from_config_values(saved)
    given = {name: read.values[name] for name in read.values if name not in _SIZES}
    # A resumed run has its data and its model.
    given = {**given, "dataset": base["dataset"], "init_from": base["init_from"]}
    before, after = to_config_values(base), to_config_values({**base, **given})
    changed = {n: v for n, v in after.items() if before.get(n) != v and n != "run_dir"}
    notes = [
        f"--{name}={read.values[name]}: the saved {saved[ours]} is used, as in train.py"
        for name, ours in _SIZES.items()
        if name in read.on_the_line and read.values[name] != saved[ours]
    ]
    return [f"--config={file}", f"--run_dir={folder}", *_words(changed, read)], notes


def _words(values: Mapping[str, Any], read: _Read) -> list[str]:
    given = read.own_names
    return [
        f"--{n}={format_value(v)}" for n, v in values.items() if n not in given and n in leaves()
    ]


def _with_flags(problem: Problem) -> Problem:
    """Add nanoGPT's flags for the values that a problem concerns."""
    flags = [f"--{name}" for name, flag in FLAGS.items() if set(flag.becomes) & {*problem.paths}]
    if not flags:
        return problem
    return replace(problem, message=f"{problem.message} (nanoGPT's {', '.join(flags)})")


def _environment(read: _Read) -> dict[str, str]:
    """Return the environment variables that select the device; JAX reads them at its start."""
    if "device" not in read.values:
        return {}
    platform, _, number = read.values["device"].partition(":")
    chosen = {"JAX_PLATFORMS": platform}
    return chosen | ({"CUDA_VISIBLE_DEVICES": number} if number else {})


def check_device(environment: Mapping[str, str]) -> None:
    """Raise if a GPU is requested and JAX has no CUDA plugin; JAX's own error is unclear.

    Raises
    ------
    ConfigError
        If there is no plugin.
    """
    if environment.get("JAX_PLATFORMS") == "cuda" and not any(map(find_spec, _CUDA_PLUGINS)):
        raise ConfigError([
            "--device=cuda: this JAX has no GPU support; install it with "
            "pip install 'jax[cuda13]', or give --device=cpu"
        ])  # fmt: skip
