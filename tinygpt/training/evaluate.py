"""Losses of a model on a text: a fixed subset while training, everything at the end, and a random estimate to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

import torch

from ..data.batches import IGNORED, Batch, Tokens, consecutive_batches, random_batches
from ..data.corpus import Corpus
from ..models.gpt import GPT
from .machine import autocast

ESTIMATE_BATCHES = 200
_TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per token. perplexity: exp(loss). bits_per_char, bits_per_byte: of the text the tokens stand for."""

    loss: float
    perplexity: float
    bits_per_char: float
    bits_per_byte: float
    tokens: int

    def to_dict(self) -> dict[str, float]:
        """Plain values."""
        return asdict(self)


def subset_loss(
    model: GPT, tokens: Tokens, batches: int, batch_size: int, device: torch.device, precision: torch.dtype
) -> float:
    """Mean loss over `batches` batches of windows spread evenly over the tokens: always the same ones."""
    block = model.config.block_size
    return _mean(
        model, consecutive_batches(tokens, batch_size, block, count=batches, device=device), device, precision
    )[0]


def random_estimate(
    model: GPT, tokens: Tokens, batch_size: int, seed: int, device: torch.device, precision: torch.dtype
) -> float:
    """nanoGPT's estimate: mean loss over 200 batches of random windows, for comparison with published numbers."""
    batches = random_batches(tokens, ESTIMATE_BATCHES, batch_size, model.config.block_size, seed=seed, device=device)
    return _mean(model, batches, device, precision)[0]


def evaluate(
    model: GPT,
    corpus: Corpus,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    *,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Loss on the whole validation split, every token but the first a target once.

    Args:
        batch_size: windows at a time; None: as many as make 4096 tokens.
        progress: called with (tokens done, of how many) after every batch.
    """
    block = model.config.block_size
    batches: Iterable[Batch] = consecutive_batches(
        corpus.validation, batch_size or max(1, _TOKENS_PER_BATCH // block), block, device=device
    )
    if progress:
        batches = _told(batches, len(corpus.validation), progress)
    loss, count = _mean(model, batches, device, precision)
    bits = loss / math.log(2)
    return Evaluation(
        loss, math.exp(min(loss, 700.0)), bits / corpus.chars_per_token, bits / corpus.bytes_per_token, count
    )


def _told(batches: Iterable[Batch], total: int, progress: Callable[[int, int], None]) -> Iterator[Batch]:
    done = 0
    for x, y in batches:
        yield x, y
        done = min(done + x.numel(), total)
        progress(done, total)


@torch.no_grad()
def _mean(model: GPT, batches: Iterable[Batch], device: torch.device, precision: torch.dtype) -> tuple[float, int]:
    """(mean loss, number of targets); padding does not count. The model's mode is as it was afterwards."""
    was_training = model.training
    model.eval()
    total = torch.zeros((), device=device, dtype=torch.float64)
    count = torch.zeros((), device=device, dtype=torch.int64)
    one = torch.ones((), device=device)
    for x, y in batches:
        with autocast(device, precision):
            total += model(x, y, one)
        count += (y != IGNORED).sum()
    model.train(was_training)
    return (total / count).item(), int(count)
