"""Built-in chat templates: "tjx" with special tokens, and "plain" for any tokenizer."""

END_OF_TURN = "<|end|>"
CHAT_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", END_OF_TURN)
"""Special tokens of the template "tjx": one starts each message by role, the last ends it."""

_CALLS = (
    "{%- if message.tool_calls %}{% for call in message.tool_calls %}"
    "<tool_call>{{ (call.function or call) | tojson }}</tool_call>{% endfor %}{% endif -%}"
)
_TOOLS = "{%- if tools %}Tools:{% for tool in tools %} {{ tool | tojson }}{% endfor %}{% endif -%}"
_TJX = (
    "{%- if bos_token %}{{ bos_token }}{% endif -%}"
    "{%- if tools %}<|system|>" + _TOOLS + "<|end|>{% endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|' + message.role + '|>' -}}"
    "{%- if message.role == 'assistant' -%}"
    "{%- generation %}{{ message.content }}" + _CALLS + "<|end|>{% endgeneration -%}"
    "{%- else %}{{ message.content }}<|end|>{% endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt %}<|assistant|>{% endif -%}"
)
# The answer starts with its space, since tokens of words start with one.
_PLAIN = (
    "{%- if bos_token %}{{ bos_token }}{% endif -%}"
    "{%- if tools %}" + _TOOLS + "{{ '\\n\\n' }}{% endif -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}"
    "Assistant:"
    "{%- generation %}{{ ' ' + message.content }}" + _CALLS + "{{ eos_token }}{% endgeneration -%}"
    "{{- '\\n\\n' -}}"
    "{%- else %}{{ message.role | capitalize }}: {{ message.content }}{{ '\\n\\n' }}{% endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt %}Assistant:{% endif -%}"
)

BUILT_IN = {"tjx": _TJX, "plain": _PLAIN}
"""Source of each built-in template by name."""
