"""Characters as numbers: code points in arrays, and the ids of those that have a token."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ._base import UnknownPolicy, name_characters

_CODE_POINTS = 0x110000


class Characters:
    """Distinct characters with consecutive ids from `first` on; all others have none."""

    def __init__(self, characters: str, first: int) -> None:
        codes = code_points(characters)
        # One entry past the largest code point stands for all that follow: `take` with mode="clip" ends there.
        self._id_of = np.full(int(codes.max()) + 2, -1, np.int64)
        self._id_of[codes] = np.arange(len(codes)) + first

    def ids(self, text: str) -> NDArray[np.int64]:
        """The id of each character, -1 where there is none."""
        return self._id_of.take(code_points(text), mode="clip")

    def missing(self, text: str) -> str:
        """The distinct characters without id, in order of appearance."""
        codes = code_points(text)
        return "".join(dict.fromkeys(characters(codes[self._id_of.take(codes, mode="clip") < 0])))


class Seen:
    """The characters of texts, collected."""

    def __init__(self) -> None:
        self._seen = np.zeros(_CODE_POINTS, bool)

    def add(self, text: str) -> None:
        self._seen[code_points(text)] = True

    def characters(self) -> str:
        """All of them in code point order."""
        return characters(np.flatnonzero(self._seen).astype(np.uint32))


def code_points(text: str) -> NDArray[np.uint32]:
    # Lone surrogates reach us from command lines that are not UTF-8; they are characters like any other.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def characters(codes: NDArray[np.uint32]) -> str:
    return codes.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")


def checked(ids: Iterable[int] | NDArray[np.integer], vocab_size: int) -> NDArray[np.int64]:
    """Ids as an int64 array.

    Raises:
        ValueError: one is out of range.
    """
    array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        wrong = array[(array < 0) | (array >= vocab_size)][0]
        raise ValueError(f"token id {wrong} is not one of this tokenizer's 0 .. {vocab_size - 1}")
    return array


def settled(
    ids: NDArray[np.int64], missing: str, unknown: UnknownPolicy, unknown_id: int | None
) -> NDArray[np.int64]:  # fmt: skip
    """Ids of characters with what has none (-1) left out or replaced. missing: those characters, for the message.

    Raises:
        UserError: as `Tokenizer.encode` says.
    """
    if not missing:
        return ids
    if unknown == "drop":
        return ids[ids >= 0]
    if unknown == "replace" and unknown_id is not None:
        return np.where(ids < 0, unknown_id, ids)
    names = name_characters(missing)
    if unknown == "replace":
        raise UserError(
            f"no token for {names}, and this tokenizer was trained without an unknown token to put in their place; "
            "leave them out with unknown='drop'"
        )
    raise UserError(f"no token for {names}: the text this tokenizer was trained on did not hold them")


def damaged_characters(values: object) -> str | None:
    """What is wrong with a list of characters read from JSON; None where nothing is."""
    if not isinstance(values, list) or not all(isinstance(c, str) and len(c) == 1 for c in values):
        return "'characters' must be a list of single characters"
    if not values or len(set(values)) != len(values):
        return "'characters' must be distinct, and at least one"
    return None
