"""Philox4x32-10 in PyTorch: the random numbers behind every dropout mask.

Counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), so that a kernel regenerates a mask from
its coordinates and stores nothing, and every backend draws the same one.
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[torch.Tensor, ...], key: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Four random words per counter.

    Args:
        counter: four int64 tensors of one shape, each holding 32 bits.
        key: int64 tensor of one element; its 64 bits are the key.

    Returns:
        four int64 tensors of that shape, each uniform over 0 .. 2**32 - 1.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key.reshape(()) & _MASK, (key.reshape(()) >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    # a * b needs 64 unsigned bits and int64 has 63: split b, so that no product overflows.
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle << 16) | (low & 0xFFFF)) & _MASK


def keep_mask(seed: torch.Tensor, p: float, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """Which attention weights dropout keeps.

    Args:
        seed: int64 tensor of one element.
        p: probability of dropping; a weight is dropped where its word is below round(p * 2**32).
        shape: (B, H, T, S). Counter of element (b, h, t, s): (b * H + h, t, s // 4, 0), word s % 4.

    Returns:
        bool tensor of that shape.
    """
    B, H, T, S = shape
    groups = (S + 3) // 4
    device = seed.device
    heads = torch.arange(B * H, device=device).view(B * H, 1, 1).expand(B * H, T, groups)
    rows = torch.arange(T, device=device).view(1, T, 1).expand_as(heads)
    columns = torch.arange(groups, device=device).view(1, 1, groups).expand_as(heads)
    words = torch.stack(philox((heads, rows, columns, torch.zeros_like(heads)), seed), dim=-1)
    return (words.view(B, H, T, groups * 4)[..., :S]) >= round(p * 2**32)
