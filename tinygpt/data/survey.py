"""What tokenizers make of a text: how many tokens, for how large a vocabulary."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from ..errors import UserError
from ..tokenizers import Tokenizer, known_tokenizers, tokenizer_class
from ..tokenizers._base import SIZES
from .sources import Part
from .text import joined

VOCABULARIES = (512, 2048, 8192)
"""Sizes at which tokenizers that can be of any size are compared."""


@dataclass(frozen=True)
class Sample:
    """The beginning of a text. whole: it is all of it."""

    text: str
    whole: bool

    @property
    def bytes(self) -> int:
        return len(self.text.encode("utf-8", "surrogatepass"))

    @property
    def lines(self) -> int:
        return self.text.count("\n") + (not self.text.endswith("\n"))


@dataclass(frozen=True)
class Measured:
    """A tokenizer, trained on a text, and that text in its tokens."""

    tokenizer: str
    vocab_size: int
    tokens: int
    chars_per_token: float
    bytes_per_token: float


def take(parts: Sequence[Part], most: int) -> Sample:
    """The first characters of the parts, `most` at most, in the order in which they are read for training.

    Raises:
        UserError: the text cannot be read, or there is none.
    """
    pieces = joined(part.read() for role in ("train", "cut", "validation") for part in parts if part.role == role)
    kept: list[str] = []
    length = 0
    for piece in pieces:
        kept.append(piece)
        length += len(piece)
        if length > most:
            break
    if not length:
        raise UserError("there is no text to look at")
    return Sample("".join(kept)[:most], whole=length <= most)


def trained(name: str, sample: Sample, vocab_size: int | None) -> Tokenizer:
    """A tokenizer trained on the sample. Raises UserError as `Tokenizer.train` does."""
    return tokenizer_class(name).train(_pieces(sample.text), vocab_size=vocab_size)


def compare(sample: Sample, sizes: Sequence[int] = VOCABULARIES, tell: Callable[[str], None] = lambda doing: None
) -> Iterator[Measured]:  # fmt: skip
    """Every tokenizer that needs no network, measured on the sample, those of any size at each of `sizes` that is possible."""
    for name in known_tokenizers():
        if SIZES[name].fixed:
            if name == "gpt2" and not _gpt2_is_here():
                continue
            tell(name)
            yield measure(trained(name, sample, None), sample)
            continue
        seen: set[int] = set()
        for tokenizer in _at_sizes(name, sample, sizes, tell):
            if tokenizer.vocab_size not in seen:  # a short text gives no more tokens however many are asked for
                seen.add(tokenizer.vocab_size)
                yield measure(tokenizer, sample)


def measure(tokenizer: Tokenizer, sample: Sample) -> Measured:
    """The sample in this tokenizer's tokens."""
    tokens = sum(len(tokenizer.encode(piece)) for piece in _pieces(sample.text))
    return Measured(
        tokenizer.name, tokenizer.vocab_size, tokens, len(sample.text) / tokens, sample.bytes / tokens
    )  # fmt: skip


def _at_sizes(name: str, sample: Sample, sizes: Sequence[int], tell: Callable[[str], None]) -> Iterator[Tokenizer]:
    if name == "bpe":  # a smaller vocabulary is the beginning of a larger one
        from ..tokenizers.bpe import BpeTokenizer

        tell("bpe")
        largest = trained(name, sample, max(sizes))
        assert isinstance(largest, BpeTokenizer)
        for size in sorted(sizes):
            tell(f"bpe, {size} tokens")
            yield largest.smaller(size)
        return
    for size in sorted(sizes):
        tell(f"{name}, {size} tokens")
        try:
            yield trained(name, sample, size)
        except UserError:  # more characters than that
            continue


def _pieces(text: str, size: int = 1 << 20) -> Iterator[str]:
    ends = itertools.count(0, size)
    return (text[start : start + size] for start in itertools.takewhile(lambda start: start < len(text), ends))


def _gpt2_is_here() -> bool:
    from ..tokenizers.gpt2 import vocabulary_file

    return find_spec("tiktoken") is not None and vocabulary_file() is not None
