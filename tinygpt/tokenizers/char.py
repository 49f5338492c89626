"""One token per Unicode code point, numbered in code point order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ._base import Tokenizer, UnknownPolicy, name_characters

_CODE_POINTS = 0x110000
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class CharTokenizer(Tokenizer):
    """The characters of the text it was trained on; with `unknown_token`, one more token for all others.

    Args:
        characters: distinct characters; a character's id is its place.
        unknown_token: add a last token for characters never seen. It decodes to U+FFFD.
    """

    name = "char"

    def __init__(self, characters: str, *, unknown_token: bool = False) -> None:
        if not characters or len(set(characters)) != len(characters):
            raise ValueError("a character tokenizer needs one or more distinct characters")
        self.characters = characters
        self.unknown_token = unknown_token
        codes = _code_points(characters)
        # One entry past the largest code point stands for all that follow: `take` with mode="clip" ends there.
        self._id_of = np.full(int(codes.max()) + 2, -1, np.int64)
        self._id_of[codes] = np.arange(len(codes))
        self._code_of = np.append(codes, np.uint32(ord(_REPLACEMENT))) if unknown_token else codes

    @classmethod
    def train(cls, texts: Iterable[str], *, unknown_token: bool = False) -> CharTokenizer:
        seen = np.zeros(_CODE_POINTS, bool)
        for text in texts:
            seen[_code_points(text)] = True
        characters = _text(np.flatnonzero(seen).astype(np.uint32))
        if not characters:
            raise UserError("there is no text to train a character tokenizer on")
        return cls(characters, unknown_token=unknown_token)

    @property
    def vocab_size(self) -> int:
        return len(self._code_of)

    def encode(self, text: str, *, unknown: UnknownPolicy = "drop") -> NDArray[np.int64]:
        ids = self._id_of.take(_code_points(text), mode="clip")
        missing = ids < 0
        if not missing.any():
            return ids
        if unknown == "drop":
            return ids[~missing]
        if unknown == "replace" and self.unknown_token:
            ids[missing] = self.vocab_size - 1
            return ids
        names = name_characters(self.unknown_characters(text))
        if unknown == "replace":
            raise UserError(
                f"no token for {names}, and this tokenizer was trained without an unknown token to put in their place; "
                "leave them out with unknown='drop'"
            )
        raise UserError(f"no token for {names}: the text this tokenizer was trained on did not hold them")

    def decode(self, ids: Iterable[int] | NDArray[np.integer]) -> str:
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
        if array.size and (array.min() < 0 or array.max() >= self.vocab_size):
            wrong = array[(array < 0) | (array >= self.vocab_size)][0]
            raise ValueError(f"token id {wrong} is not one of this tokenizer's 0 .. {self.vocab_size - 1}")
        return _text(self._code_of[array])

    def unknown_characters(self, text: str) -> str:
        codes = _code_points(text)
        missing = codes[self._id_of.take(codes, mode="clip") < 0]
        return "".join(dict.fromkeys(_text(missing)))

    def payload(self) -> dict[str, object]:
        # A list: in one JSON text, two neighbouring lone surrogates would come back as a single character.
        return {"characters": list(self.characters), "unknown_token": self.unknown_token}

    @classmethod
    def from_payload(cls, payload: Mapping[str, object]) -> CharTokenizer:
        characters, unknown_token = payload.get("characters"), payload.get("unknown_token")
        if payload.keys() != {"characters", "unknown_token"}:
            raise UserError(
                f"damaged character tokenizer: it holds {sorted(payload)}, not characters and unknown_token"
            )
        if not isinstance(characters, list) or not all(isinstance(c, str) and len(c) == 1 for c in characters):
            raise UserError("damaged character tokenizer: 'characters' must be a list of single characters")
        if not characters or len(set(characters)) != len(characters):
            raise UserError("damaged character tokenizer: 'characters' must be distinct, and at least one")
        if not isinstance(unknown_token, bool):
            raise UserError("damaged character tokenizer: 'unknown_token' must be true or false")
        return cls("".join(characters), unknown_token=unknown_token)


def _code_points(text: str) -> NDArray[np.uint32]:
    # Lone surrogates reach us from command lines that are not UTF-8; they are characters like any other.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _text(codes: NDArray[np.uint32]) -> str:
    return codes.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
