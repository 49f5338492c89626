"""Subword vocabularies that the `tokenizers` library trains and applies, on bytes.

The library sees each byte as a printable character (GPT-2's mapping) and splits text by GPT-2's rule before anything else. That
makes both its models lossless; SentencePiece's own treatment of white space is not.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar, TypeVar

import numpy as np
import tokenizers as library
from numpy.typing import NDArray
from tokenizers import decoders, pre_tokenizers

from ..errors import UserError
from ._base import check_size
from ._bytes import BYTE_OF, LONGEST, BytesTokenizer, segments
from ._workers import encode_in_processes

# What the rule cannot join with what comes before: a space or line break after something else, and what follows up to the next such
# place. Most of these have been met before, and to remember their tokens is several times faster than to ask the library.
_words = re.compile(r"\s*\S+(?:[^\S \n]\s*\S*)*|\s+").findall
_MOST_KEPT = 1 << 21
"""Characters of all words that are remembered together."""

Self = TypeVar("Self", bound="SubwordTokenizer")


class SubwordTokenizer(BytesTokenizer):
    """A trained tokenizer of the library.

    Args:
        trained: the library's tokenizer, of this class's model, over bytes.
    """

    model: ClassVar[str]
    """The library's name for it."""

    def __init__(self, trained: library.Tokenizer, *, specials: Sequence[str] = ()) -> None:
        self._library = trained
        self._ids_of: dict[str, list[int]] = {}
        self._kept = 0
        by_id = sorted(trained.get_vocab().items(), key=lambda item: item[1])
        if [i for _, i in by_id] != list(range(len(by_id))):
            raise ValueError("its ids have gaps")
        super().__init__([bytes(BYTE_OF[c] for c in token) for token, _ in by_id], specials)

    @classmethod
    @abstractmethod
    def _empty(cls) -> library.models.Model:
        """An untrained model."""

    @classmethod
    @abstractmethod
    def _trainer(cls, **settings: Any) -> library.trainers.Trainer:
        """The model's trainer."""

    @classmethod
    def _finish(cls, trained: library.Tokenizer) -> library.Tokenizer:
        """What becomes of a tokenizer after training."""
        return trained

    @classmethod
    def train(
        cls: type[Self], texts: Iterable[str], *, vocab_size: int | None = None, specials: Sequence[str] = ()
    ) -> Self:  # fmt: skip
        size = check_size(cls.name, vocab_size, specials)
        assert size is not None
        valid = (text.encode("utf-8", "ignore").decode() for text in texts)  # without surrogates
        pieces = chain.from_iterable(segments(text) for text in valid)
        first = next(pieces, None)
        if first is None:
            raise UserError(f"there is no text to train a {cls.name} tokenizer on")
        trained = library.Tokenizer(cls._empty())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        trained.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        trainer = cls._trainer(
            vocab_size=size - len(specials), show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        trained.train_from_iterator(chain([first], pieces), trainer)
        return cls(cls._finish(trained), specials=specials)

    def _encode_unicode(self, text: str) -> NDArray[np.int64]:
        words = _words(text)
        new = set(words).difference(self._ids_of)
        if 2 * len(new) > len(words) and max(map(len, new)) < LONGEST:  # not worth remembering; the same tokens
            return self._at_once(list(segments(text)))
        if new:
            self._kept += sum(map(len, new))
            if self._kept > _MOST_KEPT:
                self._ids_of.clear()
                new = set(words)
                self._kept = sum(map(len, new))
            self._ids_of |= self._looked_up(list(new))
        return np.fromiter(chain.from_iterable(map(self._ids_of.__getitem__, words)), np.int64)

    def _at_once(self, parts: list[str]) -> NDArray[np.int64]:
        encoded = self._library.encode_batch_fast(parts, add_special_tokens=False)
        return np.fromiter(chain.from_iterable(found.ids for found in encoded), np.int64)

    def _looked_up(self, words: list[str]) -> dict[str, list[int]]:
        parts = [[word] if len(word) < LONGEST else list(segments(word)) for word in words]
        encoded = iter(self._library.encode_batch_fast([*chain.from_iterable(parts)], add_special_tokens=False))
        return {word: [i for _ in part for i in next(encoded).ids] for word, part in zip(words, parts, strict=True)}

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[tuple[str, NDArray[np.int64]]]:
        return encode_in_processes(self, pieces)

    def payload(self) -> dict[str, object]:
        return {"tokenizers": json.loads(self._library.to_str())}

    @classmethod
    def from_payload(cls: type[Self], payload: Mapping[str, object], specials: Sequence[str] = ()) -> Self:
        if payload.keys() != {"tokenizers"}:
            raise UserError(f"damaged {cls.name} tokenizer: it holds {sorted(payload)}, not tokenizers")
        described = payload["tokenizers"]
        try:
            model = described["model"]["type"]  # type: ignore[index]
            if model != cls.model or described["added_tokens"]:  # type: ignore[index]
                raise ValueError(f"it is a {model} with {len(described['added_tokens'])} added tokens")  # type: ignore[index]
            if described["pre_tokenizer"]["type"] != "ByteLevel" or described["normalizer"]:  # type: ignore[index]
                raise ValueError("it does not work on bytes")
            return cls(library.Tokenizer.from_str(json.dumps(described)), specials=specials)
        except Exception as error:  # the library's errors are of class Exception
            raise UserError(f"damaged {cls.name} tokenizer: {type(error).__name__}: {error}") from None
