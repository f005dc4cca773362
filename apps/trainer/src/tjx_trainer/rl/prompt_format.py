"""Encoding of prompts and responses: as plain text, or as messages of a chat template."""

from typing import NamedTuple

import tjx_data
from tjx_trainer.config.run_config import Config


class PromptFormat(NamedTuple):
    """Conversion of prompts and responses to tokens.

    Attributes
    ----------
    tokenizer : tjx_data.Tokenizer
        The tokenizer of the model.
    template : tjx_data.ChatTemplate or None
        Chat template; None for plain text.
    stop_token : int or None
        Token that ends a response.
    """

    tokenizer: tjx_data.Tokenizer
    template: tjx_data.ChatTemplate | None
    stop_token: int | None

    @classmethod
    def of(cls, config: Config, tokenizer: tjx_data.Tokenizer) -> "PromptFormat":
        """Return the format that ``rl.chat`` selects, with the template of the initial model."""
        if not config.rl.chat:
            return cls(tokenizer, None, tokenizer.eot_id)
        template = tjx_data.find_template(config.chat, tokenizer, config.train.init_from)
        answered = cls(tokenizer, template, None).encode_response("0", "0")
        return cls(tokenizer, template, answered[-1])

    def encode_prompt(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt, up to the start of the response."""
        if self.template is None:
            return self.tokenizer.encode_prompt(prompt)
        message = {"role": "user", "content": prompt}
        return tjx_data.encode_chat_prompt(self.template, self.tokenizer, [message])

    def encode_response(self, prompt: str, text: str) -> list[int]:
        """Return the tokens of a response with its end."""
        if self.template is None:
            end = [] if self.stop_token is None else [self.stop_token]
            return [*self.tokenizer.encode(text), *end]
        messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": text})
        encoded = tjx_data.encode_conversation(
            self.template, self.tokenizer, tjx_data.Conversation(messages)
        )
        answer: list[int] = encoded.tokens[encoded.is_answer].tolist()
        return answer

    def encode_observation(self, text: str) -> list[int]:
        """Return the tokens between a response and the next one.

        With a chat template the observation is a message of the user.

        Raises
        ------
        ValueError
            If the tokenizer cannot encode it, or the template changes earlier messages.
        """
        if self.template is None:
            return self.tokenizer.encode(text)
        before = [*self.encode_prompt("0"), *self.encode_response("0", "0")]
        roles = (("user", "0"), ("assistant", "0"), ("user", text))
        messages = [{"role": role, "content": content} for role, content in roles]
        tokens = tjx_data.encode_chat_prompt(self.template, self.tokenizer, messages)
        if tokens[: len(before)] != before:
            raise ValueError(
                f"chat.template: got {self.template.name}, which changes earlier messages; "
                "expected one that appends to them"
            )
        return tokens[len(before) :]

    def decode_response(self, response: list[int]) -> str:
        """Return the text of sampled tokens, without the end."""
        return self.tokenizer.decode([i for i in response if i != self.stop_token])
