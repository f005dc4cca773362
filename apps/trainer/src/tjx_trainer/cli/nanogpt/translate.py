"""`--nanogpt`: a command line of nanoGPT's train.py becomes one of the trainer's own."""

import difflib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tjx_data.corpora.registry import CORPORA
from tjx_trainer.cli.command_line import convert, format_value, resolve
from tjx_trainer.cli.nanogpt.config_files import BUNDLED_CONFIGS, read_config_file, unknown_names
from tjx_trainer.cli.nanogpt.flags import (
    FLAGS,
    GPT2_CONTEXT,
    GPT2_SIZES,
    INIT_FROM,
    PRECISIONS,
    corpus_of,
    from_config_values,
    input_file,
    to_config_values,
)
from tjx_trainer.config.config_tree import Leaf, flatten, leaves, speaks_of
from tjx_trainer.config.presets import RawValue, suggest_names
from tjx_trainer.config.run_config import GPT2_VOCAB_SIZE, ConfigError

MODE = "--nanogpt"
BASE_PRESET = "nanogpt"

_CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")

# What may stand beside nanoGPT's flags: names with a dot, and these.
_OWN = ("seed", "name", "run_dir", "supervise", "dry_run", "help")  # `eval_only` is nanoGPT's too
# What a checkpoint decides, and where its run says it.
_SIZES = {
    "n_layer": "model.n_layer",
    "n_head": "model.n_head",
    "n_embd": "model.d_model",
    "bias": "model.bias",
    "block_size": "model.max_seq_len",
}


@dataclass(frozen=True)
class Translation:
    """A command line of nanoGPT's, in the trainer's words.

    Attributes
    ----------
    words : list of str
        For `tjx_trainer.cli.command_line`.
    notes : list of str
        What is otherwise here, a line each.
    environment : mapping of str to str
        Variables that choose the device.
    """

    words: list[str]
    notes: list[str]
    environment: Mapping[str, str]


@dataclass
class _Read:
    """What the words say, and what is wrong with them."""

    values: dict[str, Any] = field(default_factory=dict)
    on_the_line: set[str] = field(default_factory=set)  # of these, by a flag or a user's own file
    files: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)  # the trainer's own flags and their values
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def own_names(self) -> set[str]:
        """The trainer's own flags that are given."""
        return {word.partition("=")[0][2:] for word in self.rest if word.startswith("--")}


def translate(argv: Sequence[str]) -> Translation:
    """Turn nanoGPT's words into the trainer's.

    Parameters
    ----------
    argv : sequence of str
        Flags of train.py (``--batch_size=32``), names of config files, ``--nanogpt``, and flags of
        the trainer's own (``--data.path FILE``), which win over what a flag of nanoGPT's means.

    Raises
    ------
    ConfigError
        With everything that is wrong.
    """
    read = _read(argv)
    _refuse_choices(read)
    if read.problems:
        raise ConfigError(read.problems)
    if read.values.get("init_from") == "resume":
        words, notes = _resume(read)
    else:
        words, notes = _start(read)
    try:
        resolve([*words, *read.rest])
    except ConfigError as error:
        raise ConfigError([_in_their_words(line) for line in error.problems]) from None
    said = [f"--{name}={read.values[name]}: {FLAGS[name].note}"
            for name in FLAGS if name in read.on_the_line and FLAGS[name].note]  # fmt: skip
    return Translation([*words, *read.rest], [*read.notes, *said, *notes], _environment(read))


def _read(argv: Sequence[str]) -> _Read:
    """Cut the words into nanoGPT's flags, config files and the trainer's own flags."""
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
            read.problems.append(f"--{name}: nanoGPT's train.py has no such flag{_hint(name)}")
        elif name not in FLAGS:
            read.rest.append(f"--{name}={value}" if equals else word)
        elif name in flags:
            read.problems.append(f"--{name} is given twice: keep one")
        else:
            flags[name] = value if equals else "true"
    for file in read.files:
        _take_file(read, file)
    shipped = f"train_{flags.get('dataset', '')}"
    if not read.files and shipped in BUNDLED_CONFIGS:
        read.values |= BUNDLED_CONFIGS[shipped]
        read.notes.append(
            f"--dataset={flags['dataset']}: what is not given is as in nanoGPT's config/"
            f"{shipped}.py; for train.py's own defaults write train.py as a word"
        )
    for name, written in flags.items():
        _take(read, name, written, f"--{name}")
    return read


def _take_file(read: _Read, word: str) -> None:
    if word == "train.py":  # what one is used to write, and that no config file is meant
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
    """Read a value as one of the kind that train.py's default is of."""
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
        return "; a config file is given as a word, such as config/train_shakespeare_char.py"
    wanted = name.lower().replace("-", "_")
    initials = [flag for flag in FLAGS if "".join(w[:1] for w in flag.split("_")) == wanted]
    near = initials or difflib.get_close_matches(wanted, FLAGS, n=1, cutoff=0.6)
    if near:
        return f"; did you mean --{near[0]}?"
    ours = suggest_names(name)
    return f"; did you mean --{ours[0]}?" if ours else f"; it has {', '.join(FLAGS)}"


def _refuse_choices(read: _Read) -> None:
    """Check what is one of several, or is not done here."""
    values = read.values
    for name, allowed in (("init_from", INIT_FROM), ("dtype", tuple(PRECISIONS))):
        value = values.get(name, FLAGS[name].default)
        if value not in allowed:
            near = difflib.get_close_matches(value, allowed, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            read.problems.append(f"--{name}={value}: expected one of {', '.join(allowed)}{hint}")
    device = values.get("device", "cuda")
    if device not in ("cpu", "cuda") and not device.removeprefix("cuda:").isdecimal():
        read.problems.append(f"--device={device}: expected cpu, cuda, or one GPU such as cuda:1")
    if values.get("eval_only") and values.get("init_from") == "resume":
        read.problems.append(
            "--eval_only=True: got it with --init_from=resume; expected scratch or gpt2*; evaluate "
            f"a run by ./pants run apps/eval -- loss {values.get('out_dir', 'out')}"
        )
    for name in ("batch_size", "gradient_accumulation_steps", "block_size", "eval_iters"):
        if values.get(name, 1) < 1:
            read.problems.append(f"--{name}={values[name]}: must be at least 1")


def _start(read: _Read) -> tuple[list[str], list[str]]:
    """Return the words of a run that begins, and notes."""
    values = {name: flag.default for name, flag in FLAGS.items()} | read.values
    own_data = read.own_names & {"data.path", "data.corpus", "data.mixture"}
    problems = _refuse_start(values, read.own_names, has_data=bool(own_data))
    if problems:
        raise ConfigError(problems)
    ours = to_config_values(values)
    if own_data:
        ours = {n: v for n, v in ours.items() if n not in ("data.path", "data.corpus")}
    notes = []
    if (gpt2 := values["init_from"]) in GPT2_SIZES:
        ours["model.vocab_size"] = GPT2_VOCAB_SIZE
        notes += [
            f"--{name}={values[name]}: {gpt2} has its own; ignored"
            for name in _SIZES
            if name != "block_size" and name in read.on_the_line
        ]
    if values["device"] == "cpu" and "dtype" in read.on_the_line:
        notes.append(f"--dtype={values['dtype']}: on a CPU it is float32, as in train.py")
    if "train.eval_tokens" not in read.own_names:
        notes.append(_of_evaluation(ours["train.eval_tokens"], values["eval_iters"]))
    switches = ["--eval_only"] if values["eval_only"] else []
    return [f"--config={BASE_PRESET}", *switches, *_words(ours, read)], notes


def _refuse_start(values: Mapping[str, Any], own: Set[str], *, has_data: bool) -> list[str]:
    """Say what a run that begins lacks, or would write over."""
    dataset, gpt2, folder = values["dataset"], values["init_from"], Path(values["out_dir"])
    problems = []
    if not has_data and not input_file(dataset).is_file() and corpus_of(dataset) not in CORPORA:
        near = difflib.get_close_matches(corpus_of(dataset), CORPORA, n=1)
        ending = "_char" if dataset.endswith("_char") else ""
        hint = f"; did you mean {near[0]}{ending}?" if near else ""
        problems.append(
            f"--dataset={dataset}: there is no {input_file(dataset)} here, nor a corpus of this "
            f"name (there are {', '.join(CORPORA)}){hint}; or give the text by --data.path FILE"
        )
    if "run_dir" not in own and (folder / "config.yaml").is_file():
        problems.append(
            f"--out_dir={folder}: holds a run, and nothing is written over; go on with it by "
            "--init_from=resume, or give another --out_dir"
        )
    if gpt2 in GPT2_SIZES and values["block_size"] > GPT2_CONTEXT:
        problems.append(
            f"--block_size={values['block_size']}: {gpt2} has positions for {GPT2_CONTEXT} "
            "tokens; give at most so many"
        )
    if gpt2 in GPT2_SIZES and dataset.endswith("_char") and "data.tokenizer" not in own:
        problems.append(
            f"--dataset={dataset}: {gpt2} reads GPT-2's tokens and not characters; give "
            f"--dataset={corpus_of(dataset)}"
        )
    return problems


def _of_evaluation(tokens: int, batches: int) -> str:
    return (
        f"evaluation: each of the same {tokens:,} validation tokens once, or all if there are "
        f"fewer, where nanoGPT draws {batches} batches by chance"
    )


def _resume(read: _Read) -> tuple[list[str], list[str]]:
    """Return the words of a run that goes on, and notes.

    The run's own config.yaml is what it goes on with; of the flags, those that say something else.
    """
    folder = Path(read.values.get("out_dir", FLAGS["out_dir"].default))
    file = folder / "config.yaml"
    if not file.is_file():
        there = (
            " (a ckpt.pt of nanoGPT's is not read here)" if (folder / "ckpt.pt").exists() else ""
        )
        raise ConfigError([
            f"--init_from=resume: --out_dir={folder} holds no run{there}; give the folder of one, "
            "or leave --init_from out"
        ])  # fmt: skip
    saved = flatten(resolve([f"--config={file}"]))
    base = {name: flag.default for name, flag in FLAGS.items()} | from_config_values(saved)
    given = {name: read.values[name] for name in read.values if name not in _SIZES}
    # What decides nothing of a run that goes on: it has its data and its model.
    given = {**given, "dataset": base["dataset"], "init_from": base["init_from"]}
    before, after = to_config_values(base), to_config_values({**base, **given})
    changed = {n: v for n, v in after.items() if before.get(n) != v and n != "run_dir"}
    notes = [
        f"--{name}={read.values[name]}: the run's own {saved[ours]} is kept, as in train.py"
        for name, ours in _SIZES.items()
        if name in read.on_the_line and read.values[name] != saved[ours]
    ]
    return [f"--config={file}", f"--run_dir={folder}", *_words(changed, read)], notes


def _words(values: Mapping[str, Any], read: _Read) -> list[str]:
    given = read.own_names
    return [
        f"--{n}={format_value(v)}" for n, v in values.items() if n not in given and n in leaves()
    ]


def _in_their_words(problem: str) -> str:
    """Add the flag of nanoGPT's that a problem speaks of."""
    flags = [
        name
        for name, flag in FLAGS.items()
        if any(speaks_of(problem, {one}) for one in flag.becomes)
    ]
    return f"{problem} (nanoGPT's {', '.join(f'--{name}' for name in flags)})" if flags else problem


def _environment(read: _Read) -> dict[str, str]:
    """Choose the device, where one is named: JAX reads these before anything is computed."""
    if "device" not in read.values:
        return {}
    platform, _, number = read.values["device"].partition(":")
    chosen = {"JAX_PLATFORMS": platform}
    return chosen | ({"CUDA_VISIBLE_DEVICES": number} if number else {})


def check_device(environment: Mapping[str, str]) -> None:
    """Refuse GPUs where JAX has nothing to reach them with, which JAX itself says obscurely.

    Raises
    ------
    ConfigError
        If there is none.
    """
    if environment.get("JAX_PLATFORMS") == "cuda" and not any(map(find_spec, _CUDA_PLUGINS)):
        raise ConfigError([
            "--device=cuda: this JAX is not installed with support for GPUs (it would be by "
            "pip install 'jax[cuda13]'); install it so, or give --device=cpu"
        ])  # fmt: skip
