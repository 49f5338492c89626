"""layer_norm and add_layer_norm in C++: csrc/cpu/layer_norm.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Impl, register
from .common import CODES, FLOATS, Buffers, address, code, contiguous_like, fits, in_rows, missing

if not missing:
    from .. import _C


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
    x_rows, stride = in_rows(x)
    C = weight.shape[0]
    R = x.numel() // C
    if out is None:
        y = contiguous_like(x)
        mean, rstd = torch.empty(R, dtype=torch.float32), torch.empty(R, dtype=torch.float32)
    else:
        y, mean, rstd = out
        fits("layer_norm", y, x.shape, x.dtype)
        fits("layer_norm", mean, (R,), torch.float32)
        fits("layer_norm", rstd, (R,), torch.float32)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    _C.layer_norm_fwd(
        x_rows.data_ptr(), stride, CODES[x.dtype], weight.data_ptr(), CODES[weight.dtype], address(bias), code(bias),
        y.data_ptr(), mean.data_ptr(), rstd.data_ptr(), R, C, eps,
    )  # fmt: skip
    return y, mean, rstd


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
    x_rows, stride = in_rows(x)
    residual_rows, residual_stride = in_rows(residual)
    C = weight.shape[0]
    R = x.numel() // C
    if out is None:
        y, h = contiguous_like(x), contiguous_like(x)
        mean, rstd = torch.empty(R, dtype=torch.float32), torch.empty(R, dtype=torch.float32)
    else:
        y, h, mean, rstd = out
        fits("add_layer_norm", y, x.shape, x.dtype)
        fits("add_layer_norm", h, x.shape, x.dtype)
        fits("add_layer_norm", mean, (R,), torch.float32)
        fits("add_layer_norm", rstd, (R,), torch.float32)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    _C.add_layer_norm_fwd(
        x_rows.data_ptr(), stride, residual_rows.data_ptr(), residual_stride, CODES[x.dtype],
        weight.data_ptr(), CODES[weight.dtype], address(bias), code(bias),
        y.data_ptr(), h.data_ptr(), mean.data_ptr(), rstd.data_ptr(), R, C, eps,
    )  # fmt: skip
    return y, h, mean, rstd


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
        fits("add_layer_norm", dresidual, dx.shape, dx.dtype).copy_(dx)
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
            f"{op} on cpp: dy {tuple(dy.shape)} {dy.dtype}, "
            f"{'' if dh is None else f'dh {tuple(dh.shape)} {dh.dtype}, '}mean [{mean.numel()}] and rstd [{rstd.numel()}] "
            f"do not belong to x {tuple(x.shape)} {x.dtype}"
        )
    weight = weight.contiguous()
    if out is None:
        need_x, need_weight, need_bias = needs
        dx = contiguous_like(x) if need_x else None
        dweight = contiguous_like(weight) if need_weight else None
        dbias = contiguous_like(bias) if need_bias and bias is not None else None
    else:
        dx, dweight, dbias = out
        for buffer, like in ((dx, x), (dweight, weight), (dbias, bias)):
            if buffer is not None and like is not None:
                fits(op, buffer, like.shape, like.dtype)
    _C.add_layer_norm_bwd(
        dy_rows.data_ptr(), dy_stride, address(dh_rows), dh_stride, x_rows.data_ptr(), stride, CODES[x.dtype],
        weight.data_ptr(), CODES[weight.dtype], mean.data_ptr(), rstd.data_ptr(), address(dx), address(dweight),
        address(dbias), code(dbias), R, C,
    )  # fmt: skip
    return dx, dweight, dbias


for _name, _fwd, _bwd in (
    ("layer_norm", layer_norm_fwd, layer_norm_bwd),
    ("add_layer_norm", add_layer_norm_fwd, add_layer_norm_bwd),
):
    register(
        Impl(_name, "cpp", fwd=_fwd, bwd=_bwd, devices=("cpu",), dtypes=FLOATS, dims={"C": (1, 1 << 24)})
    )  # fmt: skip
