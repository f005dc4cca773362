"""`--nanogpt`: the flags of nanoGPT's sample.py become those of `generate`.

https://github.com/karpathy/nanoGPT, `sample.py`.
"""

import os
from collections.abc import Mapping, Sequence

from tjx_eval.commands.parser import did_you_mean
from tjx_eval.errors import EvalError

MODE = "--nanogpt"

# sample.py's own defaults, and the flag of `generate` that each becomes.
_DEFAULTS: Mapping[str, str] = {
    "out_dir": "out", "init_from": "resume", "start": "\n", "num_samples": "10",
    "max_new_tokens": "500", "temperature": "0.8", "top_k": "200", "seed": "1337", "device": "",
    "dtype": "", "compile": "",
}  # fmt: skip
_BECOMES: Mapping[str, str] = {
    "num_samples": "samples", "max_new_tokens": "max_new_tokens", "temperature": "temperature",
    "top_k": "top_k", "seed": "seed",
}  # fmt: skip


def translate(words: Sequence[str]) -> list[str]:
    """Turn a command line of sample.py into one of `generate`; `--device` chooses JAX's platform.

    Parameters
    ----------
    words : sequence of str
        ``--name=value`` or ``--name value``; `MODE`, ``generate`` and ``sample.py`` are left out.

    Raises
    ------
    RunError
        With everything that is wrong, a line each.

    Examples
    --------
    >>> translate(["--nanogpt", "--out_dir=runs/a", "--start=Hi", "--num_samples=1"])[:4]
    ['generate', 'runs/a', '--prompt=Hi', '--samples=1']
    """
    values, problems = dict(_DEFAULTS), []
    rest = [word for word in words if word not in (MODE, "generate", "sample.py")]
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in _DEFAULTS:
            hint = did_you_mean(name, list(_DEFAULTS)) or f"; it has {', '.join(_DEFAULTS)}"
            problems.append(f"{word}: nanoGPT's sample.py has no such flag{hint}")
        elif equals or (rest and not rest[0].startswith("--")):
            values[name] = _unquoted(value if equals else rest.pop(0))
        else:
            problems.append(f"{word}: its value is missing; give {word}=VALUE")
    if values["init_from"] != "resume":
        problems.append(
            f"--init_from={values['init_from']}: expected resume; give the folder of a model in "
            "the format of transformers by --out_dir"
        )
    if problems:
        raise EvalError("\n".join(problems))
    if platform := values["device"].partition(":")[0]:
        os.environ["JAX_PLATFORMS"] = platform
    file = values["start"].removeprefix("FILE:")
    is_file = file != values["start"]
    prompt = f"--prompt_file={file}" if is_file else f"--prompt={values['start']}"
    flags = [f"--{theirs}={values[ours]}" for ours, theirs in _BECOMES.items()]
    return ["generate", values["out_dir"], prompt, *flags]


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text
