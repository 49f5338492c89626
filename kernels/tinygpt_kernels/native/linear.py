"""Linear layers in C++: csrc/cpu/gemm.cpp. Plain functions over preallocated buffers, no ops of the table.

    R rows (B * T), K in features, N out features

All of them take float32 matrices on the CPU. What is read may have any strides (a slice of the packed qkv, a transpose);
what is written needs contiguous rows, any distance apart, and may share memory with nothing that is read, except that
`out` may be `residual_RN` itself. Whether they or `torch.mm` are faster depends on the shape: `is_faster`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .common import missing

if not missing:
    from .. import _C

_FLOAT = torch.float32
_ACTIVATIONS = {"none": 1, "tanh": 2}  # GELU's forms by PyTorch's names, as the module numbers them


def is_faster(M: int, N: int, K: int) -> bool:
    """Whether these functions are at least as fast as `torch.mm(out=)` at the product [M, K] [K, N].

    The forward is (R, N, K), the input's gradient (R, K, N), the weight's (N, K, R). Two threads of a Zen 3 with AVX2,
    benchmarks/bench_linear.py: x1.03 to x1.49 with 768 rows and widths of 65 to 512 but for one x0.99, x0.98 to x1.19 with 2048
    rows and widths of 384 to 1536. Rows repay the packing: on one thread 0.73 to 0.91 of PyTorch's speed at M = 8, 0.96 at 64.
    """
    return M >= 64


def linear_fwd(
    x_RK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, residual_RN: Tensor | None = None, *, out: Tensor
) -> Tensor:
    """out = x W^T + bias + residual.

    Args:
        x_RK: [R, K]; weight_NK: [N, K]; bias_N: [N]; residual_RN: [R, N], may be `out`.
        out: [R, N], filled.

    Returns:
        out.

    Raises:
        ValueError: shapes, dtypes, devices or strides that the kernel does not take, or buffers that overlap.
    """
    x_row, x_col = _read("x", x_RK, None)
    R, K = x_RK.shape
    N = weight_NK.shape[0]
    w_row, w_col = _read("weight", weight_NK, (N, K))
    out_row = _written("out", out, (R, N))
    add = add_row = 0
    if residual_RN is not None:
        add, add_row = residual_RN.data_ptr(), _rows("residual", residual_RN, (R, N))
    _C.gemm(
        x_RK.data_ptr(), x_row, x_col, weight_NK.data_ptr(), w_col, w_row, out.data_ptr(), out_row,
        0 if bias_N is None else _vector("bias", bias_N, N), add, add_row, 0, 0, 0, 0, 0, R, N, K,
    )  # fmt: skip
    return out


def linear_gelu_fwd(
    x_RK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, approximate: str = "none", *,
    out: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y = gelu(z) and slope = gelu'(z) of z = x W^T + bias: the slope is all that the backward needs of z.

    Args:
        x_RK: [R, K]; weight_NK: [N, K]; bias_N: [N].
        approximate: "none" (erf) or "tanh", as torch.nn.functional.gelu has it.
        out: (y, slope), [R, N] each, filled.

    Returns:
        out.

    Raises:
        ValueError: as for linear_fwd.
    """
    y, slope = out
    x_row, x_col = _read("x", x_RK, None)
    R, K = x_RK.shape
    N = weight_NK.shape[0]
    w_row, w_col = _read("weight", weight_NK, (N, K))
    y_row, slope_row = _written("y", y, (R, N)), _written("slope", slope, (R, N))
    if approximate not in _ACTIVATIONS:
        raise ValueError(f"linear_gelu_fwd: approximate must be 'none' or 'tanh', got {approximate!r}")
    _C.gemm(
        x_RK.data_ptr(), x_row, x_col, weight_NK.data_ptr(), w_col, w_row, y.data_ptr(), y_row,
        0 if bias_N is None else _vector("bias", bias_N, N), 0, 0, 0, 0,
        _ACTIVATIONS[approximate], slope.data_ptr(), slope_row, R, N, K,
    )  # fmt: skip
    return out


def linear_bwd_input(dy_RN: Tensor, weight_NK: Tensor, slope_RK: Tensor | None = None, *, out: Tensor) -> Tensor:
    """out = (dy W) * slope: the gradient of a layer's input, or of what came before the GELU that made that input.

    Args:
        dy_RN: [R, N]; weight_NK: [N, K]; slope_RK: [R, K], from linear_gelu_fwd of the layer before.
        out: [R, K], filled.

    Returns:
        out.

    Raises:
        ValueError: as for linear_fwd.
    """
    dy_row, dy_col = _read("dy", dy_RN, None)
    R, N = dy_RN.shape
    K = weight_NK.shape[1]
    w_row, w_col = _read("weight", weight_NK, (N, K))
    out_row = _written("out", out, (R, K))
    factor = factor_row = 0
    if slope_RK is not None:
        factor, factor_row = slope_RK.data_ptr(), _rows("slope", slope_RK, (R, K))
    _C.gemm(
        dy_RN.data_ptr(), dy_row, dy_col, weight_NK.data_ptr(), w_row, w_col, out.data_ptr(), out_row,
        0, 0, 0, factor, factor_row, 0, 0, 0, R, K, N,
    )  # fmt: skip
    return out


def linear_bwd_weight(dy_RN: Tensor, x_RK: Tensor, *, out: Tensor, accumulate: bool = False) -> Tensor:
    """out = dy^T x, or out += dy^T x: the gradient of the weight.

    Args:
        dy_RN: [R, N]; x_RK: [R, K].
        out: [N, K], filled, or added to.

    Returns:
        out.

    Raises:
        ValueError: as for linear_fwd.
    """
    dy_row, dy_col = _read("dy", dy_RN, None)
    R, N = dy_RN.shape
    K = x_RK.shape[1]
    x_row, x_col = _read("x", x_RK, (R, K))
    out_row = _written("out", out, (N, K))
    target = out.data_ptr()
    _C.gemm(
        dy_RN.data_ptr(), dy_col, dy_row, x_RK.data_ptr(), x_row, x_col, target, out_row,
        0, target if accumulate else 0, out_row if accumulate else 0, 0, 0, 0, 0, 0, N, K, R,
    )  # fmt: skip
    return out


def _read(name: str, x: Tensor, shape: tuple[int, int] | None) -> tuple[int, int]:
    """The strides of a matrix that is only read; `shape` None: any matrix."""
    if x.dtype is not _FLOAT or not x.is_cpu or (x.dim() != 2 if shape is None else x.shape != shape):
        raise _refusal(name, x, shape)
    row, col = x.stride()
    return row, col


def _rows(name: str, x: Tensor, shape: tuple[int, int]) -> int:
    """The distance between the rows of a matrix, each of them contiguous."""
    row, col = _read(name, x, shape)
    if col != 1 and shape[1] > 1:
        raise _refusal(name, x, shape)
    return row


def _written(name: str, x: Tensor, shape: tuple[int, int]) -> int:
    row = _rows(name, x, shape)
    if row < shape[1] and shape[0] > 1:
        raise _refusal(name, x, shape)
    return row


def _vector(name: str, x: Tensor, n: int) -> int:
    """The address of a contiguous vector."""
    if x.dtype is not _FLOAT or not x.is_cpu or x.shape != (n,) or (n > 1 and x.stride(0) != 1):
        raise _refusal(name, x, (n,))
    return x.data_ptr()


def _refusal(name: str, x: Tensor, shape: tuple[int, ...] | None) -> ValueError:
    wanted = "a matrix" if shape is None else f"{tuple(shape)}"
    return ValueError(
        f"linear layers on cpp: {name} must be {wanted} of float32 on the CPU, with contiguous rows where written or "
        f"added; got {tuple(x.shape)} {x.dtype} on {x.device}, strides {x.stride()}; use torch.mm for others"
    )
