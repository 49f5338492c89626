"""Attention backward in Triton: two kernels, one for dq and one for dk and dv, and their launch. attention.py explains them.

# B batch, T query tokens, S key tokens, H query heads, K key/value heads, D head dim
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .attention_fwd import LOG2E, keep, load_tile, prepared
from .common import on_device

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@triton.jit
def _dq_loop(
    dq, q, do, lse2, delta, k_in, v_in, b, kv_head, stride_ks, stride_vs, first, low, high, last, diagonal, scale_log2,
    seed, head, threshold, inverse_keep,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    place, col = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S)
    for start in tl.range(low, high, BLOCK_S):
        k = load_tile(k_in, b, kv_head, stride_ks, start, last, MASKED, TMA, D, BLOCK_D, BLOCK_S)
        v = load_tile(v_in, b, kv_head, stride_vs, start, last, MASKED, TMA, D, BLOCK_D, BLOCK_S)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.exp2(scores * scale_log2 - lse2[:, None])
        if MASKED:
            if CAUSAL:
                visible = (start - diagonal + col)[None, :] <= place[:, None]
            else:
                visible = (start + col < last)[None, :]
            p = tl.where(visible, p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            kept = keep(seed, head, first + place, start // 4 + tl.arange(0, BLOCK_S // 4), threshold)
            dp = tl.where(kept, dp * inverse_keep, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["H", "threshold"])
def _attention_bwd_dq_kernel(
    q_ptr,  # [B, T, H, D]
    k_in,  # [B, S, K, D]
    v_in,  # [B, S, K, D]
    out_ptr,  # [B, T, H, D] contiguous
    do_ptr,  # [B, T, H, D]
    lse_ptr,  # [B, H, T] float32
    dq_ptr,  # [B, T, H, D]
    delta_ptr,  # [B, H, padded] float32: sum over D of out * do; padded: T rounded up to whole tiles of this kernel
    lse2_ptr,  # [B, H, padded] float32: lse in powers of two, +inf where nothing was seen
    lengths_ptr,  # [B] or unused
    seed_ptr,  # [1] int64 or unused
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_dob, stride_dot, stride_doh, stride_dqb, stride_dqt, stride_dqh,
    T, S, H, scale, threshold, inverse_keep,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEED_DQ: tl.constexpr,
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
    if CAUSAL:
        tile = tl.num_programs(1) - 1 - tile
    first = tile * BLOCK_T
    last = S
    if HAS_LENGTHS:
        last = tl.minimum(tl.load(lengths_ptr + b).to(tl.int32), S)
    diagonal = first + last - T
    seed = tl.load(seed_ptr) if DROPOUT else 0

    row = first + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    inside = (row < T)[:, None] & (d < D)[None, :]
    do_ptr += b.to(tl.int64) * stride_dob + h.to(tl.int64) * stride_doh + first.to(tl.int64) * stride_dot
    do = tl.load(do_ptr + tl.arange(0, BLOCK_T)[:, None] * stride_dot + d[None, :], mask=inside, other=0.0)
    at = (b.to(tl.int64) * T + row.to(tl.int64)) * H + h
    out = tl.load(out_ptr + at[:, None] * D + d[None, :], mask=inside, other=0.0)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    lse = tl.load(lse_ptr + head.to(tl.int64) * T + row, mask=row < T, other=float("-inf"))
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    at = head.to(tl.int64) * (tl.num_programs(1) * BLOCK_T) + row
    tl.store(delta_ptr + at, delta)
    tl.store(lse2_ptr + at, lse2)
    if NEED_DQ:
        q_ptr += b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh + first.to(tl.int64) * stride_qt
        q = tl.load(q_ptr + tl.arange(0, BLOCK_T)[:, None] * stride_qt + d[None, :], mask=inside, other=0.0)
        kv_head = h // GROUP
        if not TMA:
            k_in += b.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
            v_in += b.to(tl.int64) * stride_vb + kv_head.to(tl.int64) * stride_vh
        full, end = last, last
        if CAUSAL:
            full = tl.minimum(tl.maximum(diagonal + 1, 0), last)
            end = tl.minimum(tl.maximum(diagonal + BLOCK_T, 0), last)
        full = full // BLOCK_S * BLOCK_S
        scale_log2 = scale * LOG2E
        dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        dq = _dq_loop(
            dq, q, do, lse2, delta, k_in, v_in, b, kv_head, stride_ks, stride_vs, first, 0, full, last, diagonal, scale_log2,
            seed, head, threshold, inverse_keep, CAUSAL, False, DROPOUT, TMA, PRECISION, D, BLOCK_D, BLOCK_T, BLOCK_S,
        )  # fmt: skip
        dq = _dq_loop(
            dq, q, do, lse2, delta, k_in, v_in, b, kv_head, stride_ks, stride_vs, first, full, end, last, diagonal, scale_log2,
            seed, head, threshold, inverse_keep, CAUSAL, True, DROPOUT, TMA, PRECISION, D, BLOCK_D, BLOCK_T, BLOCK_S,
        )  # fmt: skip
        dq_ptr += b.to(tl.int64) * stride_dqb + h.to(tl.int64) * stride_dqh + first.to(tl.int64) * stride_dqt
        dq = (dq * scale).to(dq_ptr.dtype.element_ty)
        tl.store(dq_ptr + tl.arange(0, BLOCK_T)[:, None] * stride_dqt + d[None, :], dq, mask=inside)


@triton.jit
def _dkdv_loop(
    dk, dv, k, v, q_in, do_in, delta_ptr, lse2_ptr, b, h, stride_qt, stride_dot, first, low, high, T, offset, scale_log2,
    seed, head, threshold, inverse_keep,
    DIAGONAL: tl.constexpr, DROPOUT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    place, col = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S)
    for start in tl.range(low, high, BLOCK_T):
        q = load_tile(q_in, b, h, stride_qt, start, T, True, TMA, D, BLOCK_D, BLOCK_T)
        do = load_tile(do_in, b, h, stride_dot, start, T, True, TMA, D, BLOCK_D, BLOCK_T)
        lse2 = tl.load(lse2_ptr + start + place)
        delta = tl.load(delta_ptr + start + place)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.exp2(scores * scale_log2 - lse2[None, :])
        if DIAGONAL:  # rows beyond T have lse2 = inf and so p = 0; keys beyond `last` are cleared at the end
            p = tl.where((first - offset - start + col)[:, None] <= place[None, :], p, 0.0)
        if DROPOUT:
            kept = tl.trans(keep(seed, head, start + place, first // 4 + tl.arange(0, BLOCK_S // 4), threshold))
            dv = tl.dot(tl.where(kept, p * inverse_keep, 0.0).to(do.dtype), do, dv, input_precision=PRECISION)
        else:
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        if DROPOUT:
            dp = tl.where(kept, dp * inverse_keep, 0.0)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["H", "threshold"])
def _attention_bwd_dkdv_kernel(
    q_in,  # [B, T, H, D]
    k_ptr,  # [B, S, K, D]
    v_ptr,  # [B, S, K, D]
    do_in,  # [B, T, H, D]
    dk_ptr,  # [B, S, K, D]
    dv_ptr,  # [B, S, K, D]
    delta_ptr,  # [B, H, padded] float32
    lse2_ptr,  # [B, H, padded] float32
    lengths_ptr,  # [B] or unused
    seed_ptr,  # [1] int64 or unused
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_dob, stride_dot, stride_doh, stride_dkb, stride_dks, stride_dkh, stride_dvb, stride_dvs, stride_dvh,
    padded, T, S, H, scale, threshold, inverse_keep,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    DROPOUT: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    kv = tl.program_id(0)
    heads = H // GROUP
    b, kv_head = kv // heads, kv % heads
    first = tl.program_id(1) * BLOCK_S
    last = S
    if HAS_LENGTHS:
        last = tl.minimum(tl.load(lengths_ptr + b).to(tl.int32), S)
    offset = last - T
    seed = tl.load(seed_ptr) if DROPOUT else 0

    col = first + tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    inside = (col < last)[:, None] & (d < D)[None, :]
    k_ptr += b.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh + first.to(tl.int64) * stride_ks
    v_ptr += b.to(tl.int64) * stride_vb + kv_head.to(tl.int64) * stride_vh + first.to(tl.int64) * stride_vs
    k = tl.load(k_ptr + tl.arange(0, BLOCK_S)[:, None] * stride_ks + d[None, :], mask=inside, other=0.0)
    v = tl.load(v_ptr + tl.arange(0, BLOCK_S)[:, None] * stride_vs + d[None, :], mask=inside, other=0.0)

    begin, full = 0, 0
    if CAUSAL:  # the first query that sees any of these keys, and the first that sees all of them
        begin = tl.minimum(tl.maximum(first - offset, 0), T) // BLOCK_T * BLOCK_T
        full = tl.maximum(first + BLOCK_S - 1 - offset, 0)
        full = tl.minimum((full + BLOCK_T - 1) // BLOCK_T * BLOCK_T, T)
    if first >= last:
        begin, full = T, T
    scale_log2 = scale * LOG2E
    dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for h in range(kv_head * GROUP, (kv_head + 1) * GROUP):
        head = b * H + h
        q_at, do_at = q_in, do_in
        if not TMA:
            q_at += b.to(tl.int64) * stride_qb + tl.cast(h, tl.int64) * stride_qh
            do_at += b.to(tl.int64) * stride_dob + tl.cast(h, tl.int64) * stride_doh
        at = head.to(tl.int64) * padded
        if CAUSAL:
            dk, dv = _dkdv_loop(
                dk, dv, k, v, q_at, do_at, delta_ptr + at, lse2_ptr + at, b, h, stride_qt, stride_dot, first, begin, full, T,
                offset, scale_log2, seed, head, threshold, inverse_keep,
                True, DROPOUT, TMA, PRECISION, D, BLOCK_D, BLOCK_T, BLOCK_S,
            )  # fmt: skip
        dk, dv = _dkdv_loop(
            dk, dv, k, v, q_at, do_at, delta_ptr + at, lse2_ptr + at, b, h, stride_qt, stride_dot, first, full, T, T,
            offset, scale_log2, seed, head, threshold, inverse_keep,
            False, DROPOUT, TMA, PRECISION, D, BLOCK_D, BLOCK_T, BLOCK_S,
        )  # fmt: skip
    written = (col < S)[:, None] & (d < D)[None, :]
    dk_ptr += b.to(tl.int64) * stride_dkb + kv_head.to(tl.int64) * stride_dkh + first.to(tl.int64) * stride_dks
    dv_ptr += b.to(tl.int64) * stride_dvb + kv_head.to(tl.int64) * stride_dvh + first.to(tl.int64) * stride_dvs
    dk = tl.where((col < last)[:, None], dk * scale, 0.0).to(dk_ptr.dtype.element_ty)
    dv = tl.where((col < last)[:, None], dv, 0.0).to(dv_ptr.dtype.element_ty)
    tl.store(dk_ptr + tl.arange(0, BLOCK_S)[:, None] * stride_dks + d[None, :], dk, mask=written)
    tl.store(dv_ptr + tl.arange(0, BLOCK_S)[:, None] * stride_dvs + d[None, :], dv, mask=written)


def attention_bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None, seed: Tensor | None, out: Tensor, lse: Tensor,
    causal: bool, scale: float | None, dropout_p: float, grads: Gradients,
) -> None:  # fmt: skip
    """Backward of ops.attention into `grads`: dq, dk, dv of any strides with D contiguous, None for what nobody wants."""
    do, q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (do, q, k, v))
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    dq, dk, dv = grads
    if not q.numel() or not k.numel():
        for gradient in grads:
            if gradient is not None:
                gradient.zero_()
        return
    lengths, scale, sizes, dropout, constants = prepared(q, k, kv_lengths, causal, scale, dropout_p)
    plain = not dropout_p and lengths is None and tiles.describable(q, k, v, do)
    by_query = tiles.choose("attention_bwd_dq", q, T, plain=plain)
    by_key = tiles.choose("attention_bwd_dkdv", q, T, plain=plain)
    assert by_query.BLOCK_T % by_key.BLOCK_T == 0, (by_query, by_key)  # dkdv reads what dq has written, in whole tiles
    padded = -(-T // by_query.BLOCK_T) * by_query.BLOCK_T
    delta, lse2 = torch.empty(2, B, H, padded, dtype=torch.float32, device=q.device).unbind()
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    with on_device(q):
        k_in, v_in = (tiles.described(x, by_query.BLOCK_S) for x in (k, v)) if by_query.tma else (k, v)
        _attention_bwd_dq_kernel[(B * H, padded // by_query.BLOCK_T)](
            q, k_in, v_in, out, do, lse, dq, delta, lse2, lengths, seed, *strides, *(q if dq is None else dq).stride()[:3], *sizes,
            scale, *dropout, NEED_DQ=dq is not None, **constants, **by_query.options(D),
        )  # fmt: skip
        if dk is None and dv is None:
            return
        dk, dv = (torch.empty_like(x) if gradient is None else gradient for gradient, x in ((dk, k), (dv, v)))
        q_in, do_in = (tiles.described(x, by_key.BLOCK_T) for x in (q, do)) if by_key.tma else (q, do)
        _attention_bwd_dkdv_kernel[(B * K, -(-S // by_key.BLOCK_S))](
            q_in, k, v, do_in, dk, dv, delta, lse2, lengths, seed, *strides, *dk.stride()[:3], *dv.stride()[:3], padded, *sizes,
            scale, *dropout, **constants, **by_key.options(D),
        )  # fmt: skip
