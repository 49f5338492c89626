"""Batches that depend on (seed, stream, step, microbatch) alone: nothing to save, and nothing evaluation could disturb.

# B batch, T tokens
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Tokens = NDArray[np.integer[Any]]
Batch = tuple[Tensor, ...]
"""What a model is called with: its inputs, and last its targets, of which IGNORED do not count."""
Stream = Literal["train", "evaluation", "estimate"]

IGNORED = -100
"""Target of padding; it takes part in no loss."""

_STREAMS: dict[Stream, int] = {"train": 0, "evaluation": 1, "estimate": 2}
_UINT64 = (1 << 64) - 1


def random_batch(
    tokens: Tokens,
    batch_size: int,
    block_size: int,
    *,
    seed: int,
    step: int,
    micro: int = 0,
    stream: Stream = "train",
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
    """Windows at random places, with replacement.

    The places are draws of the counter-based generator Philox4x64-10 (Salmon et al. 2011) with key (seed, stream) and
    counter (step, micro): any step's batch can be had without those before it, in any process and on any machine.

    Args:
        tokens: [N], N above block_size.
        step, micro: optimizer step, and microbatch within it, from 0.
        stream: training, evaluation on the way, or nanoGPT's estimate of a loss; they never share draws.

    Returns:
        (x, y): int64 [B, T] on `device`, contiguous; y is x one token later.
    """
    starts = draws(batch_size, len(tokens) - block_size, seed=seed, step=step, micro=micro, stream=stream)
    windows = tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)
    x, y = moved((windows[:, :-1], windows[:, 1:]), torch.device(device))
    return x, y


def draws(
    count: int, below: int, *, seed: int, step: int, micro: int = 0, stream: Stream = "train"
) -> NDArray[np.int64]:
    """`count` whole numbers from 0 to below `below`, as `random_batch` draws places."""
    philox = np.random.Philox(
        key=np.array([seed & _UINT64, _STREAMS[stream]], np.uint64), counter=np.array([0, 0, micro, step], np.uint64)
    )
    # Raw draws are the same in every version of numpy; the bias of the remainder is below N / 2^64.
    drawn: NDArray[np.int64] = (philox.random_raw(count) % np.uint64(below)).astype(np.int64)
    return drawn


def random_batches(
    tokens: Tokens, count: int, batch_size: int, block_size: int, *, seed: int, device: str | torch.device = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` random batches for nanoGPT's estimate of a loss: the mean of their means. Always the same for a seed."""
    for step in range(count):
        yield random_batch(tokens, batch_size, block_size, seed=seed, step=step, stream="estimate", device=device)


def consecutive_batches(
    tokens: Tokens, batch_size: int, block_size: int, *, count: int | None = None, device: str | torch.device = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows side by side, so that every token but the first is a target exactly once.

    Every batch is [B, T], so that compiled code sees one shape: what the last window or batch lacks is padding, with
    inputs 0 and targets -100. Weigh each batch's mean loss by its number of other targets.

    Args:
        tokens: [N]; fewer than two give no batch.
        count: only this many batches, of windows spread evenly over the tokens; None: all of them.

    Yields:
        (x, y): int64 [B, T] on `device`, contiguous.
    """
    place = np.arange(block_size + 1)
    windows = -(-(len(tokens) - 1) // block_size) if len(tokens) > 1 else 0
    chosen = np.arange(windows)
    if count is not None and count * batch_size < windows:
        chosen = np.arange(count * batch_size) * windows // (count * batch_size)
    for first in range(0, len(chosen), batch_size):
        rows = chosen[first : first + batch_size]
        index = rows[:, None] * block_size + place
        within = index < len(tokens)
        taken = tokens[np.minimum(index, len(tokens) - 1)].astype(np.int64)
        x = np.zeros((batch_size, block_size), np.int64)
        y = np.full((batch_size, block_size), IGNORED, np.int64)
        x[: len(rows)] = np.where(within[:, 1:], taken[:, :-1], 0)
        y[: len(rows)] = np.where(within[:, 1:], taken[:, 1:], IGNORED)
        x_BT, y_BT = moved((x, y), torch.device(device))
        yield x_BT, y_BT


def moved(arrays: Iterable[NDArray[np.int64]], device: torch.device) -> Batch:
    """Arrays as contiguous tensors on `device`."""
    tensors = tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
    if device.type == "cuda":
        # From pinned memory the copy runs beside the kernels already queued.
        tensors = tuple(tensor.pin_memory() for tensor in tensors)
    return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)
