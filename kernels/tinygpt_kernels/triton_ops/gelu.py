"""Bias add and GELU in Triton, in one pass (Hendrycks, Gimpel 2016).

# R rows, C channels; a tile is [ROWS, BLOCK_C]

Forward: y = z Φ(z), z = x + bias. Backward: dx = dy (Φ(z) + z φ(z)) from the x that came in, so nothing is saved; dbias is
the column sum of dx, by programs that walk over row tiles and write one row each of a workspace, which a second kernel adds in
a fixed order. Without a bias every contiguous tensor is treated as one long row, cut where it suits the GPU.

Φ costs one exponential: for a = |z|, log2 Φ(-a) is smooth, and a polynomial of degree 8 in a, fitted so that the largest error
of Φ over 0 .. 5.5 is least (6e-8, what float32 resolves at 1), goes on falling beyond. With Triton's erf the forward took 585
instructions for 16 elements, with this 264.

Left out: storing GELU'(x) instead of recomputing it; on a GPU the kernel waits for memory and not for erf.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import Impl, register
from .common import FUSION, INTERPRETING, Buffers, next_power_of_2, on_device, processors, rows, sum_parts

_TANH_1 = tl.constexpr(2 * math.sqrt(2 / math.pi))  # tanh's argument doubled, _TANH_1 z + _TANH_3 z^3
_TANH_3 = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)
_TANH_3_SLOPE = tl.constexpr(6 * math.sqrt(2 / math.pi) * 0.044715)
_INV_SQRT_2PI = tl.constexpr(1 / math.sqrt(2 * math.pi))
_LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _sigmoid(u):
    return 1.0 / (1.0 + tl.exp2(u * -_LOG2E))


@triton.jit
def _normal_distribution(z):
    a = tl.abs(z)
    p = a * -1.2560565210151253e-06 + 2.0940347894793376e-05
    p = p * a - 0.00010260142153128982
    p = p * a - 0.0003255116462241858
    p = p * a + 0.007288691587746143
    p = p * a - 0.05263585224747658
    p = p * a - 0.45916748046875
    p = p * a - 1.1511095762252808
    tail = tl.exp2(p * a - 0.9999999403953552)
    return tl.where(z < 0.0, tail, 1.0 - tail)


@triton.jit
def _gelu_fwd_kernel(
    x_ptr,  # [R, C], rows stride_xr apart
    bias_ptr,  # [C] or unused
    y_ptr,  # [R, C] contiguous
    stride_xr,
    R,
    C,
    HAS_BIAS: tl.constexpr,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < R)[:, None] & (col < C)[None, :]
    at = row.to(tl.int64)[:, None]
    z = tl.load(x_ptr + at * stride_xr + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + col, mask=col < C, other=0.0).to(tl.float32)[None, :]
    if TANH:  # (1 + tanh(u)) / 2 is the logistic function of 2u
        y = z * _sigmoid(z * (z * z * _TANH_3 + _TANH_1))
    else:
        y = z * _normal_distribution(z)
    tl.store(y_ptr + at * C + col[None, :], y, mask=inside)


@triton.jit
def _gelu_bwd_kernel(
    dy_ptr,  # [R, C], rows stride_dyr apart
    x_ptr,  # [R, C], rows stride_xr apart
    bias_ptr,  # [C] or unused
    dx_ptr,  # [R, C] contiguous
    dbias_part_ptr,  # [P, C] float32
    stride_dyr,
    stride_xr,
    R,
    C,
    HAS_BIAS: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    dbias = tl.zeros([BLOCK_C], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < R)[:, None] & (col < C)[None, :]
        at = row.to(tl.int64)[:, None]
        z = tl.load(x_ptr + at * stride_xr + col[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at * stride_dyr + col[None, :], mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias_ptr + col, mask=col < C, other=0.0).to(tl.float32)[None, :]
        if TANH:
            p = _sigmoid(z * (z * z * _TANH_3 + _TANH_1))
            slope = z * z * _TANH_3_SLOPE + _TANH_1
            dx = dy * (p + z * p * (1.0 - p) * slope)
        else:
            density = _INV_SQRT_2PI * tl.exp2(z * z * (-0.5 * _LOG2E))
            dx = dy * (_normal_distribution(z) + z * density)
        if NEED_DX:
            tl.store(dx_ptr + at * C + col[None, :], dx, mask=inside)
        if NEED_DBIAS:
            dbias += tl.sum(dx, 0)
    if NEED_DBIAS:
        tl.store(dbias_part_ptr + tl.program_id(0).to(tl.int64) * C + col, dbias, mask=col < C)


def tile(R: int, C: int) -> tuple[int, int, int]:
    """(ROWS, BLOCK_C, num_warps): 16 elements a thread, two 128-bit pieces of bfloat16 in flight."""
    if INTERPRETING:
        BLOCK_C = min(next_power_of_2(C), 4096)
        return min(next_power_of_2(R), 65536 // BLOCK_C), BLOCK_C, 4
    BLOCK_C = min(next_power_of_2(C), 2048)
    return min(next_power_of_2(R), 2048 // BLOCK_C), BLOCK_C, 4


def _flat(x: Tensor, bias: Tensor | None, *others: Tensor) -> tuple[Tensor, ...]:
    """[R, C] views: without a bias, of long rows whatever the shape, where all are contiguous and the sizes allow it."""
    tensors = (x, *others)
    if bias is None and all(t.is_contiguous() for t in tensors):
        width = math.gcd(x.numel(), 1 << 16)
        if width >= 512:
            return tuple(t.view(-1, width) for t in tensors)
    return tuple(rows(t) for t in tensors)


def gelu_fwd(x: Tensor, bias: Tensor | None, approximate: str, *, out: tuple[Tensor] | None = None) -> tuple[Tensor]:
    """Forward of ops.gelu; see there. `out`: (y,), contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out[0]
    if y.numel():
        (x_RC,) = _flat(x, bias)
        R, C = x_RC.shape
        ROWS, BLOCK_C, num_warps = tile(R, C)
        with on_device(x):
            _gelu_fwd_kernel[(triton.cdiv(R, ROWS), triton.cdiv(C, BLOCK_C))](
                x_RC, None if bias is None else bias.contiguous(), y, x_RC.stride(0), R, C,
                HAS_BIAS=bias is not None, TANH=approximate == "tanh", ROWS=ROWS, BLOCK_C=BLOCK_C, num_warps=num_warps, **FUSION,
            )  # fmt: skip
    return (y,)


def gelu_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, *,
    needs: tuple[bool, ...] = (True, True), out: Buffers | None = None,
) -> Buffers:  # fmt: skip
    """Backward of ops.gelu: (dx, dbias)."""
    if out is None:
        out = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None,
            torch.empty_like(bias) if bias is not None and needs[1] else None,
        )
    dx, dbias = out
    if not x.numel():
        if dbias is not None:
            dbias.zero_()
        return out
    x_RC, dy_RC = _flat(x, bias, dy)
    R, C = x_RC.shape
    ROWS, BLOCK_C, num_warps = tile(R, C)
    P = triton.cdiv(R, ROWS)
    if dbias is not None:
        P = min(P, max(1, 4 * processors(x.device) // triton.cdiv(C, BLOCK_C)))
    parts = torch.empty(P, C, dtype=torch.float32, device=x.device) if dbias is not None else None
    with on_device(x):
        _gelu_bwd_kernel[(P, triton.cdiv(C, BLOCK_C))](
            dy_RC, x_RC, None if bias is None else bias.contiguous(), dx, parts, dy_RC.stride(0), x_RC.stride(0), R, C,
            HAS_BIAS=bias is not None, NEED_DX=dx is not None, NEED_DBIAS=dbias is not None,
            TANH=approximate == "tanh", ROWS=ROWS, BLOCK_C=BLOCK_C, num_warps=num_warps, **FUSION,
        )  # fmt: skip
        if dbias is not None and parts is not None:
            sum_parts(parts, dbias)
    return out


register(
    Impl(
        "gelu", "triton", fwd=gelu_fwd, bwd=gelu_bwd, devices=("cuda", "cpu"),
        dtypes=(torch.float32, torch.float16, torch.bfloat16), min_sm=80,
    )
)  # fmt: skip
