"""What every tokenizer does. Imports no numpy: names and errors must answer at once."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from .. import atomic
from ..errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FORMAT = "tinygpt-tokenizer"
VERSION = 1

UnknownPolicy = Literal["drop", "replace", "error"]
"""What becomes of text that a tokenizer has no token for: it is left out, becomes the unknown token, or is an error."""

PAD, START, END, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
"""The special tokens that models here ask for; any other name will do as well."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Size:
    """What can be asked of a vocabulary. fixed: why its size cannot be chosen, or ""."""

    default: int | None = None
    least: int = 1
    fixed: str = ""


# Here and not with the classes, which import numpy: a wrong --vocab-size is refused before that.
SIZES: dict[str, Size] = {
    "char": Size(fixed="it has as many tokens as the text has characters"),
    "gpt2": Size(fixed="its vocabulary is GPT-2's, 50257 tokens"),
    "word": Size(default=8192, least=2),
    "whitespace": Size(default=8192, least=2),
    "bpe": Size(default=4096, least=256),
    "unigram": Size(default=4096, least=256),
}


class Tokenizer(ABC):
    """Text to token ids and back. Immutable once made; equal when `to_json` is equal.

    Special tokens have the first ids, in the order they were declared, whatever the text. No text encodes to one, but for the
    unknown token under `unknown="replace"`, and none shows in decoded text, but for the unknown token, which is U+FFFD.
    """

    name: ClassVar[str]
    classes: ClassVar[dict[str, type[Tokenizer]]] = {}
    sample: ClassVar[int | None] = None
    """Characters that are enough to train on; of a longer text, pieces from all over it. None: it must see everything."""

    specials: tuple[str, ...] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in cls.__dict__:
            Tokenizer.classes[cls.name] = cls

    @classmethod
    @abstractmethod
    def train(
        cls, texts: Iterable[str], *, vocab_size: int | None = None, specials: Sequence[str] = ()
    ) -> Tokenizer:  # fmt: skip
        """A tokenizer for text like `texts`: pieces of one text in order, read once and never held together.

        Args:
            vocab_size: tokens at most, special ones among them; fewer where the text gives no more. None: a default.
            specials: distinct names of special tokens; they get the ids 0, 1, ...

        Raises:
            UserError: there is no text, or no vocabulary of that size can be.
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

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[tuple[str, NDArray[np.int64]]]:
        """Each piece of a long text with its ids (unknown="error"), in order, on as many cores as it pays."""
        for piece in pieces:
            yield piece, self.encode(piece, unknown="error")

    @abstractmethod
    def decode(self, ids: Iterable[int] | NDArray[np.integer]) -> str:
        """The text of token ids.

        Raises:
            ValueError: an id is out of range.
        """

    def decoder(self) -> Decoder:
        """Decodes ids that come a few at a time."""
        return Decoder(self)

    def special_id(self, name: str) -> int:
        """The id of a special token.

        Raises:
            UserError: this tokenizer was made without it.
        """
        if name not in self.specials:
            raise UserError(
                f"this {self.name} tokenizer has no special token {name!r} (it has: {', '.join(self.specials) or 'none'}); "
                f"train one that declares it"
            )
        return self.specials.index(name)

    @property
    def unknown_id(self) -> int | None:
        """The token for what has none."""
        return self.specials.index(UNKNOWN) if UNKNOWN in self.specials else None

    @abstractmethod
    def unknown_characters(self, text: str) -> str:
        """The distinct characters of `text` that have no token, in order of appearance; "" when there are none."""

    @abstractmethod
    def tokens(self) -> list[str]:
        """Each token as a person may read it, by id: its text, bytes that are no character as U+FFFD, special ones by name."""

    @abstractmethod
    def payload(self) -> dict[str, object]:
        """All that defines this tokenizer but its special tokens, ready for JSON."""

    @classmethod
    @abstractmethod
    def from_payload(cls, payload: Mapping[str, object], specials: Sequence[str] = ()) -> Tokenizer:
        """The inverse of `payload`.

        Raises:
            UserError: the payload is damaged.
        """

    def to_json(self) -> dict[str, object]:
        """A versioned description that `tinygpt.tokenizers.from_json` reads."""
        specials = {"specials": list(self.specials)} if self.specials else {}
        return {"format": FORMAT, "version": VERSION, "type": self.name, **specials, **self.payload()}

    def save(self, path: str | Path) -> None:
        """Write the tokenizer to a JSON file, atomically."""
        atomic.write(Path(path), (json.dumps(self.to_json(), indent=1) + "\n").encode())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_json()))


class Decoder:
    """Text of ids that come a few at a time: all that `feed` and `finish` return, joined, is what `decode` gives for all the ids.

    This one is for tokens whose text depends on no neighbour.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def feed(self, ids: Iterable[int] | NDArray[np.integer]) -> str:
        """The text that is certain now: whole characters. Raises ValueError where an id is out of range."""
        return self._tokenizer.decode(ids)

    def finish(self) -> str:
        """What was held back; nothing may follow."""
        return ""


def check_size(name: str, size: int | None, specials: Sequence[str] = ()) -> int | None:
    """The size to train with: `size`, or the tokenizer's default for None.

    Raises:
        UserError: no text gives a vocabulary of that size.
    """
    limits = SIZES.get(name, Size())
    if size is None:
        return limits.default
    if limits.fixed:
        raise UserError(f"--vocab-size {size}: tokenizer {name!r} takes none, {limits.fixed}; leave it out")
    least = limits.least + len(specials)
    if size < least:
        why = {256: "one for each byte"}.get(limits.least, "characters and words")
        more = f" and {len(specials)} special ones" if specials else ""
        raise UserError(
            f"--vocab-size {size} is too small: tokenizer {name!r} needs at least {least} tokens, {why}{more}"
        )
    if size > 1 << 24:
        raise UserError(f"--vocab-size {size} is more than {1 << 24} tokens, which no model here could hold")
    return size


def check_specials(specials: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple. Raises ValueError where one is empty or stands twice."""
    if len(set(specials)) != len(specials) or not all(specials):
        raise ValueError(f"special tokens must have distinct names, not {list(specials)}")
    return tuple(specials)


def name_characters(characters: str, limit: int = 8) -> str:
    """Characters as a message names them: `'€', '\\x07' and 3 more`."""
    shown = ", ".join(repr(character) for character in characters[:limit])
    more = len(characters) - limit
    return f"{shown} and {more} more" if more > 0 else shown
