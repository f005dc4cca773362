"""Text out of tokens as they come: no character is broken, and a stop text ends it."""

import codecs
from collections.abc import Iterable, Sequence
from functools import lru_cache

import tjx_data

END_OF_DOCUMENT = "\n\n"


class TextStream:
    """Turns the tokens of one continuation into text, piece by piece.

    The pieces together are the text that the tokens stand for. What may be the beginning of a
    character or of a stop text is held back until that is known.

    Parameters
    ----------
    tokenizer : tjx_data.Tokenizer
        What made the tokens.
    stops : sequence of str
        Texts that end the continuation; neither they nor what follows is given out.
    ends_with_document : bool
        Whether the end of a document ends it too; else a blank line stands there.

    Attributes
    ----------
    stopped : bool
        Whether what ends it came.

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
        """Take the next token; return the text that is certain now."""
        if self.stopped:
            return ""
        if token == self._tokenizer.eot_id:
            if self._ends_with_document:
                text, self.stopped = self.close(), True
                return text
            return self._give(self._text.flush() + END_OF_DOCUMENT)
        if token >= self._tokenizer.vocab_size:  # a model may have more tokens than its tokenizer
            return self._give(self._text.flush() + "\N{REPLACEMENT CHARACTER}")
        return self._give(self._text.push(token))

    def close(self) -> str:
        """Return what was held back: no more tokens come."""
        rest = self._give(self._text.flush())
        if not self.stopped:
            rest, self._held = rest + self._held, ""
        return rest

    def _give(self, text: str) -> str:
        """Hold back what may begin a stop text; each character is looked at once."""
        if self.stopped:
            return ""
        for place, character in enumerate(text, start=len(self._held) + 1):
            found = [search.length for search in self._stops if search.push(character)]
            if found:
                self.stopped = True
                given = (self._held + text)[: place - max(found)]
                self._held = ""
                return given
        self._held += text
        end = len(self._held) - max((search.matched for search in self._stops), default=0)
        given, self._held = self._held[:end], self._held[end:]
        return given


class _Search:
    """Find a text in characters that come one by one, in linear time (Knuth-Morris-Pratt).

    Attributes
    ----------
    matched : int
        Characters at the end of what came that begin the text.
    length : int
        Characters of the text.
    """

    def __init__(self, text: str) -> None:
        self._text, self._fallbacks = text, _fallbacks(text)
        self.length = len(text)
        self.matched = 0

    def push(self, character: str) -> bool:
        """Take a character; tell whether the text ends with it."""
        while self.matched and self._text[self.matched] != character:
            self.matched = self._fallbacks[self.matched - 1]
        self.matched += self._text[self.matched] == character
        return self.matched == self.length


@lru_cache(maxsize=64)
def _fallbacks(text: str) -> tuple[int, ...]:
    """Return for each beginning of a text how much of its end is a beginning too."""
    found = [0] * len(text)
    length = 0
    for place in range(1, len(text)):
        while length and text[place] != text[length]:
            length = found[length - 1]
        length += text[place] == text[length]
        found[place] = length
    return tuple(found)


class _Bytes:
    """Tokens that are bytes: a character is given out with its last byte."""

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
    """Tokens whose text depends on those before: told by decoding with the ones before."""

    def __init__(self, tokenizer: tjx_data.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._given: list[int] = []  # the newest tokens whose text was given out
        self._new: list[int] = []

    def push(self, token: int) -> str:
        self._new.append(token)
        text = self._text()
        # A character that is not whole is shown as this one.
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
    """Return the text of a continuation; a blank line stands where a document ended."""
    stream = TextStream(tokenizer)
    return "".join([*(stream.push(token) for token in tokens), stream.close()])


def _is_byte_level(tokenizer: tjx_data.Tokenizer) -> bool:
    try:
        tokenizer.decode_bytes([])
    except ValueError:
        return False
    return True
