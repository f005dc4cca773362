"""Write the golden file of tjx_data's chat templates: conversations rendered by transformers.

The templates are in packages/tjx-data/tests/golden: a Llama-3-style one, a Qwen3-style one (tools,
reasoning) and one with generation spans. For each conversation the file has the text, and the spans
that `return_assistant_tokens_mask` locates.

Run it in a separate environment (see README.md; it needs no PyTorch):

    python make_chat_golden.py ../../packages/tjx-data/tests/golden
"""

import argparse
import json
import pathlib
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

CHAT = [
    {"role": "user", "content": "  What is 1 + 2?\n"},
    {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": 'And "été" <b>&</b>?'},
    {"role": "assistant", "content": "Summer, in bold."},
]
SYSTEM = {"role": "system", "content": "Be brief."}
REASONING = [
    CHAT[0],
    {"role": "assistant", "content": "<think>\nOne and two.\n</think>\n\n3"},
    CHAT[2],
    {"role": "assistant", "reasoning_content": "A season.", "content": "Summer."},
]
CALL = {"name": "add", "arguments": {"a": 1, "b": "deux é"}}
TOOL_USE = [
    CHAT[0],
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "content": "3"},
    {"role": "tool", "content": "three"},
    {"role": "assistant", "content": "It is 3."},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers <exactly>.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
]
TOKENS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}


def cases() -> list[dict[str, Any]]:
    """Return the inputs of all renders."""
    chats = [CHAT, [SYSTEM, *CHAT], CHAT[:1], [SYSTEM, *CHAT[:3]]]
    plain = [
        {"messages": chat, "add_generation_prompt": chat[-1]["role"] == "user"} for chat in chats
    ]
    found = [{"template": "llama3_style", **each} for each in plain]
    found += [{"template": "generation", **each} for each in plain]
    found += [{"template": "qwen3_style", **each} for each in plain]
    found += [
        {"template": "qwen3_style", "messages": REASONING},
        {"template": "qwen3_style", "messages": [SYSTEM, *TOOL_USE], "tools": TOOLS},
        {"template": "qwen3_style", "messages": CHAT[:1], "add_generation_prompt": True,
         "variables": {"enable_thinking": False}},
    ]  # fmt: skip
    return found


def main() -> None:
    """Render every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args().folder
    results = []
    for case in cases():
        source = (folder / f"{case['template']}.jinja").read_text(encoding="utf-8")
        [text], spans = render_jinja_template(
            conversations=[case["messages"]],
            chat_template=source,
            tools=case.get("tools"),
            add_generation_prompt=case.get("add_generation_prompt", False),
            return_assistant_tokens_mask="generation %}" in source,
            **case.get("variables", {}),
            **TOKENS,
        )
        results.append(
            {**case, "text": text, "spans": [list(span) for span in spans[0]] if spans else []}
        )
    content = {"special_tokens": TOKENS, "cases": results}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (folder / "chat_templates.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
