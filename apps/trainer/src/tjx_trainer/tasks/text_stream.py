"""Incremental detokenization: text from a stream of tokens, with stop strings."""

import codecs
from collections.abc import Iterable, Sequence
from functools import lru_cache

import tjx_data

END_OF_DOCUMENT = "\n\n"


class TextStream:
    """Convert the tokens of one continuation to text incrementally.

    The returned pieces concatenate to the text of the tokens. Incomplete UTF-8 characters and
    possible beginnings of stop strings are held back.

    Parameters
    ----------
    tokenizer : tjx_data.Tokenizer
        The tokenizer of the tokens.
    stops : sequence of str
        Stop strings: the text ends before the first of them.
    ends_with_document : bool
        Whether the end of a document ends the text; otherwise it becomes a blank line.

    Attributes
    ----------
    stopped : bool
        Whether the text has ended.

    Examples
    --------
    >>> from tjx_data import byte_tokenizer
    >>> stream = TextStream(byte_tokenizer(), stops=["!"])
    >>> [stream.push(byte) for byte in "hé! ho".encode()]
    ['h', '', 'é', '', '', '', '']
    >>> stream.stopped
    True
    """

    def __init__(
        self,
        tokenizer: tjx_data.Tokenizer,
        stops: Sequence[str] = (),
        *,
        ends_with_document: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = [_Search(stop) for stop in stops if stop]
        self._text = _Bytes(tokenizer) if _is_byte_level(tokenizer) else _InContext(tokenizer)
        self._ends_with_document = ends_with_document
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add the next token; return the text that is complete now."""
        if self.stopped:
            return ""
        if token == self._tokenizer.eot_id:
            if self._ends_with_document:
                text, self.stopped = self.close(), True
                return text
            return self._release(self._text.flush() + END_OF_DOCUMENT)
        if token >= self._tokenizer.vocab_size:  # a padded vocabulary
            return self._release(self._text.flush() + "\N{REPLACEMENT CHARACTER}")
        return self._release(self._text.push(token))

    def close(self) -> str:
        """Return the text held back; call this after the last token."""
        rest = self._release(self._text.flush())
        if not self.stopped:
            rest, self._held = rest + self._held, ""
        return rest

    def _release(self, text: str) -> str:
        """Append text and release the start that cannot belong to a stop string, in linear time."""
        if self.stopped:
            return ""
        for position, character in enumerate(text, start=len(self._held) + 1):
            found = [search.length for search in self._stops if search.push(character)]
            if found:
                self.stopped = True
                given = (self._held + text)[: position - max(found)]
                self._held = ""
                return given
        self._held += text
        end = len(self._held) - max((search.matched for search in self._stops), default=0)
        given, self._held = self._held[:end], self._held[end:]
        return given


class _Search:
    """Find a string in a stream of characters in linear time (Knuth-Morris-Pratt).

    Attributes
    ----------
    matched : int
        Length of the longest prefix of the string that ends the stream.
    length : int
        Length of the string.
    """

    def __init__(self, text: str) -> None:
        self._text, self._fallbacks = text, _fallbacks(text)
        self.length = len(text)
        self.matched = 0

    def push(self, character: str) -> bool:
        """Add a character; return whether the string ends here."""
        while self.matched and self._text[self.matched] != character:
            self.matched = self._fallbacks[self.matched - 1]
        self.matched += self._text[self.matched] == character
        return self.matched == self.length


@lru_cache(maxsize=64)
def _fallbacks(text: str) -> tuple[int, ...]:
    """Return, for each prefix of a string, the length of its longest proper border."""
    found = [0] * len(text)
    length = 0
    for place in range(1, len(text)):
        while length and text[place] != text[length]:
            length = found[length - 1]
        length += text[place] == text[length]
        found[place] = length
    return tuple(found)


class _Bytes:
    """Decoder of byte-level tokens: a character is complete with its last byte."""

    def __init__(self, tokenizer: tjx_data.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class _InContext:
    """Decoder of tokens whose text depends on the preceding tokens."""

    def __init__(self, tokenizer: tjx_data.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._given: list[int] = []  # the last tokens whose text was returned
        self._new: list[int] = []

    def push(self, token: int) -> str:
        self._new.append(token)
        text = self._text()
        # The decoder shows an incomplete character as U+FFFD.
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._given, self._new = self._new, []
        return text

    def flush(self) -> str:
        text = self._text() if self._new else ""
        self._given, self._new = [], []
        return text

    def _text(self) -> str:
        before = self._tokenizer.decode(self._given) if self._given else ""
        return self._tokenizer.decode(self._given + self._new)[len(before) :]


def decode_text(tokenizer: tjx_data.Tokenizer, tokens: Iterable[int]) -> str:
    """Return the text of a continuation; the end of a document is a blank line."""
    stream = TextStream(tokenizer)
    return "".join([*(stream.push(token) for token in tokens), stream.close()])


def _is_byte_level(tokenizer: tjx_data.Tokenizer) -> bool:
    try:
        tokenizer.decode_bytes([])
    except ValueError:
        return False
    return True
