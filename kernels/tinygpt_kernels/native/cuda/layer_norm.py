"""layer_norm and add_layer_norm on CUDA: csrc/cuda/layer_norm.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import Impl, register
from ..common import CODES, FLOATS, Buffers, code, in_rows
from . import common
from .common import MIN_SM, fits


def layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, out: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward of ops.layer_norm.

    Args:
        x: [..., C] float32, float16 or bfloat16; weight, bias: [C] in x's dtype or float32.
        out: (y, mean, rstd) to write into; y contiguous like x, mean and rstd [R] float32.

    Returns:
        (y, mean, rstd).
    """
    y, _, mean, rstd = _forward(
        "layer_norm", x, None, weight, bias, eps, None if out is None else (out[0], None, *out[1:])
    )
    return y, mean, rstd


def add_layer_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Forward of ops.add_layer_norm.

    Args:
        x, residual: [..., C] alike; weight, bias: [C] in x's dtype or float32.
        out: (y, h, mean, rstd) to write into; y and h contiguous like x, mean and rstd [R] float32; h may be x or residual.

    Returns:
        (y, h, mean, rstd).
    """
    y, h, mean, rstd = _forward("add_layer_norm", x, residual, weight, bias, eps, out)
    assert h is not None
    return y, h, mean, rstd


def _forward(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
    out: tuple[Tensor | None, ...] | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    x_rows, stride = in_rows(x)
    residual_rows, residual_stride = (None, 0) if residual is None else in_rows(residual)
    C = weight.shape[0]
    R = x.numel() // C
    if out is None:
        y = common.fresh(*x.shape, dtype=x.dtype, device=x.device)
        h = None if residual is None else common.fresh(*x.shape, dtype=x.dtype, device=x.device)
        mean, rstd = (common.fresh(R, dtype=torch.float32, device=x.device) for _ in range(2))
    else:
        y, h, mean, rstd = out  # type: ignore[assignment]
        for buffer in (y, h):
            if buffer is not None:
                fits(op, buffer, x.shape, x.dtype, x.device)
        for buffer in (mean, rstd):
            fits(op, buffer, (R,), torch.float32, x.device)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    with common.on_device(x):
        common.module.cuda_layer_norm_fwd(
            common.read(x_rows), stride, common.read(residual_rows), residual_stride, CODES[x.dtype],
            common.read(weight), CODES[weight.dtype], common.read(bias), code(bias),
            common.written(y), common.written(h), common.written(mean), common.written(rstd), R, C, eps, common.stream(x),
        )  # fmt: skip
    return y, h, mean, rstd


def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor, eps: float, *,
    needs: tuple[bool, ...] = (True, True, True), out: Buffers | None = None,
) -> Buffers:  # fmt: skip
    """Backward of ops.layer_norm.

    Args:
        dy: like y, any strides; x, weight, bias as in the forward; mean, rstd: [R] float32, saved by any backend's forward.
        needs: which of dx, dweight and dbias are wanted.
        out: (dx, dweight, dbias) to write into, None where not wanted; dx may be dy.

    Returns:
        (dx, dweight, dbias), None where not wanted.
    """
    return _backward("layer_norm", dy, None, x, weight, bias, mean, rstd, needs, out)


def add_layer_norm_bwd(
    dy: Tensor, dh: Tensor | None, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, h: Tensor,
    mean: Tensor, rstd: Tensor, eps: float, *,
    needs: tuple[bool, ...] = (True, True, True, True), out: Buffers | None = None,
) -> Buffers:  # fmt: skip
    """Backward of ops.add_layer_norm. x, residual and y are not looked at.

    Args:
        dy, dh: like y and h, any strides; dh None where nothing else used h.
        h, mean, rstd: saved by any backend's forward.
        needs: which of dx, dresidual, dweight and dbias are wanted.
        out: buffers for them, None where not wanted; dx may be dy or dh, and dresidual may be dx.

    Returns:
        (dx, dresidual, dweight, dbias), None where not wanted; without `out` the first two are one tensor.
    """
    if out is None:
        wanted = (needs[0] or needs[1], needs[2], needs[3])
        dx, dweight, dbias = _backward("add_layer_norm", dy, dh, h, weight, bias, mean, rstd, wanted, None)
        return dx if needs[0] else None, dx if needs[1] else None, dweight, dbias
    dx, dresidual, dweight, dbias = out
    first = dresidual if dx is None else dx
    _backward("add_layer_norm", dy, dh, h, weight, bias, mean, rstd, needs, (first, dweight, dbias))
    if dx is not None and dresidual is not None and dresidual is not dx:
        fits("add_layer_norm", dresidual, dx.shape, dx.dtype, dx.device).copy_(dx)
    return out


def _backward(
    op: str, dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor,
    needs: tuple[bool, ...], out: Buffers | None,
) -> Buffers:  # fmt: skip
    x_rows, stride = in_rows(x)
    dy_rows, dy_stride = in_rows(dy)
    dh_rows, dh_stride = (None, 0) if dh is None else in_rows(dh)
    C = weight.shape[0]
    R = x.numel() // C
    if (
        dy.numel() != R * C or dy.shape[-1] != C or dy.dtype != x.dtype or mean.numel() != R or rstd.numel() != R
        or (dh is not None and (dh.shape != dy.shape or dh.dtype != x.dtype))
    ):  # fmt: skip
        raise ValueError(
            f"{op} on cuda: dy {tuple(dy.shape)} {dy.dtype}, "
            f"{'' if dh is None else f'dh {tuple(dh.shape)} {dh.dtype}, '}mean [{mean.numel()}] and rstd [{rstd.numel()}] "
            f"do not belong to x {tuple(x.shape)} {x.dtype}"
        )
    weight = weight.contiguous()
    if out is None:
        need_x, need_weight, need_bias = needs
        dx = common.fresh(*x.shape, dtype=x.dtype, device=x.device) if need_x else None
        dweight = common.fresh(C, dtype=weight.dtype, device=x.device) if need_weight else None
        dbias = common.fresh(C, dtype=bias.dtype, device=x.device) if need_bias and bias is not None else None
    else:
        dx, dweight, dbias = out
        for buffer, like in ((dx, x), (dweight, weight), (dbias, bias)):
            if buffer is not None and like is not None:
                fits(op, buffer, like.shape, like.dtype, like.device)
    partial = common.fresh(common.module.cuda_layer_norm_bwd_blocks(R), 2, C, dtype=torch.float32, device=x.device)
    with common.on_device(x):
        common.module.cuda_layer_norm_bwd(
            common.read(dy_rows), dy_stride, common.read(dh_rows), dh_stride, common.read(x_rows), stride, CODES[x.dtype],
            common.read(weight), CODES[weight.dtype], common.read(mean), common.read(rstd), common.written(dx),
            common.written(dweight), common.written(dbias), code(dbias if bias is None else bias), R, C,
            common.written(partial), common.stream(x),
        )  # fmt: skip
    return dx, dweight, dbias


for _name, _fwd, _bwd in (
    ("layer_norm", layer_norm_fwd, layer_norm_bwd),
    ("add_layer_norm", add_layer_norm_fwd, add_layer_norm_bwd),
):
    register(
        Impl(
            _name, "cuda", fwd=_fwd, bwd=_bwd, devices=("cuda",), dtypes=FLOATS, dims={"C": (1, 1 << 24)}, min_sm=MIN_SM
        )
    )
