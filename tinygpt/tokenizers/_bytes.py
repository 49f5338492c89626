"""Tokens that are strings of bytes. Every string has tokens, and its own bytes come back."""

from __future__ import annotations

import codecs
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ._base import REPLACEMENT, UNKNOWN, Decoder, Tokenizer, UnknownPolicy, check_specials
from ._codes import checked

# Lone surrogates are three bytes each, as WTF-8 has them; the libraries take no such text, so these go around them.
_SURROGATES = re.compile("([\ud800-\udfff]+)")


_SEGMENT = 1 << 14
"""Characters a library is given at a time: it holds a hundred bytes for each, and shares segments among all cores."""

LONGEST = 1 << 11
"""Characters of a run without a break that is not cut."""

# Training takes the square of a word's length. Only at a run's beginning: else this would, too.
_LONG = re.compile(rf"(?<!\S)\S{{{LONGEST}}}|(?<!\s)\s{{{LONGEST}}}")
# Wherever white space follows something else, GPT-2's rule ends a word and looks at nothing before it.
_BREAK = re.compile(r"(?<=\S)(?=[ \n])")


class BytesTokenizer(Tokenizer):
    """decode(encode(x)) == x for every str, lone surrogates included; there is no unknown text.

    encode(x + y) is encode(x), encode(y) where x ends with a character that is no white space, and y begins with a space or a line
    break, but for runs of 2048 characters that are all white space or all none. Bytes that are no UTF-8 decode to U+FFFD, as
    `bytes.decode(errors="replace")` does it.

    Args:
        pieces: the bytes of each token, special ones not among them; all single bytes are there. A token of no bytes never shows.
    """

    def __init__(self, pieces: Sequence[bytes], specials: Sequence[str]) -> None:
        self.specials = check_specials(specials)
        hidden = [REPLACEMENT.encode() if name == UNKNOWN else b"" for name in self.specials]
        self._bytes_of = [*hidden, *pieces]
        first = len(hidden)
        single = {piece[0]: first + i for i, piece in enumerate(pieces) if len(piece) == 1}
        self._id_of_byte = np.array([single[byte] for byte in range(256)])

    @abstractmethod
    def _encode_unicode(self, text: str) -> NDArray[np.int64]:
        """The ids, from 0, of text without surrogates."""

    @property
    def vocab_size(self) -> int:
        return len(self._bytes_of)

    def encode(self, text: str, *, unknown: UnknownPolicy = "drop") -> NDArray[np.int64]:
        if text.isascii() or not _SURROGATES.search(text):
            return self._encode_unicode(text) + len(self.specials)
        parts = [
            self._id_of_byte[np.frombuffer(part.encode("utf-8", "surrogatepass"), np.uint8)]
            if odd % 2
            else self._encode_unicode(part) + len(self.specials)
            for odd, part in enumerate(_SURROGATES.split(text))
        ]
        return np.concatenate(parts)

    def decode(self, ids: Iterable[int] | NDArray[np.integer]) -> str:
        return self.bytes_of(ids).decode("utf-8", _ERRORS)

    def bytes_of(self, ids: Iterable[int] | NDArray[np.integer]) -> bytes:
        """The bytes that ids stand for. Raises ValueError where one is out of range."""
        return b"".join(map(self._bytes_of.__getitem__, checked(ids, self.vocab_size).tolist()))

    def decoder(self) -> Decoder:
        return _BytesDecoder(self)

    def unknown_characters(self, text: str) -> str:
        return ""

    def tokens(self) -> list[str]:
        return [*self.specials, *(b.decode(errors="replace") for b in self._bytes_of[len(self.specials) :])]


class _BytesDecoder(Decoder):
    """Holds back the bytes of a character until all of them are there."""

    def __init__(self, tokenizer: BytesTokenizer) -> None:
        self._bytes = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(_ERRORS)

    def feed(self, ids: Iterable[int] | NDArray[np.integer]) -> str:
        return self._decoder.decode(self._bytes.bytes_of(ids))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def _surrogates_else_replace(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    found = error.object[error.start : error.start + 3]
    try:
        return found.decode("utf-8", "surrogatepass"), error.start + len(found)
    except UnicodeDecodeError:
        return REPLACEMENT, error.end


_ERRORS = "tinygpt-surrogates-else-replace"
codecs.register_error(_ERRORS, _surrogates_else_replace)


def segments(text: str) -> Iterator[str]:
    """The text in pieces that encode as the whole does, but where it runs on for 2048 characters without a break."""
    start = 0
    while start < len(text):
        found = _BREAK.search(text, start + _SEGMENT) if start + _SEGMENT < len(text) else None
        end = found.start() if found else len(text)
        step = LONGEST if _LONG.search(text, start, end) else end - start
        for place in range(start, end, step):
            yield text[place : min(place + step, end)]
        start = end


def _byte_of() -> dict[str, int]:
    """GPT-2's mapping of printable characters to bytes: those that print stand for themselves, the rest follow from U+0100 on."""
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_of()
"""The byte that stands behind each character of a token, as the libraries write tokens."""
