"""Export a model and its tokenizer for `from_pretrained` of Hugging Face Transformers."""

import json
from pathlib import Path
from typing import Any

import jax

import tjx_data
from tjx_data import ChatTemplate
from tjx_data.conversations.built_in_templates import END_OF_TURN
from tjx_data.conversations.template import TEMPLATE_FILE
from tjx_eval.errors import EvalError
from tjx_eval.load_model import TrainedModel
from tjx_nn import hf


def export_transformers(model: TrainedModel, folder: Path, *, dtype: str) -> list[str]:
    """Write config.json, safetensors and tokenizer files to an empty folder; return their names.

    config.json is written last: a folder without it is not a model.

    Raises
    ------
    EvalError
        If Transformers has no such model; the message names the unsupported feature.
    """
    if model.text_tokenizer is not None:
        template = model.path / TEMPLATE_FILE
        write_tokenizer(
            model.text_tokenizer,
            model.architecture,
            folder,
            template=ChatTemplate.load(template) if template.is_file() else None,
        )
    try:
        hf.save(folder, model.architecture, jax.device_get(model.params), dtype=dtype)
    except ValueError as error:
        raise EvalError(" ".join(str(error).split())) from error
    return sorted(file.name for file in folder.iterdir())


def write_tokenizer(
    tokenizer: tjx_data.Tokenizer,
    architecture: Any,
    folder: Path,
    *,
    template: ChatTemplate | None = None,
) -> None:
    """Write the tokenizer files; for a decoder, the end-of-text token precedes each prompt.

    With a chat template, which writes this token itself, generation also ends at the token that
    ends an answer.
    """
    tokenizer.save(folder / "tokenizer.json", begins_prompts=architecture.family == "gpt")
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    eot = tokenizer.eot_id
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": architecture.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    ids: dict[str, Any] = {}
    if eot is not None:
        # One token separates documents: it is both the beginning and the end of a document.
        settings |= dict.fromkeys(("bos_token", "eos_token"), names[eot])
        ids = {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot}
    if template is not None:
        (folder / TEMPLATE_FILE).write_text(template.source, encoding="utf-8")
        settings |= template.special_tokens
        ends = [
            tokenizer.special_tokens.get(name)
            for name in (settings.get("eos_token", ""), END_OF_TURN)
        ]
        ids["eos_token_id"] = [i for i in dict.fromkeys(ends) if i is not None]
    for name, content in (("tokenizer_config.json", settings), ("generation_config.json", ids)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
