"""The backend's matrix products for a step that is written out: its own where they were measured faster, PyTorch's elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..products import Products
from . import linear, tape


class CppProducts(Products):
    """Own packed products with GELU in the epilogue, float32 on a CPU."""

    backend = "cpp"
    fuses_gelu = True

    def serves(self, x: Tensor) -> bool:
        return x.dtype == torch.float32 and x.is_cpu

    def linear_fwd(self, x_RK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, *, out: Tensor) -> Tensor:
        if linear.is_faster(x_RK.shape[0], weight_NK.shape[0], x_RK.shape[1]):
            return linear.linear_fwd(x_RK, weight_NK, bias_N, out=out)
        return super().linear_fwd(x_RK, weight_NK, bias_N, out=out)

    def linear_gelu_fwd(
        self, x_RK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, approximate: str, *, out: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        return linear.linear_gelu_fwd(x_RK, weight_NK, bias_N, approximate, out=out)

    def linear_bwd_input(
        self, dy_RN: Tensor, weight_NK: Tensor, slope_RK: Tensor | None = None, *, out: Tensor
    ) -> Tensor:
        if slope_RK is not None or linear.is_faster(dy_RN.shape[0], weight_NK.shape[1], dy_RN.shape[1]):
            return linear.linear_bwd_input(dy_RN, weight_NK, slope_RK, out=out)
        return super().linear_bwd_input(dy_RN, weight_NK, out=out)

    def linear_bwd_weight(self, dy_RN: Tensor, x_RK: Tensor, *, out: Tensor) -> Tensor:
        if linear.is_faster(dy_RN.shape[1], x_RK.shape[1], dy_RN.shape[0]):
            return linear.linear_bwd_weight(dy_RN, x_RK, out=out)
        return super().linear_bwd_weight(dy_RN, x_RK, out=out)

    def record(self, function: Callable[[], object]) -> Callable[[], None] | None:
        return tape.record(function)
