"""From records to rows of token ids, held in memory: pairs and labelled lines, in training and validation examples.

# B batch, T tokens, R rows
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..tokenizers import Tokenizer, tokenizer_class
from .cache import cache_key
from .records import Record, RecordSource
from .sources import Identity, joined_name

VALIDATION_EVERY = 10
"""Every tenth record of a source without a validation split of its own is held out: files are often sorted."""


@dataclass(frozen=True)
class Rows:
    """Rows of different lengths. ids: all of them one after the other; starts: int64 [R + 1], where each begins."""

    ids: NDArray[np.integer[Any]]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Iterable[NDArray[np.integer[Any]]]) -> Rows:
        """Rows as one array."""
        rows = list(rows)
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return cls(np.concatenate([*rows, np.empty(0, np.int64)]).astype(np.uint32), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> NDArray[np.integer[Any]]:
        return self.ids[self.starts[row] : self.starts[row + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[R]."""
        return np.diff(self.starts)

    def padded(
        self, index: NDArray[np.int64], width: int, *, fill: int = 0
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(ids [B, width], lengths [B]) of some rows, cut at `width` and filled up to it."""
        lengths = np.minimum(self.starts[index + 1] - self.starts[index], width)
        place = np.arange(width)
        real = place < lengths[:, None]
        ids = np.full((len(index), width), fill, np.int64)
        ids[real] = self.ids[(self.starts[index][:, None] + place)[real]]
        return ids, lengths


@dataclass(frozen=True)
class Examples:
    """Records as tokens. second: of pairs, the targets; labels: of labelled lines, int64 [R]. where: for messages, [R]."""

    first: Rows
    second: Rows
    labels: NDArray[np.int64]
    where: Sequence[str]

    def __len__(self) -> int:
        return len(self.first)


@dataclass(frozen=True)
class ExampleCorpus:
    """What `Corpus` is for text. labels: the names of the classes, sorted; of pairs, none."""

    name: str
    parts: tuple[Identity, ...]
    fingerprint: str
    train: Examples
    validation: Examples
    labels: tuple[str, ...]
    notices: tuple[str, ...] = ()


def prepare_examples(
    sources: Sequence[RecordSource],
    tokenizer: str | Tokenizer,
    *,
    vocab_size: int | None = None,
    labels: Sequence[str] = (),
    whole: bool = False,
) -> tuple[ExampleCorpus, Tokenizer]:
    """The examples of sources that all hold the same.

    Args:
        tokenizer: the name of one to train on all columns of text, or a trained one.
        vocab_size: of a tokenizer that is trained here; None: its default.
        labels: the classes of a trained model; none: those of the training records.
        whole: take all records, but those published for training, as validation.

    Raises:
        UserError: sources that cannot be read, no records in a split, or labels that cannot be learned.
    """
    name, holds = joined_name(sources), sources[0].holds
    train: list[Record] = []
    validation: list[Record] = []
    identities: list[Identity] = []
    for source in sources:
        for part in source.parts():
            if whole and part.role == "train":
                continue
            identities.append(part.identity())
            records = list(source.records(part))
            if part.role == "cut" and not whole:
                train += (r for i, r in enumerate(records) if (i + 1) % VALIDATION_EVERY)
                validation += records[VALIDATION_EVERY - 1 :: VALIDATION_EVERY]
            else:
                (train if part.role == "train" else validation).extend(records)
    if not validation or not (train or whole):
        split = "validation" if train or whole else "training"
        raise UserError(
            f"{name} leaves no {split} examples: it holds {len(train) + len(validation)} lines, of which every "
            f"{VALIDATION_EVERY}th is held out"
        )
    if isinstance(tokenizer, str):
        columns = (r.first + "\n" + (r.second + "\n" if holds == "pairs" else "") for r in [*train, *validation])
        tokenizer = tokenizer_class(tokenizer).train(columns, vocab_size=vocab_size)
    classes = _classes(name, train, validation, labels) if holds == "labelled" else ()
    fingerprint = cache_key(["records", holds, whole, [[part.role, part.sha256] for part in identities]])
    halves = [_encode(records, tokenizer, classes) for records in (train, validation)]
    return ExampleCorpus(name, tuple(identities), fingerprint, halves[0], halves[1], classes), tokenizer


def encode_known(tokenizer: Tokenizer, text: str) -> NDArray[np.int64]:
    """Token ids; what the tokenizer does not know becomes its unknown token, and is left out where it has none."""
    try:
        return tokenizer.encode(text, unknown="replace")
    except UserError:
        return tokenizer.encode(text, unknown="drop")


def _encode(records: Sequence[Record], tokenizer: Tokenizer, classes: tuple[str, ...]) -> Examples:
    number = {label: i for i, label in enumerate(classes)}
    first = Rows.of(encode_known(tokenizer, r.first) for r in records)
    second = Rows.of([] if classes else [encode_known(tokenizer, r.second) for r in records])
    labels = np.array([number[r.second] for r in records] if classes else [], np.int64)
    return Examples(first, second, labels, [r.where for r in records])


def _classes(
    name: str, train: Sequence[Record], validation: Sequence[Record], labels: Sequence[str]
) -> tuple[str, ...]:
    classes = tuple(labels) or tuple(sorted({r.second for r in train}))
    for record in [*train, *validation]:
        if record.second not in classes:
            there = ", ".join(map(repr, classes[:8]))
            raise UserError(
                f"{record.where}: class {record.second!r} has no example among those that train, which know {there}; "
                f"give it more lines (every {VALIDATION_EVERY}th is held out), or take it out"
            )
    if len(classes) < 2:
        raise UserError(f"{name}: every line is labelled {classes[0]!r}; a classifier needs two classes or more")
    return classes
