"""layer_norm and add_layer_norm in C++: csrc/cpu/layer_norm.cpp."""

from __future__ import annotations

from torch import Tensor

from . import norms
from .common import CODES, address, code, in_rows, missing, outputs

if not missing:
    from .. import _C


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
    y: Tensor, h: Tensor | None, mean: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    x_rows, stride = in_rows(x)
    C = weight.shape[0]
    R = x.numel() // C
    if residual is None:
        _C.layer_norm_fwd(
            x_rows.data_ptr(), stride, CODES[x.dtype], weight.data_ptr(), CODES[weight.dtype], address(bias), code(bias),
            y.data_ptr(), mean.data_ptr(), rstd.data_ptr(), R, C, eps,
        )  # fmt: skip
        return
    residual_rows, residual_stride = in_rows(residual)
    _C.add_layer_norm_fwd(
        x_rows.data_ptr(), stride, residual_rows.data_ptr(), residual_stride, CODES[x.dtype],
        weight.data_ptr(), CODES[weight.dtype], address(bias), code(bias),
        y.data_ptr(), address(h), mean.data_ptr(), rstd.data_ptr(), R, C, eps,
    )  # fmt: skip


def _backward(
    dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor,
    dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None,
) -> None:  # fmt: skip
    x_rows, stride = in_rows(x)
    dy_rows, dy_stride = in_rows(dy)
    dh_rows, dh_stride = (None, 0) if dh is None else in_rows(dh)
    C = weight.shape[0]
    _C.add_layer_norm_bwd(
        dy_rows.data_ptr(), dy_stride, address(dh_rows), dh_stride, x_rows.data_ptr(), stride, CODES[x.dtype],
        weight.data_ptr(), CODES[weight.dtype], mean.data_ptr(), rstd.data_ptr(), address(dx), address(dweight),
        address(dbias), code(dbias), x.numel() // C, C,
    )  # fmt: skip


layer_norm_fwd, layer_norm_bwd, add_layer_norm_fwd, add_layer_norm_bwd = norms.register(
    outputs, _forward, _backward, devices=("cpu",)
)
