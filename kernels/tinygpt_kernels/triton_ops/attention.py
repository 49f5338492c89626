"""Attention in Triton, forward and backward, on separate or packed queries, keys and values (Dao 2023, "FlashAttention-2").

# B batch, T query tokens, S key tokens, H query heads, K key/value heads, E = H + 2K, D head dim

The kernels are in attention_fwd.py and attention_bwd.py, the tiles they work on in tiles.py, and kernels/README.md follows one
tile from the equations to the machine code. Here: what the ops promise, in terms of those kernels.

`attention_qkv` is the same kernels on three views of the packed projection, and its gradient three views of one buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Impl, register
from . import attention_bwd as backward
from .attention_fwd import attention_fwd

MAX_D = 256  # a tile of 32 rows still fits the shared memory of every GPU since sm_80
Buffers = tuple[Tensor | None, ...]


def attention_bwd(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None, seed: Tensor | None, y: Tensor, lse: Tensor,
    causal: bool, scale: float | None, dropout_p: float, *,
    needs: tuple[bool, ...] = (True, True, True, False, False), out: Buffers | None = None,
) -> Buffers:  # fmt: skip
    """Backward of ops.attention: (dq, dk, dv, None, None). `out`: buffers for them, last dimension contiguous."""
    if out is None:
        out = tuple(
            torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
            for x, need in zip((q, k, v), needs[:3], strict=True)
        )
    dq, dk, dv = out[:3]
    backward.attention_bwd(dy, q, k, v, kv_lengths, seed, y, lse, causal, scale, dropout_p, (dq, dk, dv))
    return dq, dk, dv, None, None


def attention_qkv_fwd(
    qkv: Tensor, kv_lengths: Tensor | None, seed: Tensor | None, heads: int, kv_heads: int,
    causal: bool, scale: float | None, dropout_p: float, *, out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Forward of ops.attention_qkv; see there. `out`: (y [B, T, H, D], lse [B, H, T]), contiguous."""
    q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=2)
    return attention_fwd(q, k, v, kv_lengths, seed, causal, scale, dropout_p, out=out)


def attention_qkv_bwd(
    dy: Tensor, qkv: Tensor, kv_lengths: Tensor | None, seed: Tensor | None, y: Tensor, lse: Tensor, heads: int, kv_heads: int,
    causal: bool, scale: float | None, dropout_p: float, *,
    needs: tuple[bool, ...] = (True, False, False), out: Buffers | None = None,
) -> Buffers:  # fmt: skip
    """Backward of ops.attention_qkv: (dqkv, None, None), packed as qkv is. `out`: a buffer for dqkv."""
    parts = [heads, kv_heads, kv_heads]
    q, k, v = torch.split(qkv, parts, dim=2)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device) if out is None or out[0] is None else out[0]
    dq, dk, dv = torch.split(dqkv, parts, dim=2)
    backward.attention_bwd(dy, q, k, v, kv_lengths, seed, y, lse, causal, scale, dropout_p, (dq, dk, dv))
    return dqkv, None, None


for _name, _fwd, _bwd in (
    ("attention", attention_fwd, attention_bwd),
    ("attention_qkv", attention_qkv_fwd, attention_qkv_bwd),
):
    register(
        Impl(
            _name, "triton", fwd=_fwd, bwd=_bwd, devices=("cuda", "cpu"),
            dtypes=(torch.float32, torch.float16, torch.bfloat16), dims={"D": (1, MAX_D)}, min_sm=80,
        )
    )  # fmt: skip
