"""`--nanogpt`: translate the flags of nanoGPT's sample.py to those of `generate`.

https://github.com/karpathy/nanoGPT, `sample.py`.
"""

import os
from collections.abc import Mapping, Sequence

from tjx_core import ConfigError, Problem, did_you_mean

FLAG = "--nanogpt"

# Defaults of sample.py, and the corresponding flags of `generate`.
_DEFAULTS: Mapping[str, str] = {
    "out_dir": "out", "init_from": "resume", "start": "\n", "num_samples": "10",
    "max_new_tokens": "500", "temperature": "0.8", "top_k": "200", "seed": "1337", "device": "",
    "dtype": "", "compile": "",
}  # fmt: skip
_MEANINGS: Mapping[str, str] = {
    "out_dir": "a run directory or a Transformers model directory",
    "init_from": "resume only; give a Transformers model directory as --out_dir",
    "start": "the prompt, or FILE:NAME to read it from a file",
    "num_samples": "samples to draw", "max_new_tokens": "tokens of each sample",
    "temperature": "temperature of the softmax; 0 is greedy",
    "top_k": "sample from this many most probable tokens", "seed": "seed of the samples",
    "device": "cpu or cuda; by default JAX decides", "dtype": "no effect",
    "compile": "no effect: tjx always compiles",
}  # fmt: skip
_GENERATE_FLAGS: Mapping[str, str] = {
    "num_samples": "samples", "max_new_tokens": "max_new_tokens", "temperature": "temperature",
    "top_k": "top_k", "seed": "seed",
}  # fmt: skip


def translate(words: Sequence[str]) -> list[str]:
    """Translate a command line of sample.py to one of `generate`.

    ``--device`` sets JAX's platform; ``--dtype`` and ``--compile`` are ignored.

    Parameters
    ----------
    words : sequence of str
        ``--name=value`` or ``--name value``; `FLAG`, ``generate`` and ``sample.py`` are skipped.

    Raises
    ------
    ConfigError
        With every mistake.

    Examples
    --------
    >>> translate(["--nanogpt", "--out_dir=runs/a", "--start=Hi", "--num_samples=1"])[:4]
    ['generate', 'runs/a', '--prompt=Hi', '--samples=1']
    """
    values, problems = dict(_DEFAULTS), []
    rest = [word for word in words if word not in (FLAG, "generate", "sample.py")]
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in _DEFAULTS:
            hint = did_you_mean(name, _DEFAULTS) or f"; expected one of {', '.join(_DEFAULTS)}"
            problems.append(Problem(word, f"not a flag of nanoGPT's sample.py{hint}"))
        elif equals or (rest and not rest[0].startswith("--")):
            values[name] = _unquoted(value if equals else rest.pop(0))
        else:
            problems.append(Problem(word, f"its value is missing; give {word}=VALUE"))
    if values["init_from"] != "resume":
        problems.append(
            Problem(
                "--init_from",
                f"got {values['init_from']}; expected resume; give a Transformers model directory "
                "as --out_dir",
            )
        )
    if problems:
        raise ConfigError(problems)
    if platform := values["device"].partition(":")[0]:
        os.environ["JAX_PLATFORMS"] = platform
    file = values["start"].removeprefix("FILE:")
    is_file = file != values["start"]
    prompt = f"--prompt_file={file}" if is_file else f"--prompt={values['start']}"
    flags = [f"--{ours}={values[theirs]}" for theirs, ours in _GENERATE_FLAGS.items()]
    return ["generate", values["out_dir"], prompt, *flags]


def help_text() -> str:
    """Return the help page of `FLAG`: sample.py's flags with their defaults.

    Examples
    --------
    >>> print(help_text().splitlines()[0])
    usage: eval --nanogpt --out_dir=DIR [--flag=value] ...
    """
    lines = [
        f"  --{name:<16}{_MEANINGS[name]}" + (f" [{value!r}]" if value else "")
        for name, value in _DEFAULTS.items()
    ]
    head = ["usage: eval --nanogpt --out_dir=DIR [--flag=value] ...", "", "Flags of sample.py:"]
    return "\n".join([*head, *lines]) + "\n"


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text
