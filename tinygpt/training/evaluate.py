"""Losses of a model on data: a fixed subset while training, everything at the end, and a random estimate to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..data.batches import IGNORED, Batch, Tokens, consecutive_batches, random_batches
from ..data.corpus import Corpus
from ..models._base import Model
from .machine import autocast

ESTIMATE_BATCHES = 200
_TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Evaluation:
    """What was measured. loss: nats per target; tokens: number of targets. Each task adds its own figures."""

    loss: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def figures(self) -> dict[str, float]:
        """What was measured, by name: all numbers but counts."""
        return {name: value for name, value in self.to_dict().items() if isinstance(value, float)}

    def summary(self) -> str:
        """What there is to say beside the loss, in one line."""
        return ""

    def details(self) -> list[str]:
        """Further lines, for those who ask."""
        return []


@dataclass(frozen=True)
class TextEvaluation(Evaluation):
    """perplexity: exp(loss). bits_per_char, bits_per_byte: of the text the tokens stand for."""

    perplexity: float
    bits_per_char: float
    bits_per_byte: float

    def summary(self) -> str:
        return f"perplexity {self.perplexity:.2f}, {self.bits_per_char:.3f} bits per character"


def random_estimate(
    model: Model, tokens: Tokens, batch_size: int, seed: int, device: torch.device, precision: torch.dtype
) -> float:
    """nanoGPT's estimate: mean loss over 200 batches of random windows, for comparison with published numbers."""
    batches = random_batches(tokens, ESTIMATE_BATCHES, batch_size, model.config.block_size, seed=seed, device=device)
    return mean_loss(model, batches, device, precision)[0]


def evaluate(
    model: Model,
    corpus: Corpus,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    *,
    batch_size: int | None = None,
    batches: Callable[[int], Iterable[Batch]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TextEvaluation:
    """Loss on the whole validation split, every token but the first a target once.

    Args:
        batch_size: windows at a time; None: as many as make 4096 tokens.
        batches: the split as batches of so many rows; None: windows side by side.
        progress: called with (tokens done, of how many) after every batch.
    """
    block = model.config.block_size
    size = batch_size or max(1, _TOKENS_PER_BATCH // block)
    data = batches(size) if batches else consecutive_batches(corpus.validation, size, block, device=device)
    if progress:
        data = _told(data, len(corpus.validation), progress)
    loss, count = mean_loss(model, data, device, precision)
    bits = loss / math.log(2)
    return TextEvaluation(loss, count, perplexity(loss), bits / corpus.chars_per_token, bits / corpus.bytes_per_token)


def perplexity(loss: float) -> float:
    """exp(loss), finite."""
    return math.exp(min(loss, 700.0))


def _told(batches: Iterable[Batch], total: int, progress: Callable[[int, int], None]) -> Iterator[Batch]:
    done = 0
    for batch in batches:
        yield batch
        done = min(done + batch[-1].numel(), total)
        progress(done, total)


@torch.no_grad()
def mean_loss(
    model: Model, batches: Iterable[Batch], device: torch.device, precision: torch.dtype
) -> tuple[float, int]:
    """(mean loss, number of targets); padding does not count. The model's mode is as it was afterwards."""
    was_training = model.training
    model.eval()
    total = torch.zeros((), device=device, dtype=torch.float64)
    count = torch.zeros((), device=device, dtype=torch.int64)
    one = torch.ones((), device=device)
    for batch in batches:
        with autocast(device, precision):
            total += model(*batch, one)
        count += (batch[-1] != IGNORED).sum()
    model.train(was_training)
    return (total / count).item(), int(count)
