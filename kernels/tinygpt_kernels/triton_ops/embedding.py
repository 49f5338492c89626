"""Token and position embedding in Triton.

# B batch, T tokens a row, N = B * T, V and P rows of the tables, C channels

Forward: one program per tile of tokens and channels gathers both rows and adds them.

Backward: the gradient of a table's row is the sum of dy over the places that used it. The places are sorted by row (stably, so
the order within a row is the order of the text), and one program per row and tile of channels adds its own places one after
the other. No atomics: the same call gives the same bits, and a row that nobody used is written as 0.

Left out: splitting a very frequent token over several programs. With 65 characters and 16384 tokens the longest sum is 2500
rows, 80 tiles of 32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import Impl, register
from .common import FUSION, INTERPRETING, Buffers, next_power_of_2, on_device


@triton.jit
def _embedding_fwd_kernel(
    tokens_ptr,  # [N]
    token_ptr,  # [V, C]
    position_ptr,  # [P, C] or unused
    positions_ptr,  # [N] or unused
    x_ptr,  # [N, C]
    scale,
    N,
    T,
    C,
    V,
    P,
    HAS_POSITION: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (place < N)[:, None] & (col < C)[None, :]
    row = tl.load(tokens_ptr + place, mask=place < N, other=0).to(tl.int64)
    known = (row >= 0) & (row < V)
    x = (
        tl.load(token_ptr + row[:, None] * C + col[None, :], mask=inside & known[:, None], other=0.0).to(tl.float32)
        * scale
    )
    if HAS_POSITION:
        if HAS_POSITIONS:
            at = tl.load(positions_ptr + place, mask=place < N, other=0).to(tl.int64)
            known = known & (at >= 0) & (at < P)
        else:
            at = (place % T).to(tl.int64)
        x += tl.load(position_ptr + at[:, None] * C + col[None, :], mask=inside & known[:, None], other=0.0).to(
            tl.float32
        )
    x = tl.where(known[:, None], x, float("nan"))  # an index that is no row: nobody may overlook that
    tl.store(x_ptr + place.to(tl.int64)[:, None] * C + col[None, :], x, mask=inside)


@triton.jit
def _segment_sum_kernel(
    dy_ptr,  # [N, C]
    order_ptr,  # [N] places, sorted by the row they used
    begin_ptr,  # [rows + 1] where each row's places begin in `order`
    out_ptr,  # [rows, C]
    scale,
    C,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    end = tl.load(begin_ptr + row + 1)
    total = tl.zeros([BLOCK_C], tl.float32)
    for start in range(tl.load(begin_ptr + row), end, ROWS):
        at = start + tl.arange(0, ROWS)
        place = tl.load(order_ptr + at, mask=at < end, other=0).to(tl.int64)
        inside = (at < end)[:, None] & (col < C)[None, :]
        total += tl.sum(tl.load(dy_ptr + place[:, None] * C + col[None, :], mask=inside, other=0.0).to(tl.float32), 0)
    tl.store(out_ptr + row.to(tl.int64) * C + col, total * scale, mask=col < C)


def _tile(C: int, N: int) -> tuple[int, int]:
    BLOCK_C = min(next_power_of_2(C), 4096 if INTERPRETING else 256)
    return max(1, min((65536 if INTERPRETING else 4096) // BLOCK_C, next_power_of_2(N))), BLOCK_C


def embedding_fwd(
    tokens: Tensor, token: Tensor, position: Tensor | None, positions: Tensor | None, scale: float, *,
    out: tuple[Tensor] | None = None,
) -> tuple[Tensor]:  # fmt: skip
    """Forward of ops.embedding; see there. `out`: (x [B, T, C],), contiguous."""
    C, N = token.shape[1], tokens.numel()
    x = torch.empty(*tokens.shape, C, dtype=token.dtype, device=token.device) if out is None else out[0]
    if N:
        ROWS, BLOCK_C = _tile(C, N)
        with on_device(token):
            _embedding_fwd_kernel[(triton.cdiv(N, ROWS), triton.cdiv(C, BLOCK_C))](
                tokens.contiguous(), token.contiguous(), None if position is None else position.contiguous(),
                None if positions is None else positions.contiguous(), x, float(scale), N, tokens.shape[1], C,
                token.shape[0], 0 if position is None else position.shape[0],
                HAS_POSITION=position is not None, HAS_POSITIONS=positions is not None,
                ROWS=ROWS, BLOCK_C=BLOCK_C, num_warps=4, **FUSION,
            )  # fmt: skip
    return (x,)


def _segment_sum(dy_NC: Tensor, used_N: Tensor, scale: float, out: Tensor) -> None:
    """out[r] = scale * sum of dy over the places n with used[n] == r, in the order of n."""
    rows, C = out.shape
    used, order = torch.sort(used_N, stable=True)
    begin = torch.searchsorted(used, torch.arange(rows + 1, device=used.device, dtype=used.dtype))
    BLOCK_C = min(next_power_of_2(C), 4096 if INTERPRETING else 128)
    with on_device(out):
        _segment_sum_kernel[(rows, triton.cdiv(C, BLOCK_C))](
            dy_NC, order, begin, out, float(scale), C, ROWS=32, BLOCK_C=BLOCK_C, num_warps=4, **FUSION
        )


def embedding_bwd(
    dy: Tensor, tokens: Tensor, token: Tensor, position: Tensor | None, positions: Tensor | None, scale: float, *,
    needs: tuple[bool, ...] = (False, True, True, False), out: Buffers | None = None,
) -> Buffers:  # fmt: skip
    """Backward of ops.embedding: (None, dtoken, dposition, None)."""
    if out is None:
        out = (
            None,
            torch.empty(token.shape, dtype=token.dtype, device=token.device) if needs[1] else None,
            torch.empty(position.shape, dtype=token.dtype, device=token.device)
            if position is not None and needs[2] else None,
        )  # fmt: skip
    dtoken, dposition = out[1:3]
    dy_NC = dy.reshape(-1, token.shape[1]).contiguous()
    if dtoken is not None:
        _segment_sum(dy_NC, tokens.reshape(-1), scale, dtoken)
    if dposition is not None:
        T = tokens.shape[1]
        used = torch.arange(T, device=dy.device).expand(tokens.shape) if positions is None else positions
        _segment_sum(dy_NC, used.reshape(-1), 1.0, dposition)
    return None, dtoken, dposition, None


register(
    Impl(
        "embedding", "triton", fwd=embedding_fwd, bwd=embedding_bwd, devices=("cuda", "cpu"),
        dtypes=(torch.float32, torch.float16, torch.bfloat16), min_sm=80,
    )
)  # fmt: skip
