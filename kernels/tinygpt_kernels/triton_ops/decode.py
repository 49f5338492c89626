"""Attention of one new token per row against its own length of cache, in Triton.

# B batch, S room in the cache, H query heads, K key/value heads, G = H / K, D head dim

One query against a long cache is a walk through memory, and B * K programs do not fill a GPU. So the cache is split: a program
takes a piece of the keys of one key/value head, for the G query heads that share it (padded to 16, what a tensor core multiplies),
and writes its unscaled sum, its largest score and its total; a second kernel combines the pieces (Dao et al. 2023,
"Flash-Decoding"). Pieces beyond a row's length do nothing but say so.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import Impl, register
from . import tiles
from .attention_fwd import LOG2E, load_tile
from .common import FUSION, INTERPRETING, next_power_of_2, on_device, processors

_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["S"])
def _decode_split_kernel(
    q_ptr,  # [B, H, D] contiguous
    k_ptr,  # [B, S, K, D]
    v_ptr,  # [B, S, K, D]
    lengths_ptr,  # [B]
    sum_ptr,  # [B, H, splits, D] float32
    top_ptr,  # [B, H, splits] float32, in powers of two
    total_ptr,  # [B, H, splits] float32
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    S, span, scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    b, kv_head = tl.program_id(0) // (H // GROUP), tl.program_id(0) % (H // GROUP)
    split, splits = tl.program_id(1), tl.num_programs(1)
    length = tl.minimum(tl.load(lengths_ptr + b).to(tl.int32), S)
    member, d, col = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    head = b * H + kv_head * GROUP + member
    inside = (member < GROUP)[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + head[:, None] * D + d[None, :], mask=inside, other=0.0)
    k_ptr += b.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
    v_ptr += b.to(tl.int64) * stride_vb + kv_head.to(tl.int64) * stride_vh
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    for start in tl.range(split * span, tl.minimum((split + 1) * span, length), BLOCK_S):
        k = load_tile(k_ptr, b, kv_head, stride_ks, start, length, True, False, D, BLOCK_D, BLOCK_S)
        v = load_tile(v_ptr, b, kv_head, stride_vs, start, length, True, False, D, BLOCK_D, BLOCK_S)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        scores = tl.where((start + col < length)[None, :], scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))  # finite: a tile that is entered holds a key
        p = tl.exp2(scores - new[:, None])
        rescale = tl.exp2(top - new)
        total = total * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        top = new
    at = head.to(tl.int64) * splits + split
    tl.store(sum_ptr + at[:, None] * D + d[None, :], acc, mask=inside)
    tl.store(top_ptr + at, top, mask=member < GROUP)
    tl.store(total_ptr + at, total, mask=member < GROUP)


@triton.jit
def _decode_combine_kernel(
    sum_ptr,  # [B * H, splits, D] float32
    top_ptr,  # [B * H, splits] float32
    total_ptr,  # [B * H, splits] float32
    out_ptr,  # [B * H, D]
    splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    split, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    top = tl.load(top_ptr + head * splits + split, mask=split < splits, other=float("-inf"))
    total = tl.load(total_ptr + head * splits + split, mask=split < splits, other=0.0)
    highest = tl.max(top, 0)
    weight = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
    inside = (split < splits)[:, None] & (d < D)[None, :]
    sums = tl.load(sum_ptr + (head * splits + split)[:, None] * D + d[None, :], mask=inside, other=0.0)
    whole = tl.sum(total * weight, 0)
    out = tl.sum(sums * weight[:, None], 0) / tl.where(whole > 0.0, whole, 1.0)
    tl.store(out_ptr + head * D + d, out, mask=d < D)


def splits(device: torch.device, pairs: int, S: int, BLOCK_S: int) -> int:
    """Into how many pieces the cache is cut: enough for two programs per processor, at most 64, none below one tile."""
    wanted = -(-2 * processors(device) // pairs)
    return max(1, min(64, wanted, -(-S // BLOCK_S)))


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float | None,
    *,
    out: tuple[Tensor] | None = None,
) -> tuple[Tensor]:
    """ops.decode_attention; see there. `out`: (y [B, H, D],), contiguous."""
    q = q.contiguous()
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k_cache, v_cache))
    B, H, D = q.shape
    S, K = k.shape[1:3]
    y = torch.empty_like(q) if out is None else out[0]
    if not y.numel():
        return (y,)
    BLOCK_S = 256 if INTERPRETING else 64
    n = splits(q.device, B * K, S, BLOCK_S)
    span = triton.cdiv(triton.cdiv(S, n), BLOCK_S) * BLOCK_S
    sums = torch.empty(B, H, n, D, dtype=torch.float32, device=q.device)
    top, total = torch.empty(2, B, H, n, dtype=torch.float32, device=q.device)
    BLOCK_D = tiles.block_d(D)
    with on_device(q):
        _decode_split_kernel[(B * K, n)](
            q, k, v, lengths.to(q.device).contiguous(), sums, top, total, *k.stride()[:3], *v.stride()[:3],
            S, span, D**-0.5 if scale is None else scale, H=H, GROUP=H // K, PRECISION=tiles.precision(q.dtype),
            D=D, BLOCK_D=BLOCK_D, BLOCK_G=max(16, next_power_of_2(H // K)), BLOCK_S=BLOCK_S, num_warps=4, num_stages=3, **FUSION,
        )  # fmt: skip
        _decode_combine_kernel[(B * H,)](
            sums, top, total, y, n, D=D, BLOCK_D=BLOCK_D, SPLITS=next_power_of_2(n), num_warps=4, **FUSION
        )
    return (y,)


register(
    Impl(
        "decode_attention", "triton", fwd=decode_attention, devices=("cuda", "cpu"),
        dtypes=(torch.float32, torch.float16, torch.bfloat16), dims={"D": (1, 256)}, min_sm=80,
    )
)  # fmt: skip
