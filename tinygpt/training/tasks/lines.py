"""The stream of tokens cut where lines end: rows of different lengths, padded at their end.

# N tokens, R rows, B batch, T tokens of a row
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from ...data.batches import IGNORED, Batch, Tokens, draws, moved
from ...generation import line_end
from ...models._base import Model
from ._base import Opening
from .stream import Stream

_CHUNK = 1 << 24


class Lines(Stream):
    """Every row predicts the tokens of a line, its end included, from the token before; a line that is longer than
    `block_size` makes several rows. So every token but the first of the text is a target exactly once, as in a stream.
    """

    def _read(self, opening: Opening) -> None:
        super()._read(opening)
        self.line_end = line_end(self.tokenizer)
        self._rows = {
            split: rows(tokens, self.line_end, self.config.model.block_size)
            for split, tokens in (("train", self.corpus.train), ("validation", self.corpus.validation))
        }
        starts = self._rows["train"]
        self.row_tokens = (len(self.corpus.train) - 1) / max(1, len(starts) - 1)

    def batch(self, step: int, micro: int = 0) -> Batch:
        starts, size = self._rows["train"], self.config.training.batch_size
        index = draws(size, len(starts) - 1, seed=self.config.seed, step=step, micro=micro)
        return self._batch(self.corpus.train, starts, index, size)

    def validation(self, batch_size: int, count: int | None = None) -> Iterator[Batch]:
        starts = self._rows["validation"]
        R = len(starts) - 1
        chosen = np.arange(R)
        if count is not None and count * batch_size < R:
            chosen = np.arange(count * batch_size) * R // (count * batch_size)
        for first in range(0, R if count is None else len(chosen), batch_size):
            yield self._batch(self.corpus.validation, starts, chosen[first : first + batch_size], batch_size)

    def estimate(self, model: Model, precision: torch.dtype) -> float | None:
        return None  # random windows are no lines

    def _batch(self, tokens: Tokens, starts: NDArray[np.int64], index: NDArray[np.int64], size: int) -> Batch:
        T = self.config.model.block_size
        place = starts[index][:, None] + np.arange(T)
        real = place < starts[index + 1][:, None]
        x, y = np.zeros((size, T), np.int64), np.full((size, T), IGNORED, np.int64)
        x[: len(index)][real] = tokens[place[real] - 1]
        y[: len(index)][real] = tokens[place[real]]
        return moved((x, y), self.device)


def rows(tokens: Tokens, end: int | None, block_size: int) -> NDArray[np.int64]:
    """[R + 1]: where rows begin, as places of their first targets, and where the last one ends.

    A row ends with a token `end` or after `block_size` tokens. The first row begins at 1: nothing precedes token 0.
    """
    N = len(tokens)
    if N < 2:
        return np.array([1], np.int64)
    ends = [np.array([1], np.int64)]
    if end is not None:
        for first in range(0, N, _CHUNK):
            ends.append(np.flatnonzero(tokens[first : first + _CHUNK] == end) + first + 1)
    lines = np.unique(np.append(np.concatenate(ends), N))
    pieces = -(-np.diff(lines) // block_size)
    # Piece p of a line begins p * block_size after it.
    piece = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return np.append(np.repeat(lines[:-1], pieces) + piece * block_size, N)


TASK = Lines
