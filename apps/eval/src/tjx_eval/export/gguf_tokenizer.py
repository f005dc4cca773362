"""Metadata of GGUF files about tokenizers: byte-level BPE with a splitting that llama.cpp knows."""

import json
import re
from collections.abc import Mapping
from typing import Any

import tjx_data
from tjx_data.conversations.built_in_templates import END_OF_TURN
from tjx_eval.errors import EvalError
from tjx_eval.export.gguf_file import Value

# Types of tokens.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def _split(digits: str) -> list[dict[str, Any]]:
    """Return the pre-tokenizer steps of Llama 3 and Qwen2: a pattern of words, then bytes."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+"
        r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    regex = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return [{**regex, "invert": False}, {**_WORDS, "use_regex": False}]


_WORDS = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
# Steps of the pre-tokenizer of tokenizer.json of each name in llama.cpp, and whether a word that is
# a token is never split (`ignore_merges`).
SPLITTINGS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([_WORDS], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, _WORDS], False),
    "qwen2": (_split(r"\p{N}"), False),
    "llama-bpe": (_split(r"\p{N}{1,3}"), True),
}
# llama.cpp normalizes no text; its conversion of Qwen's tokenizers leaves NFC out too.
_NORMALIZERS = (None, {"type": "NFC"})
_OPTIONS = ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")


def tokenizer_metadata(
    tokenizer: tjx_data.Tokenizer, rows: int, template: tjx_data.ChatTemplate | None
) -> dict[str, Value]:
    """Return the keys of a tokenizer, with which llama.cpp encodes as the tokenizer does.

    Prompts begin with the token that `export --format hf` makes tokenizer.json add.

    Parameters
    ----------
    tokenizer : tjx_data.Tokenizer
        Tokenizer of the model.
    rows : int
        Rows of the token table; ids without a token become unused tokens.
    template : tjx_data.ChatTemplate or None
        Chat template of the model.

    Returns
    -------
    dict
        Values by key.

    Raises
    ------
    EvalError
        If llama.cpp has no such tokenizer; the message lists what it lacks.
    """
    description = json.loads(tokenizer.to_json(begins_prompts=True))
    problems, splitting = _check(description), _splitting(description)
    first, adds_others = _added_by_post_processor(description["post_processor"])
    named = {} if template is None else template.special_tokens
    eos = tokenizer.vocabulary.get(named.get("eos_token", ""), tokenizer.eot_id)
    if splitting is None:
        problems.append(
            f"pre_tokenizer {json.dumps(description['pre_tokenizer'])[:300]} with ignore_merges "
            f"{description['model'].get('ignore_merges', False)}; expected that of one of "
            f"{', '.join(SPLITTINGS)}"
        )
    if adds_others:
        problems.append(
            "a post_processor that adds tokens other than one before a text; expected none"
        )
    if eos is None:
        problems.append("no end-of-text token; expected one, as llama.cpp would take id 11 for it")
    if problems or splitting is None or eos is None:
        raise EvalError(f"tokenizer: got {'; got '.join(problems)}; llama.cpp would give other ids")
    texts, kinds = _tokens(description, rows)
    keys: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": splitting,
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in tokenizer.merges],
        "tokenizer.ggml.add_bos_token": first is not None,
    }
    ids = {
        "bos": tokenizer.vocabulary.get(first or named.get("bos_token", ""), eos),
        "eos": eos,
        "eot": None if template is None else tokenizer.special_tokens.get(END_OF_TURN),
    }
    keys |= {f"tokenizer.ggml.{key}_token_id": i for key, i in ids.items() if i is not None}
    if template is not None:
        # The tag of the generation is an extension of Jinja, which only training uses.
        blocks = re.compile(r"(\{%-?\s*)(end)?generation(\s*-?%\})")
        keys["tokenizer.chat_template"] = blocks.sub(
            lambda found: f"{found[1]}{'endif' if found[2] else 'if true'}{found[3]}",
            template.source,
        )
    return keys


def _check(description: Mapping[str, Any]) -> list[str]:
    """Return the features of the tokenizer that llama.cpp lacks, besides its splitting of words."""
    model, problems = description["model"], []
    if model["type"] != "BPE" or (description["decoder"] or {}).get("type") != "ByteLevel":
        return [f"a {model['type']} model that is not byte-level; expected byte-level BPE"]
    problems += [f"{name} {model[name]!r}; expected none" for name in _OPTIONS if model.get(name)]
    if description["normalizer"] not in _NORMALIZERS:
        problems.append(f"normalizer {description['normalizer']}; expected none")
    problems += [
        f"the added token {token['content']!r} with {name}; expected none"
        for token in description["added_tokens"]
        for name in ("lstrip", "rstrip", "single_word")
        if not token["special"] and token[name]
    ]
    return problems


def _splitting(description: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name of the splitting of words; None if it has none."""
    given, model = description["pre_tokenizer"] or {}, description["model"]
    steps = [
        {key: value for key, value in step.items() if key != "trim_offsets"}
        for step in given.get("pretokenizers", [given])
    ]
    if not model["merges"] and steps == [{**_WORDS, "use_regex": False}]:
        return "gpt-2"  # tokens of single bytes are the same in any word
    found = (steps, bool(model.get("ignore_merges")))
    return next((name for name, known in SPLITTINGS.items() if known == found), None)


def _added_by_post_processor(given: Mapping[str, Any] | None) -> tuple[str | None, bool]:
    """Return the token that is added before a text, and whether any others are added."""
    steps = [] if given is None else given.get("processors", [given])
    added = [step for step in steps if step["type"] != "ByteLevel"]
    match added:
        case []:
            return None, False
        case [{"type": "TemplateProcessing", "single": [{"Sequence": _}]}]:
            return None, False
        case [
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": name}}, {"Sequence": _}],
            }
        ]:
            return str(name), False
    return None, True


def _tokens(description: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Return the text and the type of each id."""
    texts, kinds = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for text, i in description["model"]["vocab"].items():
        texts[i], kinds[i] = text, NORMAL
    for token in description["added_tokens"]:
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    return texts, kinds
