"""What every tokenizer does. Imports no numpy: names and errors must answer at once."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from .. import atomic

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FORMAT = "tinygpt-tokenizer"
VERSION = 1

UnknownPolicy = Literal["drop", "replace", "error"]
"""What becomes of text that a tokenizer has no token for: it is left out, becomes the unknown token, or is an error."""


class Tokenizer(ABC):
    """Text to token ids and back. Immutable once made; equal when `to_json` is equal."""

    name: ClassVar[str]
    classes: ClassVar[dict[str, type[Tokenizer]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Tokenizer.classes[cls.name] = cls

    @classmethod
    @abstractmethod
    def train(cls, texts: Iterable[str]) -> Tokenizer:
        """A tokenizer for text like `texts`: pieces of one text in order, read once and never held together.

        Raises:
            UserError: there is no text.
        """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of tokens; ids are 0 .. vocab_size - 1."""

    @abstractmethod
    def encode(self, text: str, *, unknown: UnknownPolicy = "drop") -> NDArray[np.int64]:
        """Token ids, int64 [tokens].

        Raises:
            UserError: `unknown="error"` and the text holds what this tokenizer never saw, which the message names; or
                `unknown="replace"` and there is no unknown token.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int] | NDArray[np.integer]) -> str:
        """The text of token ids.

        Raises:
            ValueError: an id is out of range.
        """

    @abstractmethod
    def unknown_characters(self, text: str) -> str:
        """The distinct characters of `text` that have no token, in order of appearance; "" when there are none."""

    @abstractmethod
    def payload(self) -> dict[str, object]:
        """All that defines this tokenizer, ready for JSON."""

    @classmethod
    @abstractmethod
    def from_payload(cls, payload: Mapping[str, object]) -> Tokenizer:
        """The inverse of `payload`.

        Raises:
            UserError: the payload is damaged.
        """

    def to_json(self) -> dict[str, object]:
        """A versioned description that `tinygpt.tokenizers.from_json` reads."""
        return {"format": FORMAT, "version": VERSION, "type": self.name, **self.payload()}

    def save(self, path: str | Path) -> None:
        """Write the tokenizer to a JSON file, atomically."""
        atomic.write(Path(path), (json.dumps(self.to_json(), indent=1) + "\n").encode())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_json()))


def name_characters(characters: str, limit: int = 8) -> str:
    """Characters as a message names them: `'€', '\\x07' and 3 more`."""
    shown = ", ".join(repr(character) for character in characters[:limit])
    more = len(characters) - limit
    return f"{shown} and {more} more" if more > 0 else shown
