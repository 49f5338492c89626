"""gelu in C++: csrc/cpu/gelu.cpp."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import Impl, register
from .common import CODES, FLOATS, Buffers, address, belonging, code, in_rows, missing, outputs

if not missing:
    from .. import _C


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
    _C.gelu_fwd(
        x_rows.data_ptr(), stride, CODES[x.dtype], address(bias), code(bias), y.data_ptr(), approximate == "tanh",
        x.numel() // C, C,
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
    dy_rows, dy_stride = in_rows(belonging("gelu", "cpp", dy, x))
    C = x.shape[-1]
    dx, dbias = outputs.gradients("gelu", (x, bias), needs, out)
    bias = None if bias is None else bias.contiguous()
    _C.gelu_bwd(
        dy_rows.data_ptr(), dy_stride, x_rows.data_ptr(), stride, CODES[x.dtype], address(bias), code(bias),
        address(dx), address(dbias), approximate == "tanh", x.numel() // C, C,
    )  # fmt: skip
    return dx, dbias


register(
    Impl("gelu", "cpp", fwd=gelu_fwd, bwd=gelu_bwd, devices=("cpu",), dtypes=FLOATS, dims={"C": (1, 1 << 24)})
)  # fmt: skip
