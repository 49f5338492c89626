"""gelu on CUDA: csrc/cuda/gelu.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import Impl, register
from ..common import CODES, FLOATS, Buffers, belonging, code, in_rows
from . import common
from .common import MIN_SM, outputs


def gelu_fwd(
    x: Tensor, bias: Tensor | None, approximate: str, *, out: tuple[Tensor, ...] | None = None
) -> tuple[Tensor]:
    """Forward of ops.gelu.

    Args:
        x: [..., C] float32, float16 or bfloat16; bias: [C] in x's dtype or float32, or None.
        approximate: "none" or "tanh".
        out: (y,) to write into, contiguous like x; may be x.

    Returns:
        (y,).
    """
    x_rows, stride = in_rows(x)
    C = x.shape[-1]
    y = outputs.result("gelu", x, out[0] if out else None)
    bias = None if bias is None else bias.contiguous()
    with common.on_device(x):
        common.module.cuda_gelu_fwd(
            common.read(x_rows), stride, CODES[x.dtype], common.read(bias), code(bias), common.written(y), approximate == "tanh",
            x.numel() // C, C, common.stream(x),
        )  # fmt: skip
    return (y,)


def gelu_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, *,
    needs: tuple[bool, ...] = (True, True), out: Buffers | None = None,
) -> Buffers:  # fmt: skip
    """Backward of ops.gelu.

    Args:
        dy: like y, any strides; x, bias, approximate as in the forward.
        needs: which of dx and dbias are wanted.
        out: (dx, dbias) to write into, None where not wanted; dx may be dy or x.

    Returns:
        (dx, dbias), None where not wanted.
    """
    x_rows, stride = in_rows(x)
    dy_rows, dy_stride = in_rows(belonging("gelu", "cuda", dy, x))
    C = x.shape[-1]
    R = x.numel() // C
    dx, dbias = outputs.gradients("gelu", (x, bias), needs, out)
    bias, partial = None if bias is None else bias.contiguous(), None
    if dbias is not None:
        lanes = common.module.cuda_gelu_bwd_lanes(R, C)
        partial = common.fresh(lanes, C, dtype=torch.float32, device=x.device)
    with common.on_device(x):
        common.module.cuda_gelu_bwd(
            common.read(dy_rows), dy_stride, common.read(x_rows), stride, CODES[x.dtype], common.read(bias), code(bias),
            common.written(dx), common.written(dbias), approximate == "tanh", R, C, common.written(partial), common.stream(x),
        )  # fmt: skip
    return dx, dbias


register(
    Impl(
        "gelu", "cuda", fwd=gelu_fwd, bwd=gelu_bwd, devices=("cuda",), dtypes=FLOATS, dims={"C": (1, 1 << 24)},
        min_sm=MIN_SM,
    )
)  # fmt: skip
