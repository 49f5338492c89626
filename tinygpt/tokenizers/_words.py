"""Words as tokens, and all else as characters. Nothing is lost: what is no frequent word is spelled.

The vocabulary is every character of the training text and its most frequent words. A word of the vocabulary is one token, any
other is spelled, character by character. A single space between two tokens that are words is not written: `decode` puts it
there, since two words can stand side by side in no other way. All other white space is characters.

    to be, or not      with `or` unknown:   [to] [be] , space o r space [not]
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ._base import REPLACEMENT, UNKNOWN, Decoder, Tokenizer, UnknownPolicy, check_size, check_specials
from ._codes import Characters, Seen, checked, damaged_characters, settled
from ._workers import encode_in_processes

_LONGEST = 100
"""Characters of a word that may become a token. Text is cut within a word only where that is longer by far."""

_MOST = 1 << 20
"""Words counted at a time; when there are more, those seen once are forgotten."""

_SURROGATE = re.compile("[\ud800-\udfff]")

Self = TypeVar("Self", bound="WordsTokenizer")


class WordsTokenizer(Tokenizer):
    """decode(encode(x)) == x for every x of the characters of the text it was trained on.

    Unknown characters are left out before anything else (`unknown="drop"`), so that encode(x) is what x without them gives.

    Args:
        characters: distinct characters. words: distinct words, none longer than a line.
    """

    words_are: ClassVar[str]
    """A regular expression for a word: the longest match of one kind of character, white space not among them."""

    def __init__(self, characters: str, words: Sequence[str], *, specials: Sequence[str] = ()) -> None:
        self.characters, self.words = characters, tuple(words)
        self.specials = check_specials(specials)
        first = len(self.specials)
        self._first_word = first + len(characters)
        self._characters = Characters(characters, first)
        self._space = int(self._characters.ids(" ")[0])
        self._split = re.compile(f"{self.words_are}|.", re.DOTALL).findall
        self._id_of = {c: first + i for i, c in enumerate(characters)}
        self._id_of |= {word: self._first_word + i for i, word in enumerate(words)}
        shown = [REPLACEMENT if name == UNKNOWN else "" for name in self.specials]
        self._text_of = [*shown, *characters, *words]
        self._text_of += [f" {text}" for text in self._text_of]  # from vocab_size on: after a space
        self._hidden = np.array([text == "" for text in shown] + [False] * (self.vocab_size - first))

    @classmethod
    def train(
        cls: type[Self], texts: Iterable[str], *, vocab_size: int | None = None, specials: Sequence[str] = ()
    ) -> Self:  # fmt: skip
        size = check_size(cls.name, vocab_size, specials)
        assert size is not None
        find = re.compile(cls.words_are).findall
        seen, counts = Seen(), Counter[str]()
        for text in texts:
            seen.add(text)
            counts.update(find(text))
            if len(counts) > _MOST:
                counts = Counter({word: count for word, count in counts.items() if count > 1})
        characters = seen.characters()
        if not characters:
            raise UserError(f"there is no text to train a {cls.name} tokenizer on")
        room = size - len(specials) - len(characters)
        if room < 0:
            raise UserError(
                f"--vocab-size {size} is too small: this text has {len(characters)} distinct characters, each of which is a "
                f"token{f', and {len(specials)} special tokens' if specials else ''}; give at least {size - room}"
            )
        # A word seen once is better spelled: its token would be learned from a single example.
        frequent = [
            word for word, n in counts.items() if n > 1 and len(word) <= _LONGEST and not _SURROGATE.search(word)
        ]
        frequent.sort(key=lambda word: (-counts[word], word))
        return cls(characters, frequent[:room], specials=specials)

    @property
    def vocab_size(self) -> int:
        return self._first_word + len(self.words)

    def encode(self, text: str, *, unknown: UnknownPolicy = "drop") -> NDArray[np.int64]:
        missing = self._characters.missing(text)
        if missing and unknown == "drop":
            text, missing = text.translate(dict.fromkeys(map(ord, missing))), ""
        found = self._split(text)
        ids = np.fromiter(map(self._id_of.get, found, repeat(-1)), np.int64, len(found))
        is_word = ids >= self._first_word
        spelled = np.flatnonzero(ids < 0)
        lengths = np.ones(len(ids), np.int64)
        lengths[spelled] = [len(found[i]) for i in spelled]
        if self._space >= 0:
            lengths[1:-1][(ids[1:-1] == self._space) & is_word[:-2] & is_word[2:]] = 0
        ids = np.repeat(ids, lengths)
        ids[ids < 0] = self._characters.ids("".join([found[i] for i in spelled]))
        return settled(ids, missing, unknown, self.unknown_id)

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[tuple[str, NDArray[np.int64]]]:
        return encode_in_processes(self, pieces)

    def decode(self, ids: Iterable[int] | NDArray[np.integer]) -> str:
        return self.decoder().feed(ids)

    def decoder(self) -> Decoder:
        return _WordsDecoder(self)

    def unknown_characters(self, text: str) -> str:
        return self._characters.missing(text)

    def tokens(self) -> list[str]:
        return [*self.specials, *self.characters, *self.words]

    def payload(self) -> dict[str, object]:
        return {"characters": list(self.characters), "words": list(self.words)}

    @classmethod
    def from_payload(cls: type[Self], payload: Mapping[str, object], specials: Sequence[str] = ()) -> Self:
        characters, words = payload.get("characters"), payload.get("words")
        if payload.keys() != {"characters", "words"}:
            raise UserError(f"damaged {cls.name} tokenizer: it holds {sorted(payload)}, not characters and words")
        if wrong := damaged_characters(characters):
            raise UserError(f"damaged {cls.name} tokenizer: {wrong}")
        if not isinstance(words, list) or not all(isinstance(w, str) for w in words) or len(set(words)) != len(words):
            raise UserError(f"damaged {cls.name} tokenizer: 'words' must be a list of distinct words")
        word = re.compile(cls.words_are)
        if strange := [w for w in words if not word.fullmatch(w)]:
            raise UserError(f"damaged {cls.name} tokenizer: {strange[0]!r} is no word")
        assert isinstance(characters, list)
        return cls("".join(characters), words, specials=specials)


class _WordsDecoder(Decoder):
    """Remembers whether the last token was a word: the next one, if it is one too, comes after a space."""

    def __init__(self, tokenizer: WordsTokenizer) -> None:
        self._words = tokenizer
        self._after_word = False

    def feed(self, ids: Iterable[int] | NDArray[np.integer]) -> str:
        words = self._words
        array = checked(ids, words.vocab_size)
        if words.specials:
            array = array[~words._hidden[array]]
        if not array.size:
            return ""
        is_word = array >= words._first_word
        after_word = np.append(self._after_word, is_word[:-1])
        self._after_word = bool(is_word[-1])
        array = array + words.vocab_size * (is_word & after_word)
        return "".join(map(words._text_of.__getitem__, array.tolist()))
