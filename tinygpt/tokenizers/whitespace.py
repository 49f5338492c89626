"""One token per word as whitespace cuts them, and one per line end; other whitespace is not kept."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ._base import Tokenizer, UnknownPolicy, name_characters

_PIECE = re.compile(r"\n|[^\s]+")
_UNKNOWN = "<unk>"
_LARGEST = 8192


class WhitespaceTokenizer(Tokenizer):
    """The most frequent words of the text it was trained on, behind a token for all others (id 0): no word is an error."""

    name = "whitespace"

    def __init__(self, words: Iterable[str]) -> None:
        self.words = [_UNKNOWN, *words]
        self._id_of = {word: i for i, word in enumerate(self.words)}

    @classmethod
    def train(cls, texts: Iterable[str]) -> WhitespaceTokenizer:
        seen: Counter[str] = Counter()
        for text in texts:
            seen.update(_PIECE.findall(text))
        seen.pop(_UNKNOWN, None)
        if not seen:
            raise UserError("there is no text to train a whitespace tokenizer on")
        return cls(sorted(seen, key=lambda word: (-seen[word], word))[: _LARGEST - 1])

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def encode(self, text: str, *, unknown: UnknownPolicy = "drop") -> NDArray[np.int64]:
        ids = np.array([self._id_of.get(piece, 0) for piece in _PIECE.findall(text)], np.int64)
        return ids[ids > 0] if unknown == "drop" else ids

    def decode(self, ids: Iterable[int] | NDArray[np.integer]) -> str:
        text = ""
        for i in ids:
            if not 0 <= i < len(self.words):
                raise ValueError(f"token id {i} is not one of this tokenizer's 0 .. {self.vocab_size - 1}")
            word = self.words[int(i)]
            text += word if word == "\n" or not text or text.endswith("\n") else f" {word}"
        return text

    def unknown_characters(self, text: str) -> str:
        return ""

    def payload(self) -> dict[str, object]:
        return {"words": self.words[1:]}

    @classmethod
    def from_payload(cls, payload: Mapping[str, object]) -> WhitespaceTokenizer:
        words = payload.get("words")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words) or not words:
            raise UserError(
                f"damaged whitespace tokenizer: 'words' must be a list of words, not {name_characters(str(words))}"
            )
        return cls(words)
