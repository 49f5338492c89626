"""Matrix products of a training step that is written out: PyTorch's, and what a backend may put in their place.

# R rows, K channels in, N channels out

They are no op of the table: every backend is served well by the library's own product, and `F.linear` is what autograd takes. But
who drives kernels over buffers allocated once wants products that write into them, and on a CPU a product whose epilogue
does the GELU saves a pass over the widest tensor of the model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Products:
    """PyTorch's products. A backend's own are a subclass that overrides what it does better."""

    backend = "torch"

    fuses_gelu = False
    """Whether `linear_gelu_fwd` and the slope of `linear_bwd_input` are there, and faster than a GELU by itself."""

    def serves(self, x: Tensor) -> bool:
        """Whether these products take tensors of x's device and dtype."""
        return True

    def linear_fwd(self, x_RK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, *, out: Tensor) -> Tensor:
        """x weightᵀ + bias into out [R, N]."""
        if bias_N is None:
            return torch.mm(x_RK, weight_NK.T, out=out)
        return torch.addmm(bias_N, x_RK, weight_NK.T, out=out)

    def linear_gelu_fwd(
        self, x_RK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, approximate: str, *, out: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """With z = x weightᵀ + bias: (GELU(z), GELU'(z)) into out, both [R, N]."""
        raise NotImplementedError

    def linear_bwd_input(
        self, dy_RN: Tensor, weight_NK: Tensor, slope_RK: Tensor | None = None, *, out: Tensor
    ) -> Tensor:
        """dy weight into out [R, K]; times `slope`, element by element, where it is given."""
        if slope_RK is not None:
            raise NotImplementedError
        return torch.mm(dy_RN, weight_NK, out=out)

    def linear_bwd_weight(self, dy_RN: Tensor, x_RK: Tensor, *, out: Tensor) -> Tensor:
        """dyᵀ x into out [N, K]."""
        return torch.mm(dy_RN.T, x_RK, out=out)

    def record(self, function: Callable[[], object]) -> Callable[[], None] | None:
        """Run `function`, which calls this backend's kernels and PyTorch's over buffers that stay where they are, and return what does
        the same again with less Python between; None where that cannot be, or is not known to be right."""
        function()
        return None
