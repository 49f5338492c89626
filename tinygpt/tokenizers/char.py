"""One token per Unicode code point, numbered in code point order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ._base import REPLACEMENT, UNKNOWN, Tokenizer, UnknownPolicy, check_size, check_specials
from ._codes import Characters, Seen, characters, checked, code_points, damaged_characters, settled

_HIDDEN = 0xFFFFFFFF  # in place of a special token's code point


class CharTokenizer(Tokenizer):
    """The characters of the text it was trained on; with `unknown_token`, one more token for all others.

    decode(encode(x)) == x for every x of those characters, and encode(x + y) is encode(x), encode(y).

    Args:
        characters: distinct characters; a character's id is its place after the special tokens.
        unknown_token: add a last token for characters never seen. It decodes to U+FFFD, as the special token <unk> does.
    """

    name = "char"

    def __init__(self, characters: str, *, unknown_token: bool = False, specials: Sequence[str] = ()) -> None:
        if not characters or len(set(characters)) != len(characters):
            raise ValueError("a character tokenizer needs one or more distinct characters")
        self.characters = characters
        self.unknown_token = unknown_token
        self.specials = check_specials(specials)
        self._ids = Characters(characters, len(self.specials))
        hidden = [ord(REPLACEMENT) if name == UNKNOWN else _HIDDEN for name in self.specials]
        last = [ord(REPLACEMENT)] if unknown_token else []
        self._code_of = np.concatenate(
            [np.array(hidden, np.uint32), code_points(characters), np.array(last, np.uint32)]
        )

    @classmethod
    def train(
        cls, texts: Iterable[str], *, vocab_size: int | None = None, specials: Sequence[str] = (),
        unknown_token: bool = False,
    ) -> CharTokenizer:  # fmt: skip
        check_size(cls.name, vocab_size)
        seen = Seen()
        for text in texts:
            seen.add(text)
        found = seen.characters()
        if not found:
            raise UserError("there is no text to train a character tokenizer on")
        return cls(found, unknown_token=unknown_token, specials=specials)

    @property
    def vocab_size(self) -> int:
        return len(self._code_of)

    @property
    def unknown_id(self) -> int | None:
        return self.vocab_size - 1 if self.unknown_token else super().unknown_id

    def encode(self, text: str, *, unknown: UnknownPolicy = "drop") -> NDArray[np.int64]:
        ids = self._ids.ids(text)
        if not (ids < 0).any():
            return ids
        return settled(ids, self._ids.missing(text), unknown, self.unknown_id)

    def decode(self, ids: Iterable[int] | NDArray[np.integer]) -> str:
        codes = self._code_of[checked(ids, self.vocab_size)]
        return characters(codes[codes != _HIDDEN] if self.specials else codes)

    def unknown_characters(self, text: str) -> str:
        return self._ids.missing(text)

    def tokens(self) -> list[str]:
        return [*self.specials, *self.characters, *([REPLACEMENT] if self.unknown_token else [])]

    def payload(self) -> dict[str, object]:
        # A list: in one JSON text, two neighbouring lone surrogates would come back as a single character.
        return {"characters": list(self.characters), "unknown_token": self.unknown_token}

    @classmethod
    def from_payload(cls, payload: Mapping[str, object], specials: Sequence[str] = ()) -> CharTokenizer:
        characters, unknown_token = payload.get("characters"), payload.get("unknown_token")
        if payload.keys() != {"characters", "unknown_token"}:
            raise UserError(
                f"damaged character tokenizer: it holds {sorted(payload)}, not characters and unknown_token"
            )
        if wrong := damaged_characters(characters):
            raise UserError(f"damaged character tokenizer: {wrong}")
        if not isinstance(unknown_token, bool):
            raise UserError("damaged character tokenizer: 'unknown_token' must be true or false")
        assert isinstance(characters, list)
        return cls("".join(characters), unknown_token=unknown_token, specials=specials)
