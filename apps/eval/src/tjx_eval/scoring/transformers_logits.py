"""Compare the logits of a model with the logits of Transformers from the same folder."""

import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tjx_eval.errors import EvalError
from tjx_nn import BertConfig, GPTConfig, bind
from tjx_nn.config import TransformerConfig

_ROWS, _MAX_TOKENS = 2, 64
# Runs in the other environment, whose packages are not those of tjx.
_PROGRAM = """
import sys, numpy, torch, transformers
folder, head, tokens, logits = sys.argv[1:]
model = getattr(transformers, head).from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
)
with torch.no_grad():
    found = model.eval()(torch.from_numpy(numpy.load(tokens))).logits
numpy.save(logits, found.numpy())
print(transformers.__version__)
"""


class LogitsComparison(NamedTuple):
    """Difference of float32 logits.

    Attributes
    ----------
    difference
        Largest absolute difference.
    std
        Standard deviation of the logits of Transformers.
    version
        Version of Transformers.
    """

    difference: float
    std: float
    version: str


def compare_logits(
    folder: Path, config: TransformerConfig, params: dict[str, Any], python: str
) -> LogitsComparison:
    """Compute the logits of random tokens with tjx and with Transformers, in float32.

    Parameters
    ----------
    folder : Path
        Folder of Transformers.
    config, params
        The same model, as `tjx_nn.hf.load` returns it: a decoder or BERT.
    python : str
        Interpreter of an environment with transformers and torch.

    Returns
    -------
    LogitsComparison
        The difference.

    Raises
    ------
    EvalError
        If the model has no logits of tokens, or the interpreter fails; the message has the end of
        what it printed.
    """
    if not isinstance(config, GPTConfig | BertConfig):
        raise EvalError("--transformers: got a model without logits of tokens; omit the flag")
    head = "AutoModelForCausalLM" if isinstance(config, GPTConfig) else "AutoModelForMaskedLM"
    shape = (_ROWS, min(_MAX_TOKENS, config.max_seq_len))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape)
    with tempfile.TemporaryDirectory() as temporary:
        given, found = Path(temporary, "tokens.npy"), Path(temporary, "logits.npy")
        np.save(given, tokens)
        command = [python, "-c", _PROGRAM, str(folder), head, str(given), str(found)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except OSError as error:
            raise EvalError(f"--transformers: got {python}; {error.strerror}") from error
        except subprocess.CalledProcessError as error:
            raise EvalError(
                f"--transformers: {python} ended with exit code {error.returncode}; expected the "
                f"Python of an environment with transformers and torch:\n{error.stderr[-2000:]}"
            ) from error
        theirs = np.load(found, allow_pickle=False)
    forward = jax.jit(lambda params, tokens: bind(config, params)(tokens))
    logits = jax.device_get(forward(*jax.device_put((params, tokens.astype(np.int32)))))
    ours = logits[..., : theirs.shape[-1]]
    version = done.stdout.split()[-1]
    return LogitsComparison(float(np.abs(ours - theirs).max()), float(theirs.std()), version)
