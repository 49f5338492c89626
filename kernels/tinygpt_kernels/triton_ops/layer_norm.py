"""Layer norm in Triton, forward and backward (Ba, Kiros, Hinton 2016).

# R rows, C channels; a tile is [ROWS, BLOCK_C], ROWS rows of the whole width

Forward. A tile is loaded once and stays in registers: mean, then the variance around that mean (E[x^2] - E[x]^2 would lose
every digit at a large mean), then the result. One program per tile; mean and rstd are saved in float32.

Backward. With xhat = (x - mean) rstd and g = dy * weight:

    dx = rstd (g - mean(g) - xhat mean(g xhat)),   dweight = sum over rows dy * xhat,   dbias = sum over rows dy

P programs walk over the tiles, each keeping its part of dweight and dbias in registers, and write one row each of a [P, C]
workspace; a second kernel adds the P rows in a fixed order. No atomics: the same call gives the same bits.

Left out: splitting a row over several programs (a row of 65536 still fits one) and recomputing mean and rstd instead of
saving them (eight bytes a row against a second reduction).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import Impl, register
from .common import INTERPRETING, Buffers, next_power_of_2, on_device, processors, rows, sum_parts

MAX_C = 65536  # a tile of one row at 32 warps: 64 elements a thread


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,  # [R, C], rows stride_xr apart
    weight_ptr,  # [C]
    bias_ptr,  # [C] or unused
    y_ptr,  # [R, C] contiguous
    mean_ptr,  # [R]
    rstd_ptr,  # [R]
    stride_xr,
    R,
    C,
    eps,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_C)
    in_row, in_col = row < R, col < C
    inside = in_row[:, None] & in_col[None, :]
    at = row.to(tl.int64)[:, None]
    x = tl.load(x_ptr + at * stride_xr + col[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / C
    centred = tl.where(in_col[None, :], x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)
    weight = tl.load(weight_ptr + col, mask=in_col, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * weight[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + col, mask=in_col, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at * C + col[None, :], y, mask=inside)
    tl.store(mean_ptr + row, mean, mask=in_row)
    tl.store(rstd_ptr + row, rstd, mask=in_row)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,  # [R, C], rows stride_dyr apart
    x_ptr,  # [R, C], rows stride_xr apart
    weight_ptr,  # [C]
    mean_ptr,  # [R]
    rstd_ptr,  # [R]
    dx_ptr,  # [R, C] contiguous
    dweight_part_ptr,  # [P, C] float32
    dbias_part_ptr,  # [P, C] float32
    stride_dyr,
    stride_xr,
    R,
    C,
    NEED_DX: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK_C)
    in_col = col < C
    weight = tl.load(weight_ptr + col, mask=in_col, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_C], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_C], dtype=tl.float32)
    for tile in range(program, tl.cdiv(R, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        in_row = row < R
        inside = in_row[:, None] & in_col[None, :]
        at = row.to(tl.int64)[:, None]
        x = tl.load(x_ptr + at * stride_xr + col[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at * stride_dyr + col[None, :], mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=in_row, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=in_row, other=0.0)
        xhat = (x - mean[:, None]) * rstd[:, None]  # beyond the row dy is 0, and so is all that xhat enters
        if NEED_DX:
            g = dy * weight[None, :]
            along = tl.sum(g * xhat, axis=1) / C
            level = tl.sum(g, axis=1) / C
            dx = rstd[:, None] * (g - level[:, None] - xhat * along[:, None])
            tl.store(dx_ptr + at * C + col[None, :], dx, mask=inside)
        if NEED_DWEIGHT:
            dweight += tl.sum(dy * xhat, axis=0)
        if NEED_DBIAS:
            dbias += tl.sum(dy, axis=0)
    part = program.to(tl.int64) * C + col
    if NEED_DWEIGHT:
        tl.store(dweight_part_ptr + part, dweight, mask=in_col)
    if NEED_DBIAS:
        tl.store(dbias_part_ptr + part, dbias, mask=in_col)


def tile(R: int, C: int, *, backward: bool = False, interpreting: bool = INTERPRETING) -> tuple[int, int, int]:
    """(ROWS, BLOCK_C, num_warps) of a tile.

    On a GPU a thread holds about 32 elements forward (16 backward, where there are four arrays of them), so that it loads
    weight in 128-bit pieces too: with half as many, 0.73 of the bf16 forward's accesses at C = 768 were 128 bits wide
    instead of 0.95. In the interpreter the cost is per program: tiles of 65536 elements, since 768 rows took 6.5 s one by
    one and 0.12 s by 64.
    """
    BLOCK_C = next_power_of_2(C)
    budget = 65536 if interpreting else 2048 if backward else 4096
    ROWS = max(1, min(budget // BLOCK_C, 64 if interpreting else 16, next_power_of_2(R)))
    num_warps = ROWS * BLOCK_C // (512 if backward else 1024)
    return ROWS, BLOCK_C, max(1, min(32 if BLOCK_C > 16384 else 16, num_warps))


def layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward of ops.layer_norm; see there. `out`: (y, mean, rstd), contiguous. Returns (y, mean [R], rstd [R])."""
    x_RC = rows(x)
    R, C = x_RC.shape
    if out is None:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        mean, rstd = (torch.empty(R, dtype=torch.float32, device=x.device) for _ in range(2))
    else:
        y, mean, rstd = out
    if R:
        ROWS, BLOCK_C, num_warps = tile(R, C)
        weight = weight.contiguous()
        bias = bias.contiguous() if bias is not None else None
        with on_device(x):
            _layer_norm_fwd_kernel[(triton.cdiv(R, ROWS),)](
                x_RC, weight, weight if bias is None else bias, y, mean, rstd, x_RC.stride(0), R, C, eps,
                HAS_BIAS=bias is not None, ROWS=ROWS, BLOCK_C=BLOCK_C, num_warps=num_warps,
            )  # fmt: skip
    return y, mean, rstd


def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor, eps: float, *,
    needs: tuple[bool, ...] = (True, True, True), out: Buffers | None = None,
) -> Buffers:  # fmt: skip
    """Backward of ops.layer_norm. `needs`: which of dx, dweight, dbias are wanted; `out`: contiguous buffers for them."""
    x_RC, dy_RC, weight = rows(x), rows(dy), weight.contiguous()
    R, C = x_RC.shape
    if out is None:
        wanted = (need and like is not None for need, like in zip(needs, (x, weight, bias), strict=True))
        out = tuple(
            torch.empty(like.shape, dtype=like.dtype, device=like.device) if want and like is not None else None
            for want, like in zip(wanted, (x, weight, bias), strict=True)
        )
    dx, dweight, dbias = out
    if R == 0:
        for sums in (dweight, dbias):
            if sums is not None:
                sums.zero_()
        return out
    ROWS, BLOCK_C, num_warps = tile(R, C, backward=True)
    P = min(triton.cdiv(R, ROWS), 4 * processors(x.device))
    parts = torch.empty(2, P, C, dtype=torch.float32, device=x.device)
    with on_device(x):
        _layer_norm_bwd_kernel[(P,)](
            dy_RC, x_RC, weight, mean, rstd, weight if dx is None else dx, parts[0], parts[1],
            dy_RC.stride(0), x_RC.stride(0), R, C,
            NEED_DX=dx is not None, NEED_DWEIGHT=dweight is not None, NEED_DBIAS=dbias is not None,
            ROWS=ROWS, BLOCK_C=BLOCK_C, num_warps=num_warps,
        )  # fmt: skip
        for part, sums in zip(parts, (dweight, dbias), strict=True):
            if sums is not None:
                sum_parts(part, sums)
    return out


register(
    Impl(
        "layer_norm", "triton", fwd=layer_norm_fwd, bwd=layer_norm_bwd, devices=("cuda", "cpu"),
        dtypes=(torch.float32, torch.float16, torch.bfloat16), dims={"C": (1, MAX_C)}, min_sm=80,
    )
)  # fmt: skip
