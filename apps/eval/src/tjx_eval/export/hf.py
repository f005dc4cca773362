"""A model as a folder of transformers, with its tokenizer: what `from_pretrained` takes."""

import json
from pathlib import Path
from typing import Any

import jax

import tjx_data
from tjx_eval.errors import EvalError
from tjx_eval.load_model import TrainedModel
from tjx_nn import hf


def export_transformers(model: TrainedModel, folder: Path, *, dtype: str) -> list[str]:
    """Write config.json and safetensors, and what the tokenizer needs; return the files' names.

    The folder is there and empty. config.json comes last: without it the folder is no model.

    Raises
    ------
    RunError
        If transformers has no such model; the message names what it lacks.
    """
    if model.text_tokenizer is not None:
        write_tokenizer(model.text_tokenizer, model.architecture, folder)
    try:
        hf.save(folder, model.architecture, jax.device_get(model.params), dtype=dtype)
    except ValueError as error:
        raise EvalError(" ".join(str(error).split())) from error
    return sorted(file.name for file in folder.iterdir())


def write_tokenizer(tokenizer: tjx_data.Tokenizer, architecture: Any, folder: Path) -> None:
    """Write the tokenizer and its settings; a decoder's puts the end of text before a prompt."""
    tokenizer.save(folder / "tokenizer.json", begins_prompts=architecture.family == "gpt")
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    end = tokenizer.eot_id
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": architecture.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    ids: dict[str, Any] = {}
    if end is not None:
        # Documents are divided by one token, which begins them and ends them.
        settings |= dict.fromkeys(("bos_token", "eos_token"), names[end])
        ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    _write(folder / "tokenizer_config.json", settings)
    _write(folder / "generation_config.json", ids)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
