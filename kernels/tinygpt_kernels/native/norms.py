"""What the launchers of layer_norm and add_layer_norm share, whoever computes: the ops' signatures, their checks, their buffers.

A backend gives two functions that launch kernels on what is checked, and `register` makes the two ops of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .. import dispatch
from ..dispatch import Impl
from .common import FLOATS, Buffers, Outputs

Forward = Callable[[Tensor, Tensor | None, Tensor, Tensor | None, float, Tensor, Tensor | None, Tensor, Tensor], None]
Backward = Callable[
    [Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    None,
]


class Launchers(NamedTuple):
    """Forward and backward of ops.layer_norm and ops.add_layer_norm on one backend."""

    layer_norm_fwd: Callable[..., tuple[Tensor, Tensor, Tensor]]
    layer_norm_bwd: Callable[..., Buffers]
    add_layer_norm_fwd: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    add_layer_norm_bwd: Callable[..., Buffers]


def register(outputs: Outputs, forward: Forward, backward: Backward, **capabilities: Any) -> Launchers:
    """Make the two ops of a backend's kernels, and register them.

    Args:
        outputs: the backend's.
        forward: (x, residual, weight, bias, eps, y, h, mean, rstd): fills the last four; residual and h None where nothing is added.
        backward: (dy, dh, x, weight, bias, mean, rstd, dx, dweight, dbias): fills the last three, None where not wanted; dh None
            where there is none.
        capabilities: of dispatch.Impl.

    All tensors are as the caller gave them, with any strides; weight and bias and what is filled are contiguous.
    """

    def filled(
        op: str, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
        y: Tensor | None, h: Tensor | None, mean: Tensor | None, rstd: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
        R = x.numel() // weight.shape[0]
        y = outputs.result(op, x, y)
        h = None if residual is None else outputs.result(op, x, h)
        mean, rstd = (outputs.statistic(op, (R,), x.device, buffer) for buffer in (mean, rstd))
        forward(x, residual, weight.contiguous(), None if bias is None else bias.contiguous(), eps, y, h, mean, rstd)
        return y, h, mean, rstd

    def gradients(
        op: str, dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor,
        needs: tuple[bool, ...], out: Buffers | None,
    ) -> Buffers:  # fmt: skip
        C = weight.shape[0]
        R = x.numel() // C
        if (
            dy.numel() != R * C or dy.shape[-1] != C or dy.dtype != x.dtype or mean.numel() != R or rstd.numel() != R
            or (dh is not None and (dh.shape != dy.shape or dh.dtype != x.dtype))
        ):  # fmt: skip
            raise ValueError(
                f"{op} on {outputs.backend}: dy {tuple(dy.shape)} {dy.dtype}, "
                f"{'' if dh is None else f'dh {tuple(dh.shape)} {dh.dtype}, '}mean [{mean.numel()}] and rstd [{rstd.numel()}] "
                f"do not belong to x {tuple(x.shape)} {x.dtype}"
            )
        dx, dweight, dbias = outputs.gradients(op, (x, weight, bias), needs, out)
        backward(dy, dh, x, weight.contiguous(), bias, mean, rstd, dx, dweight, dbias)
        return dx, dweight, dbias

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
        y, mean, rstd = out or (None, None, None)
        y, _, mean, rstd = filled("layer_norm", x, None, weight, bias, eps, y, None, mean, rstd)
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
        return gradients("layer_norm", dy, None, x, weight, bias, mean, rstd, needs, out)

    def add_layer_norm_fwd(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *,
        out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Forward of ops.add_layer_norm.

        Args:
            x, residual: [..., C] alike; weight, bias: [C] in x's dtype or float32.
            out: (y, h, mean, rstd) to write into; y and h contiguous like x, mean and rstd [R] float32; h may be x or residual.

        Returns:
            (y, h, mean, rstd).
        """
        y, h, mean, rstd = filled("add_layer_norm", x, residual, weight, bias, eps, *(out or (None, None, None, None)))
        assert h is not None
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
        op = "add_layer_norm"
        if out is None:
            wanted = (needs[0] or needs[1], needs[2], needs[3])
            dx, dweight, dbias = gradients(op, dy, dh, h, weight, bias, mean, rstd, wanted, None)
            return dx if needs[0] else None, dx if needs[1] else None, dweight, dbias
        dx, dresidual, dweight, dbias = out
        gradients(op, dy, dh, h, weight, bias, mean, rstd, needs, (dresidual if dx is None else dx, dweight, dbias))
        if dx is not None and dresidual is not None and dresidual is not dx:
            outputs.fits(op, dresidual, dx.shape, dx.dtype, dx.device).copy_(dx)
        return out

    for op, fwd, bwd in (
        ("layer_norm", layer_norm_fwd, layer_norm_bwd),
        ("add_layer_norm", add_layer_norm_fwd, add_layer_norm_bwd),
    ):
        dispatch.register(
            Impl(op, outputs.backend, fwd=fwd, bwd=bwd, dtypes=FLOATS, dims={"C": (1, 1 << 24)}, **capabilities)
        )
    return Launchers(layer_norm_fwd, layer_norm_bwd, add_layer_norm_fwd, add_layer_norm_bwd)
