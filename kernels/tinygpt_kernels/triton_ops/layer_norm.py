"""Layer norm in Triton, forward and backward (Ba, Kiros, Hinton 2016).

# R rows, C channels; a tile is ROWS rows of the whole width, as two arrays [ROWS, BLOCK_A] and [ROWS, BLOCK_B]

Triton's arrays have powers of two as sizes. A row of 768 in one array of 1024 would leave a quarter of the threads idle; in two of
512 and 256 all work, and no column is masked (EXACT).

Forward. A tile is loaded once and stays in registers: mean, then the variance around that mean (E[x^2] - E[x]^2 would lose
every digit at a large mean), then the result. One program per tile; mean and rstd are saved in float32.

Backward. With xhat = (x - mean) rstd and g = dy * weight:

    dx = rstd (g - mean(g) - xhat mean(g xhat)),   dweight = sum over rows dy * xhat,   dbias = sum over rows dy

P programs walk over the tiles, each keeping its part of dweight and dbias in registers, and write one row each of a [P, C]
workspace; a second kernel adds the P rows in a fixed order. No atomics: the same call gives the same bits.

add_layer_norm is the same pair: the forward adds the residual first and stores the sum h, the backward adds h's own gradient
at the end, and what comes out is the gradient of both summands.

Left out: splitting a row over several programs (a row of 65536 still fits one) and recomputing mean and rstd instead of
saving them (eight bytes a row against a second reduction).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import Impl, register
from .common import FUSION, INTERPRETING, Buffers, next_power_of_2, on_device, processors, rows, sum_parts

MAX_C = 65536  # a tile of one row at 32 warps: 64 elements a thread


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,  # [R, C], rows stride_xr apart
    residual_ptr,  # [R, C], rows stride_rr apart, or unused
    weight_ptr,  # [C]
    bias_ptr,  # [C] or unused
    y_ptr,  # [R, C] contiguous
    h_ptr,  # [R, C] contiguous: x + residual, or unused
    mean_ptr,  # [R]
    rstd_ptr,  # [R]
    stride_xr,
    stride_rr,
    R,
    C,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_row = row < R
    at = row.to(tl.int64)[:, None]
    a, b = tl.arange(0, BLOCK_A), BLOCK_A + tl.arange(0, max(BLOCK_B, 1))
    in_a, in_b = a < C, b < C
    here_a, here_b = in_row[:, None], in_row[:, None]
    if not EXACT:
        here_a, here_b = here_a & in_a[None, :], here_b & in_b[None, :]

    x_a = tl.load(x_ptr + at * stride_xr + a[None, :], mask=here_a, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x_a += tl.load(residual_ptr + at * stride_rr + a[None, :], mask=here_a, other=0.0).to(tl.float32)
        h = x_a.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + at * C + a[None, :], h, mask=here_a)
        x_a = h.to(tl.float32)  # the norm sees h as it is stored
    mean = tl.sum(x_a, 1)
    if BLOCK_B:
        x_b = tl.load(x_ptr + at * stride_xr + b[None, :], mask=here_b, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            x_b += tl.load(residual_ptr + at * stride_rr + b[None, :], mask=here_b, other=0.0).to(tl.float32)
            h = x_b.to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + at * C + b[None, :], h, mask=here_b)
            x_b = h.to(tl.float32)
        mean += tl.sum(x_b, 1)
    mean = mean / C
    x_a -= mean[:, None]
    if not EXACT:
        x_a = tl.where(in_a[None, :], x_a, 0.0)
    variance = tl.sum(x_a * x_a, 1)
    if BLOCK_B:
        x_b -= mean[:, None]
        if not EXACT:
            x_b = tl.where(in_b[None, :], x_b, 0.0)
        variance += tl.sum(x_b * x_b, 1)
    rstd = 1.0 / tl.sqrt(variance / C + eps)
    weight = tl.load(weight_ptr + a, mask=in_a, other=0.0).to(tl.float32)
    y = x_a * rstd[:, None] * weight[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + a, mask=in_a, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at * C + a[None, :], y, mask=here_a)
    if BLOCK_B:
        weight = tl.load(weight_ptr + b, mask=in_b, other=0.0).to(tl.float32)
        y = x_b * rstd[:, None] * weight[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + b, mask=in_b, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptr + at * C + b[None, :], y, mask=here_b)
    tl.store(mean_ptr + row, mean, mask=in_row)
    tl.store(rstd_ptr + row, rstd, mask=in_row)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,  # [R, C], rows stride_dyr apart
    dh_ptr,  # [R, C], rows stride_dhr apart: upstream of x + residual, or unused
    x_ptr,  # [R, C], rows stride_xr apart
    weight_ptr,  # [C]
    mean_ptr,  # [R]
    rstd_ptr,  # [R]
    dx_ptr,  # [R, C] contiguous
    dweight_part_ptr,  # [P, C] float32
    dbias_part_ptr,  # [P, C] float32
    stride_dyr,
    stride_dhr,
    stride_xr,
    R,
    C,
    HAS_DH: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    program = tl.program_id(0)
    a, b = tl.arange(0, BLOCK_A), BLOCK_A + tl.arange(0, max(BLOCK_B, 1))
    in_a, in_b = a < C, b < C
    weight_a = tl.load(weight_ptr + a, mask=in_a, other=0.0).to(tl.float32)
    weight_b = tl.load(weight_ptr + b, mask=in_b, other=0.0).to(tl.float32)
    dweight_a, dbias_a = tl.zeros([BLOCK_A], tl.float32), tl.zeros([BLOCK_A], tl.float32)
    dweight_b, dbias_b = tl.zeros([max(BLOCK_B, 1)], tl.float32), tl.zeros([max(BLOCK_B, 1)], tl.float32)
    for tile in range(program, tl.cdiv(R, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        in_row = row < R
        at = row.to(tl.int64)[:, None]
        here_a, here_b = in_row[:, None], in_row[:, None]
        if not EXACT:
            here_a, here_b = here_a & in_a[None, :], here_b & in_b[None, :]
        mean = tl.load(mean_ptr + row, mask=in_row, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=in_row, other=0.0)[:, None]
        # Outside of the tensor dy is 0, and so is all that xhat enters.
        xhat_a = tl.load(x_ptr + at * stride_xr + a[None, :], mask=here_a, other=0.0).to(tl.float32)
        xhat_a = (xhat_a - mean) * rstd
        dy_a = tl.load(dy_ptr + at * stride_dyr + a[None, :], mask=here_a, other=0.0).to(tl.float32)
        if NEED_DX:
            g_a = dy_a * weight_a[None, :]
            along, level = tl.sum(g_a * xhat_a, 1), tl.sum(g_a, 1)
        if NEED_DWEIGHT:
            dweight_a += tl.sum(dy_a * xhat_a, 0)
        if NEED_DBIAS:
            dbias_a += tl.sum(dy_a, 0)
        if BLOCK_B:
            xhat_b = tl.load(x_ptr + at * stride_xr + b[None, :], mask=here_b, other=0.0).to(tl.float32)
            xhat_b = (xhat_b - mean) * rstd
            dy_b = tl.load(dy_ptr + at * stride_dyr + b[None, :], mask=here_b, other=0.0).to(tl.float32)
            if NEED_DX:
                g_b = dy_b * weight_b[None, :]
                along += tl.sum(g_b * xhat_b, 1)
                level += tl.sum(g_b, 1)
            if NEED_DWEIGHT:
                dweight_b += tl.sum(dy_b * xhat_b, 0)
            if NEED_DBIAS:
                dbias_b += tl.sum(dy_b, 0)
        if NEED_DX:
            along, level = (along / C)[:, None], (level / C)[:, None]
            dx = rstd * (g_a - level - xhat_a * along)
            if HAS_DH:
                dx += tl.load(dh_ptr + at * stride_dhr + a[None, :], mask=here_a, other=0.0).to(tl.float32)
            tl.store(dx_ptr + at * C + a[None, :], dx, mask=here_a)
            if BLOCK_B:
                dx = rstd * (g_b - level - xhat_b * along)
                if HAS_DH:
                    dx += tl.load(dh_ptr + at * stride_dhr + b[None, :], mask=here_b, other=0.0).to(tl.float32)
                tl.store(dx_ptr + at * C + b[None, :], dx, mask=here_b)
    part = program.to(tl.int64) * C
    if NEED_DWEIGHT:
        tl.store(dweight_part_ptr + part + a, dweight_a, mask=in_a)
        if BLOCK_B:
            tl.store(dweight_part_ptr + part + b, dweight_b, mask=in_b)
    if NEED_DBIAS:
        tl.store(dbias_part_ptr + part + a, dbias_a, mask=in_a)
        if BLOCK_B:
            tl.store(dbias_part_ptr + part + b, dbias_b, mask=in_b)


def parts_of(C: int) -> tuple[int, int]:
    """(BLOCK_A, BLOCK_B): the power of two that holds C, or the two smaller ones that do: 768 = 512 + 256, not 1024."""
    whole = next_power_of_2(C)
    rest = max(32, next_power_of_2(C - whole // 2))
    return (whole // 2, rest) if C >= 256 and whole // 2 + rest < whole else (whole, 0)


def tile(R: int, C: int, *, backward: bool = False, interpreting: bool = INTERPRETING) -> dict[str, int]:
    """ROWS, BLOCK_A, BLOCK_B and num_warps of a tile.

    On a GPU a thread holds about 48 elements forward and 24 backward, where there are four arrays of them, and there are so few
    warps that each thread loads 8 neighbours of weight too and a row of up to 1024 never leaves its warp. In bf16 at C = 768,
    backward on sm_90: one warp and one row 2.85 instructions a byte, 0.98 of the accesses 128 bits wide; two warps and four rows
    4.06, 0.95 and a spill of 72 bytes. In the interpreter the cost is per program: tiles of 65536 elements, since 768 rows took
    6.5 s one by one and 0.12 s by 64.
    """
    BLOCK_A, BLOCK_B = parts_of(C)
    if interpreting:
        return {"ROWS": max(1, min(65536 // BLOCK_A, 64, next_power_of_2(R))), "BLOCK_A": BLOCK_A, "BLOCK_B": BLOCK_B}
    num_warps = max(1, min(32 if BLOCK_A > 16384 else 16, BLOCK_A // 1024))
    rows = max(1, (24 if backward else 48) * 32 * num_warps // C)
    return {"ROWS": min(16, next_power_of_2(rows + 1) // 2, next_power_of_2(R)), "BLOCK_A": BLOCK_A, "BLOCK_B": BLOCK_B,
            "num_warps": num_warps, **FUSION}  # fmt: skip


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, out: tuple[Tensor, ...] | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(y, h or None, mean, rstd); `out`: buffers for them, h only with a residual."""
    x_RC = rows(x)
    R, C = x_RC.shape
    residual_RC = x_RC if residual is None else rows(residual)
    h: Tensor | None = None
    if out is None:
        y, h = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
            for need in (True, residual is not None)
        )
        mean, rstd = (torch.empty(R, dtype=torch.float32, device=x.device) for _ in range(2))
    elif residual is None:
        y, mean, rstd = out
    else:
        y, h, mean, rstd = out
    assert y is not None
    if R:
        options = tile(R, C)
        with on_device(x):
            _layer_norm_fwd_kernel[(triton.cdiv(R, options["ROWS"]),)](
                x_RC, residual_RC, weight.contiguous(), None if bias is None else bias.contiguous(), y, h, mean, rstd,
                x_RC.stride(0), residual_RC.stride(0), R, C, eps, HAS_RESIDUAL=residual is not None,
                HAS_BIAS=bias is not None, EXACT=options["BLOCK_A"] + options["BLOCK_B"] == C, **options,
            )  # fmt: skip
    return y, h, mean, rstd


def layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward of ops.layer_norm; see there. `out`: (y, mean, rstd), contiguous. Returns (y, mean [R], rstd [R])."""
    y, _, mean, rstd = _forward(x, None, weight, bias, eps, out)
    return y, mean, rstd


def add_layer_norm_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward of ops.add_layer_norm; see there. `out`: (y, h, mean, rstd), contiguous."""
    y, h, mean, rstd = _forward(x, residual, weight, bias, eps, out)
    assert h is not None
    return y, h, mean, rstd


def _backward(
    dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None,
) -> None:  # fmt: skip
    x_RC, dy_RC = rows(x), rows(dy)
    dh_RC = dy_RC if dh is None else rows(dh)
    R, C = x_RC.shape
    if R == 0:
        for sums in (dweight, dbias):
            if sums is not None:
                sums.zero_()
        return
    options = tile(R, C, backward=True)
    # Twelve warps fit a processor; but each program writes a row of the workspace, which should stay small beside the tensors.
    P = min(triton.cdiv(R, options["ROWS"]), processors(x.device) * max(4, 12 // options.get("num_warps", 12)))
    P = min(P, max(processors(x.device), R // 32))
    parts = torch.empty(2, P, C, dtype=torch.float32, device=x.device)
    # A row of 16384 and its sums do not fit the registers of one block together: then there are two passes over x and dy.
    wanted = [(dx, None, None), (None, dweight, dbias)] if options["BLOCK_A"] > 8192 else [(dx, dweight, dbias)]
    with on_device(x):
        for want_dx, want_dweight, want_dbias in wanted:
            _layer_norm_bwd_kernel[(P,)](
                dy_RC, dh_RC, x_RC, weight.contiguous(), mean, rstd, want_dx, parts[0], parts[1],
                dy_RC.stride(0), dh_RC.stride(0), x_RC.stride(0), R, C, HAS_DH=dh is not None,
                NEED_DX=want_dx is not None, NEED_DWEIGHT=want_dweight is not None, NEED_DBIAS=want_dbias is not None,
                EXACT=options["BLOCK_A"] + options["BLOCK_B"] == C, **options,
            )  # fmt: skip
        for part, sums in zip(parts, (dweight, dbias), strict=True):
            if sums is not None:
                sum_parts(part, sums)


def _gradient_buffers(needs: tuple[bool, ...], *tensors: Tensor | None) -> Buffers:
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if need and t is not None else None
        for need, t in zip(needs, tensors, strict=True)
    )


def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor, eps: float, *,
    needs: tuple[bool, ...] = (True, True, True), out: Buffers | None = None,
) -> Buffers:  # fmt: skip
    """Backward of ops.layer_norm. `needs`: which of dx, dweight, dbias are wanted; `out`: contiguous buffers for them."""
    dx, dweight, dbias = out = _gradient_buffers(needs, x, weight, bias) if out is None else out
    _backward(dy, None, x, weight, mean, rstd, dx, dweight, dbias)
    return out


def add_layer_norm_bwd(
    dy: Tensor, dh: Tensor, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, h: Tensor,
    mean: Tensor, rstd: Tensor, eps: float, *,
    needs: tuple[bool, ...] = (True, True, True, True), out: Buffers | None = None,
) -> Buffers:  # fmt: skip
    """Backward of ops.add_layer_norm: (dx, dresidual, dweight, dbias), the first two one and the same tensor."""
    if out is None:
        wanted = (needs[0] or needs[1], needs[2], needs[3])
        dx, dweight, dbias = _gradient_buffers(wanted, x, weight, bias)
    else:
        dx, dweight, dbias = out[0] if out[0] is not None else out[1], out[2], out[3]
    _backward(dy, dh, h, weight, mean, rstd, dx, dweight, dbias)
    return dx if needs[0] else None, dx if needs[1] else None, dweight, dbias


for _name, _fwd, _bwd in (
    ("layer_norm", layer_norm_fwd, layer_norm_bwd),
    ("add_layer_norm", add_layer_norm_fwd, add_layer_norm_bwd),
):
    register(
        Impl(
            _name, "triton", fwd=_fwd, bwd=_bwd, devices=("cuda", "cpu"),
            dtypes=(torch.float32, torch.float16, torch.bfloat16), dims={"C": (1, MAX_C)}, min_sm=80,
        )
    )  # fmt: skip
