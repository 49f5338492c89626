"""layer_norm in C++: csrc/cpu/layer_norm.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Impl, register
from .common import CODES, FLOATS, Buffers, address, code, fits, missing, rows

if not missing:
    from .. import _C


def layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward of ops.layer_norm.

    Args:
        x: [..., C] float32, float16 or bfloat16; weight, bias: [C] in x's dtype or float32.
        out: (y, mean, rstd) to write into; y contiguous like x, mean and rstd [R] float32.

    Returns:
        (y, mean, rstd).
    """
    x_rows, stride = rows(x)
    R, C = x_rows.shape
    if out is None:
        y = torch.empty(x.shape, dtype=x.dtype)
        mean, rstd = torch.empty(R, dtype=torch.float32), torch.empty(R, dtype=torch.float32)
    else:
        y, mean, rstd = out
        fits("layer_norm", y, x.shape, x.dtype)
        fits("layer_norm", mean, (R,), torch.float32)
        fits("layer_norm", rstd, (R,), torch.float32)
    weight = weight.contiguous()
    bias = bias.contiguous() if bias is not None else None
    _C.layer_norm_fwd(
        x_rows.data_ptr(), stride, CODES[x.dtype], weight.data_ptr(), CODES[weight.dtype],
        address(bias), code(bias),
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
        out: (dx, dweight, dbias) to write into, None where not wanted.

    Returns:
        (dx, dweight, dbias), None where not wanted.
    """
    x_rows, stride = rows(x)
    dy_rows, dy_stride = rows(dy)
    R, C = x_rows.shape
    if dy_rows.shape != x_rows.shape or dy.dtype != x.dtype or mean.numel() != R or rstd.numel() != R:
        raise ValueError(
            f"layer_norm on cpp: dy {tuple(dy.shape)} {dy.dtype}, mean [{mean.numel()}] and rstd [{rstd.numel()}] do not "
            f"belong to x {tuple(x.shape)} {x.dtype}"
        )
    weight = weight.contiguous()
    if out is None:
        need_x, need_weight, need_bias = needs
        dx = torch.empty(x.shape, dtype=x.dtype) if need_x else None
        dweight = torch.empty_like(weight) if need_weight else None
        dbias = torch.empty_like(bias) if need_bias and bias is not None else None
    else:
        dx, dweight, dbias = out
        for buffer, like in ((dx, x), (dweight, weight), (dbias, bias)):
            if buffer is not None and like is not None:
                fits("layer_norm", buffer, like.shape, like.dtype)
    _C.layer_norm_bwd(
        dy_rows.data_ptr(), dy_stride, x_rows.data_ptr(), stride, CODES[x.dtype], weight.data_ptr(), CODES[weight.dtype],
        mean.data_ptr(), rstd.data_ptr(), address(dx), address(dweight),
        address(dbias), code(dbias), R, C,
    )  # fmt: skip
    return dx, dweight, dbias


register(
    Impl(
        "layer_norm", "cpp", fwd=layer_norm_fwd, bwd=layer_norm_bwd, devices=("cpu",),
        dtypes=FLOATS, dims={"C": (1, 1 << 24)},
    )
)  # fmt: skip
