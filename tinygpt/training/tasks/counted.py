"""A stream, and beside the loss what counting says: a bigram can be had without any training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ...data.batches import Tokens
from ...models._base import Model
from ..evaluate import TextEvaluation
from ._base import Progress
from .stream import Stream

_CHUNK = 1 << 22


@dataclass(frozen=True)
class CountedEvaluation(TextEvaluation):
    """closed_form: nats per validation token of the bigram that was counted; closed_form_train: of the training text itself."""

    closed_form: float
    closed_form_train: float

    def details(self) -> list[str]:
        return [
            f"closed form (counts of the training text plus one): {self.closed_form:.4f} nats, {self.loss - self.closed_form:+.4f} "
            f"in training; on the training text {self.closed_form_train:.4f}"
        ]


class Counted(Stream):
    """Text, for a model of neighbouring tokens."""

    def evaluate(self, model: Model, precision: torch.dtype, progress: Progress | None = None) -> CountedEvaluation:
        found = super().evaluate(model, precision, progress)
        counted = counts(self.corpus.train, self.vocab_size)
        figures = [
            entropy(counts(tokens, self.vocab_size), counted) for tokens in (self.corpus.validation, self.corpus.train)
        ]
        return CountedEvaluation(**found.to_dict(), closed_form=figures[0], closed_form_train=figures[1])


def counts(tokens: Tokens, vocab_size: int) -> NDArray[np.int64]:
    """[V, V]: how often b follows a."""
    table = np.zeros(vocab_size * vocab_size, np.int64)
    for first in range(0, len(tokens) - 1, _CHUNK):
        part = tokens[first : first + _CHUNK + 1].astype(np.int64)
        table += np.bincount(part[:-1] * vocab_size + part[1:], minlength=len(table))
    return table.reshape(vocab_size, vocab_size)


def entropy(of: NDArray[np.int64], counted: NDArray[np.int64]) -> float:
    """Nats per token of a text with pair counts `of`, under p(b | a) = (counted[a, b] + 1) / (counted[a] + V) (Laplace)."""
    log_p = np.log(counted + 1.0) - np.log(counted.sum(1, keepdims=True) + len(counted))
    return float(-(of * log_p).sum() / max(1, of.sum()))


TASK = Counted
