"""layer_norm and add_layer_norm on CUDA: csrc/cuda/layer_norm.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import norms
from ..common import CODES, code, in_rows
from . import common
from .common import MIN_SM, outputs


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
    y: Tensor, h: Tensor | None, mean: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    x_rows, stride = in_rows(x)
    residual_rows, residual_stride = (None, 0) if residual is None else in_rows(residual)
    C = weight.shape[0]
    with common.on_device(x):
        common.module.cuda_layer_norm_fwd(
            common.read(x_rows), stride, common.read(residual_rows), residual_stride, CODES[x.dtype],
            common.read(weight), CODES[weight.dtype], common.read(bias), code(bias), common.written(y), common.written(h),
            common.written(mean), common.written(rstd), x.numel() // C, C, eps, common.stream(x),
        )  # fmt: skip


def _backward(
    dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor,
    dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None,
) -> None:  # fmt: skip
    x_rows, stride = in_rows(x)
    dy_rows, dy_stride = in_rows(dy)
    dh_rows, dh_stride = (None, 0) if dh is None else in_rows(dh)
    C = weight.shape[0]
    R = x.numel() // C
    partial = common.fresh(common.module.cuda_layer_norm_bwd_blocks(R), 2, C, dtype=torch.float32, device=x.device)
    with common.on_device(x):
        common.module.cuda_layer_norm_bwd(
            common.read(dy_rows), dy_stride, common.read(dh_rows), dh_stride, common.read(x_rows), stride, CODES[x.dtype],
            common.read(weight), CODES[weight.dtype], common.read(mean), common.read(rstd), common.written(dx),
            common.written(dweight), common.written(dbias), code(dbias if bias is None else bias), R, C,
            common.written(partial), common.stream(x),
        )  # fmt: skip


layer_norm_fwd, layer_norm_bwd, add_layer_norm_fwd, add_layer_norm_bwd = norms.register(
    outputs, _forward, _backward, devices=("cuda",), min_sm=MIN_SM
)
