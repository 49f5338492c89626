"""From names and files to tokens: read as a stream, tokenised once, mapped into memory from then on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..tokenizers import Tokenizer, check_size, from_json, name_characters, tokenizer_class
from .cache import (
    Description,
    TokenFile,
    cache_key,
    finish_tokens,
    open_tokens,
    read_record,
    start_tokens,
    storing,
    token_path,
    write_record,
)
from .sources import Identity, Part, Role, Source, default_source, find, joined_name
from .text import chunks, joined

TRAIN_SHARE = 0.9
"""Share of the characters, from the beginning, that train where a corpus publishes no validation split."""

_MOST_UNKNOWN = 1000

Progress = Callable[[str, int, int | None], None]
"""Told what is being done, the number of characters that are done, and about how many there are; None: nobody knows."""


@dataclass(frozen=True)
class Corpus:
    """Tokens of a text, and what they were made of.

    Attributes:
        name: of the sources, fit for a directory's name.
        parts: name, role, size in bytes and SHA-256 of everything that was read, in order.
        fingerprint: SHA-256 of the parts' contents and of how they are split; equal for equal text, whatever its name.
        train, validation: token ids, read-only uint16 or uint32 [N], mapped into memory.
        train_chars, train_bytes, validation_chars, validation_bytes: length of the text that the tokens stand for, in
            characters and in bytes of UTF-8.
        unknown: distinct characters that the tokenizer has no token for and that were left out (at most 1000).
        notices: lines for the user: which corpus was chosen for them, what was left out.
        location: the token file.
    """

    name: str
    parts: tuple[Identity, ...]
    fingerprint: str
    train: NDArray[np.unsignedinteger[Any]]
    validation: NDArray[np.unsignedinteger[Any]]
    train_chars: int
    train_bytes: int
    validation_chars: int
    validation_bytes: int
    unknown: str
    notices: tuple[str, ...]
    location: Path

    def to_json(self) -> dict[str, Any]:
        """What a run records of its corpus."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "parts": [asdict(part) for part in self.parts],
            "train_tokens": len(self.train),
            "validation_tokens": len(self.validation),
        }

    @property
    def chars_per_token(self) -> float:
        """Mean characters per token of the validation text: bits per character = loss / ln 2 / this."""
        return self.validation_chars / len(self.validation)

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of UTF-8 per token of the validation text: bits per byte = loss / ln 2 / this."""
        return self.validation_bytes / len(self.validation)


def prepare(
    names: Sequence[str | Source],
    tokenizer: str | Tokenizer = "char",
    *,
    vocab_size: int | None = None,
    specials: Sequence[str] = (),
    progress: Progress | None = None,
    train_share: float = TRAIN_SHARE,
) -> tuple[Corpus, Tokenizer]:
    """The tokens of corpora and files, from the cache where they were prepared before.

    Published validation splits are validation text. All other text is joined in the order given and cut by position.

    Args:
        names: corpora by name and text files by path; none: the default corpus, named in `Corpus.notices`.
        tokenizer: the name of one to train on this text, or a trained one (to resume, to evaluate).
        vocab_size, specials: of a tokenizer that is trained; see `Tokenizer.train`.
        progress: called now and then while text is read for the first time.
        train_share: share of the text that trains; 0: all of it is validation text, and published training text is left
            aside.

    Raises:
        UserError: unknown names, files that are no text, a dataset that cannot be fetched, no space in the cache, or
            fewer than two tokens in all.
    """
    notices: list[str] = []
    if names:
        by_name = iter(find([name for name in names if isinstance(name, str)]))
        sources = [name if isinstance(name, Source) else next(by_name) for name in names]
    else:
        source, notice = default_source()
        sources, notices = [source], [notice]
    name = joined_name(sources)
    parts = [part for source in sources for part in source.parts() if train_share or part.role != "train"]
    identities = tuple(part.identity() for part in parts)
    fingerprint = cache_key([train_share, [[part.role, part.sha256] for part in identities]])
    total = sum(part.bytes for part in identities)
    text = _Text(parts, train_share, total, progress or (lambda doing, done, total: None))

    if isinstance(tokenizer, str):
        trained, kind = True, tokenizer_class(tokenizer)
        size = check_size(kind.name, vocab_size, specials)
        tokenizer_key = cache_key(["tokenizer", kind.name, fingerprint, size, list(specials)])
        tokenizer = _trained_before(tokenizer_key) or _train(kind, size, specials, tokenizer_key, text, name)
    else:
        trained = False
    key = cache_key([fingerprint, tokenizer.to_json()])
    tokens = open_tokens(key)
    if tokens is None:
        _write(key, name, text, tokenizer, identities, may_hold_unknown=not trained)
        tokens = open_tokens(key)
    if tokens is None:
        raise UserError(f"{token_path(key)} cannot be read back just after it was written; check the disk")
    return _corpus(name, identities, fingerprint, tokens, notices), tokenizer


def require_blocks(corpus: Corpus, block_size: int) -> None:
    """See that both splits hold a block of `block_size` tokens and the token after it.

    Raises:
        UserError: one does not; the message says how many tokens there are and how many it takes.
    """
    for split, tokens in (("training", corpus.train), ("validation", corpus.validation)):
        if len(tokens) <= block_size:
            lower = f", or lower model.block_size to {len(tokens) - 1} or less" if len(tokens) > 1 else ""
            raise UserError(
                f"{corpus.name}: the {split} split holds {len(tokens)} token{'s' * (len(tokens) != 1)}, and "
                f"model.block_size={block_size} needs at least {block_size + 1}; give more text{lower}"
            )


class _Text:
    """The parts as training text and validation text, streamed."""

    def __init__(self, parts: Sequence[Part], train_share: float, total: int, progress: Progress) -> None:
        self.parts, self.train_share, self.total, self._progress = parts, train_share, total, progress
        self.cut: int | None = None

    def progress(self, doing: str, done: int) -> None:
        self._progress(doing, done, self.total)

    def all(self) -> Iterator[str]:
        """All of it, each piece once, with the line ends that `splits` may put between; finds the place of the cut."""
        done = 0
        for piece in joined([self._of("train"), self._counted("cut"), self._of("validation")]):
            done += len(piece)
            yield piece
            self.progress("reading", done)

    def _counted(self, role: Role) -> Iterator[str]:
        length = 0
        for piece in self._of(role):
            length += len(piece)
            yield piece
        self.cut = int(length * self.train_share)

    def splits(self) -> tuple[Iterator[str], Iterator[str]]:
        """(training text, validation text), to be read in this order."""
        if self.cut is None:
            for _ in self.all():
                pass
        assert self.cut is not None
        head, tail = _cut_at(self._of("cut"), self.cut)
        return (
            chunks(joined([self._of("train"), head])),
            chunks(joined([tail, self._of("validation")])),
        )

    def _of(self, role: Role) -> Iterator[str]:
        return chunks(joined(part.read() for part in self.parts if part.role == role))


def _cut_at(text: Iterator[str], place: int) -> tuple[Iterator[str], Iterator[str]]:
    """The first `place` characters, and those after; the first must be read to its end before the second."""
    kept: list[str] = []

    def head() -> Iterator[str]:
        left = place
        while left and (piece := next(text, "")):
            yield piece[:left]
            kept.append(piece[left:])
            left -= min(left, len(piece))

    def tail() -> Iterator[str]:
        yield from kept
        yield from text

    return head(), tail()


def _trained_before(key: str) -> Tokenizer | None:
    try:
        return from_json(read_record("tokenizers", key) or {})
    except UserError:
        return None


def _train(
    kind: type[Tokenizer], size: int | None, specials: Sequence[str], key: str, text: _Text, name: str
) -> Tokenizer:  # fmt: skip
    pieces = text.all()
    first = next(pieces, None)
    if first is None:
        raise UserError(f"{name} holds no text")
    pieces = itertools.chain([first], pieces)
    if kind.sample is not None:
        pieces = _spread(pieces, kind.sample, text)
    tokenizer = kind.train(pieces, vocab_size=size, specials=specials)
    write_record("tokenizers", key, tokenizer.to_json())
    return tokenizer


def _spread(pieces: Iterator[str], most: int, text: _Text) -> Iterator[str]:
    """Pieces from all over the text, about `most` characters together."""
    taken = done = 0
    for piece in pieces:
        done += len(piece)
        if taken * text.total <= most * done:
            taken += len(piece)
            yield piece
    text.progress("training the tokenizer", done)


def _write(
    key: str, name: str, text: _Text, tokenizer: Tokenizer, identities: Iterable[Identity], *, may_hold_unknown: bool
) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    needed = text.total * dtype.itemsize
    counts: list[tuple[int, int, int]] = []
    unknown: dict[str, None] = {}
    read = 0

    def known(split: Iterator[str]) -> Iterator[str]:
        """The text without what has no token."""
        nonlocal read
        for piece in split:
            read += len(piece)
            if may_hold_unknown and (strange := tokenizer.unknown_characters(piece)):
                unknown.update(dict.fromkeys(strange))
                piece = piece.translate(dict.fromkeys(map(ord, strange)))
            yield piece

    done = 0
    with storing(token_path(key), needed=needed) as file:
        start_tokens(file)
        for split in text.splits():
            tokens = chars = size = 0
            for piece, ids in tokenizer.encode_pieces(known(split)):
                file.write(ids.astype(dtype).data)
                tokens += len(ids)
                chars += len(piece)
                size += len(piece) if piece.isascii() else len(piece.encode("utf-8", "surrogatepass"))
                text.progress("tokenising", done + chars)
            done += chars
            counts.append((tokens, chars, size))
        if tuple(part.identity() for part in text.parts) != tuple(identities):
            raise UserError(f"{name}: the text changed while it was being read; try again")
        if sum(tokens for tokens, _, _ in counts) < 2:
            raise UserError(_too_short(name, read, unknown))
        finish_tokens(file, Description(key, name, dtype.str, *counts[0], *counts[1], "".join(unknown)[:_MOST_UNKNOWN]))


def _too_short(name: str, chars: int, unknown: Iterable[str]) -> str:
    strange = "".join(unknown)
    if strange:
        return (
            f"{name}: next to nothing of this text is left without the characters the tokenizer never saw "
            f"({name_characters(strange)}); it was trained on text of another kind"
        )
    return f"{name} holds {chars} character{'s' * (chars != 1)}; nothing can be predicted from fewer than two tokens"


def _corpus(
    name: str, parts: tuple[Identity, ...], fingerprint: str, file: TokenFile, notices: Sequence[str]
) -> Corpus:
    about = file.description
    if about.unknown:
        left_out = (
            f"{name} holds characters that the tokenizer never saw: {name_characters(about.unknown)}; they are left out"
        )
        notices = [*notices, left_out]
    return Corpus(
        name=name,
        parts=parts,
        fingerprint=fingerprint,
        train=file.train,
        validation=file.validation,
        train_chars=about.train_chars,
        train_bytes=about.train_bytes,
        validation_chars=about.validation_chars,
        validation_bytes=about.validation_bytes,
        unknown=about.unknown,
        notices=tuple(notices),
        location=file.path,
    )
