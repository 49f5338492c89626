"""Attention forward in Triton: the kernel and its launch. attention.py explains it.

# B batch, T query tokens, S key tokens, H query heads, K key/value heads, D head dim
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .common import on_device

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def keep(seed, head, row, group, threshold):
    """Which weights of a tile dropout keeps: [BLOCK_T, BLOCK_S], four keys a draw.

    row [BLOCK_T], group [BLOCK_S / 4] (a key's index over 4), threshold: a word below it drops.
    """
    ones = tl.zeros([row.shape[0], group.shape[0]], tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed, ones + head.to(tl.uint32), ones + row[:, None].to(tl.uint32), ones + group[None, :].to(tl.uint32), ones
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(words, [row.shape[0], 4 * group.shape[0]]) >= threshold.to(tl.uint32)


@triton.jit
def load_tile(
    source, b, h, stride, start, last, MASKED: tl.constexpr, TMA: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows start .. start + BLOCK of one head, [BLOCK, BLOCK_D]; 0 beyond `last` (MASKED) and beyond D.

    source: TMA: a descriptor of [B, rows, heads, D]; else a pointer to the head's first row, rows `stride` apart.
    """
    if TMA:
        tile = tl.reshape(source.load([b, start, h, 0]), [BLOCK, BLOCK_D])
    else:
        row = tl.arange(0, BLOCK)
        d = tl.arange(0, BLOCK_D)
        at = source + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + d[None, :])
        if MASKED:
            tile = tl.load(at, mask=(start + row < last)[:, None] & (d < D)[None, :], other=0.0)
        elif BLOCK_D > D:
            tile = tl.load(at, mask=(d < D)[None, :], other=0.0)
        else:
            tile = tl.load(at)
    return tile


@triton.jit
def _attend(
    acc,
    total,
    top,
    q,
    k_in,
    v_in,
    b,
    kv_head,
    stride_ks,
    stride_vs,
    first,
    low,
    high,
    last,
    diagonal,
    scale_log2,
    seed,
    head,
    threshold,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    place, col = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S)
    for start in tl.range(low, high, BLOCK_S):
        k = load_tile(k_in, b, kv_head, stride_ks, start, last, MASKED, TMA, D, BLOCK_D, BLOCK_S)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            if CAUSAL:
                visible = (start - diagonal + col)[None, :] <= place[:, None]
            else:
                visible = (start + col < last)[None, :]
            scores = tl.where(visible, scores, float("-inf"))
            new = tl.maximum(top, tl.max(scores, 1))
            shift = tl.where(new == float("-inf"), 0.0, new)
        else:
            new = tl.maximum(top, tl.max(scores, 1))
            shift = new
        p = tl.exp2(scores * scale_log2 - (shift * scale_log2)[:, None])
        rescale = tl.exp2((top - shift) * scale_log2)
        total = total * rescale + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(keep(seed, head, first + place, start // 4 + tl.arange(0, BLOCK_S // 4), threshold), p, 0.0)
        v = load_tile(v_in, b, kv_head, stride_vs, start, last, MASKED, TMA, D, BLOCK_D, BLOCK_S)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        top = new
    return acc, total, top


@triton.jit(do_not_specialize=["H", "threshold"])
def _attention_fwd_kernel(
    q_ptr,  # [B, T, H, D], D contiguous, as k and v
    k_in,  # [B, S, K, D]: a pointer, with TMA a descriptor
    v_in,  # [B, S, K, D]
    out_ptr,  # [B, T, H, D] contiguous
    lse_ptr,  # [B, H, T] float32
    lengths_ptr,  # [B] or unused
    seed_ptr,  # [1] int64 or unused
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    T, S, H, scale, threshold, inverse_keep,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEGATIVE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    b, h = head // H, head % H
    tile = tl.program_id(1)
    if CAUSAL:  # the longest rows first: they would otherwise be what the last processors wait for
        tile = tl.num_programs(1) - 1 - tile
    first = tile * BLOCK_T
    last = S
    if HAS_LENGTHS:
        last = tl.minimum(tl.load(lengths_ptr + b).to(tl.int32), S)
    diagonal = first + last - T  # the last key that the tile's first row sees, if causal
    seed = tl.load(seed_ptr) if DROPOUT else 0

    row = first + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    inside = (row < T)[:, None] & (d < D)[None, :]
    q_ptr += b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh + first.to(tl.int64) * stride_qt
    q = tl.load(q_ptr + tl.arange(0, BLOCK_T)[:, None] * stride_qt + d[None, :], mask=inside, other=0.0)
    if NEGATIVE:
        q = -q
    kv_head = h // GROUP
    if not TMA:
        k_in += b.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
        v_in += b.to(tl.int64) * stride_vb + kv_head.to(tl.int64) * stride_vh

    full, end = last, last
    if CAUSAL:  # keys that every row of the tile sees, and that any row sees
        full = tl.minimum(tl.maximum(diagonal + 1, 0), last)
        end = tl.minimum(tl.maximum(diagonal + BLOCK_T, 0), last)
    full = full // BLOCK_S * BLOCK_S

    scale_log2 = scale * LOG2E
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    top = tl.full([BLOCK_T], float("-inf"), tl.float32)
    acc, total, top = _attend(
        acc, total, top, q, k_in, v_in, b, kv_head, stride_ks, stride_vs, first, 0, full, last, diagonal, scale_log2,
        seed, head, threshold, CAUSAL, False, DROPOUT, TMA, PRECISION, D, BLOCK_D, BLOCK_T, BLOCK_S,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q, k_in, v_in, b, kv_head, stride_ks, stride_vs, first, full, end, last, diagonal, scale_log2,
        seed, head, threshold, CAUSAL, True, DROPOUT, TMA, PRECISION, D, BLOCK_D, BLOCK_T, BLOCK_S,
    )  # fmt: skip
    sighted = total > 0.0
    inverse = tl.where(sighted, 1.0 / tl.where(sighted, total, 1.0), 0.0)
    if DROPOUT:
        inverse *= inverse_keep
    out = acc * inverse[:, None]
    lse = tl.where(sighted, top * scale + tl.log(tl.where(sighted, total, 1.0)), float("-inf"))
    at = (b.to(tl.int64) * T + row.to(tl.int64)) * H + h
    tl.store(out_ptr + at[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + head.to(tl.int64) * T + row, lse, mask=row < T)


def prepared(
    q: Tensor, k: Tensor, kv_lengths: Tensor | None, causal: bool, scale: float | None, dropout_p: float
) -> tuple[Tensor | None, float, tuple[int, int, int], tuple[int, float], dict[str, object]]:
    """What the three kernels share: lengths, scale, (T, S, H), (threshold, inverse_keep), constants."""
    _, T, H, D = q.shape
    S, K = k.shape[1:3]
    lengths = None if kv_lengths is None else kv_lengths.to(q.device).contiguous()
    constants: dict[str, object] = {
        "GROUP": H // K, "CAUSAL": causal, "HAS_LENGTHS": lengths is not None, "DROPOUT": dropout_p > 0, "D": D,
        "PRECISION": tiles.precision(q.dtype),
    }  # fmt: skip
    dropout = (round(dropout_p * 2**32), 1 / (1 - dropout_p))
    return lengths, D**-0.5 if scale is None else scale, (T, S, H), dropout, constants


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None, seed: Tensor | None,
    causal: bool, scale: float | None, dropout_p: float, *, out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Forward of ops.attention; see there. `out`: (out, lse), contiguous. Returns (out [B, T, H, D], lse [B, H, T])."""
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    B, T, H, D = q.shape
    if out is None:
        out = (
            torch.empty(B, T, H, D, dtype=q.dtype, device=q.device),
            torch.empty(B, H, T, dtype=torch.float32, device=q.device),
        )
    if not out[0].numel():
        return out
    lengths, scale, sizes, dropout, constants = prepared(q, k, kv_lengths, causal, scale, dropout_p)
    plain = not dropout_p and lengths is None and tiles.describable(k, v)
    tile = tiles.choose("attention_fwd", q, T, plain=plain)
    k_in, v_in = (tiles.described(x, tile.BLOCK_S) for x in (k, v)) if tile.tma else (k, v)
    with on_device(q):
        _attention_fwd_kernel[(B * H, -(-T // tile.BLOCK_T))](
            q, k_in, v_in, *out, lengths, seed, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *sizes,
            # The kernel takes the largest score before it scales: a negative scale turns q's sign, and 0 is very small.
            abs(scale) or 1e-30, *dropout, NEGATIVE=scale < 0, **constants, **tile.options(D),
        )  # fmt: skip
    return out
