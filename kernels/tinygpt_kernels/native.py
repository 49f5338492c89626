"""Backends `cpp` and `cuda`: the compiled module, and every check on what is handed to it.

The module sees raw pointers. What goes wrong in here with a wrong number is a wrong write, so this file makes every tensor
what the kernels expect (device, dtype, strides) before it passes an address.
"""

from __future__ import annotations

import torch  # before the module: it brings the OpenMP runtime that the module then shares
from torch import Tensor

from .dispatch import Impl, register, register_backend

try:
    from . import _C

    _missing: str | None = None
except ImportError as error:
    if error.name == "tinygpt_kernels._C" or "cannot import name '_C'" in str(error):
        _missing = "is not built: install a C++ compiler (g++ or clang++), then run `pip install -e .` again"
    else:
        _missing = f"is built but cannot be loaded: {error}; run `pip install -e .` again"

_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
Buffers = tuple[Tensor | None, ...]


def isa() -> str | None:
    """The instruction set whose kernels serve: baseline, avx2 or avx512; None when the extension is missing."""
    return None if _missing else _C.isa()


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
    rows, stride = _rows(x)
    R, C = rows.shape
    if out is None:
        y = torch.empty(x.shape, dtype=x.dtype)
        mean, rstd = torch.empty(R, dtype=torch.float32), torch.empty(R, dtype=torch.float32)
    else:
        y, mean, rstd = out
        _fits(y, x.shape, x.dtype)
        _fits(mean, (R,), torch.float32)
        _fits(rstd, (R,), torch.float32)
    weight = weight.contiguous()
    bias = bias.contiguous() if bias is not None else None
    _C.layer_norm_fwd(
        rows.data_ptr(), stride, _CODES[x.dtype], weight.data_ptr(), _CODES[weight.dtype],
        0 if bias is None else bias.data_ptr(), 0 if bias is None else _CODES[bias.dtype],
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
    rows, stride = _rows(x)
    dy_rows, dy_stride = _rows(dy)
    R, C = rows.shape
    if dy_rows.shape != rows.shape or dy.dtype != x.dtype or mean.numel() != R or rstd.numel() != R:
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
                _fits(buffer, like.shape, like.dtype)
    _C.layer_norm_bwd(
        dy_rows.data_ptr(), dy_stride, rows.data_ptr(), stride, _CODES[x.dtype], weight.data_ptr(), _CODES[weight.dtype],
        mean.data_ptr(), rstd.data_ptr(), 0 if dx is None else dx.data_ptr(), 0 if dweight is None else dweight.data_ptr(),
        0 if dbias is None else dbias.data_ptr(), 0 if dbias is None else _CODES[dbias.dtype], R, C,
    )  # fmt: skip
    return dx, dweight, dbias


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """`x` as [R, C] with contiguous rows, in place where strides allow, and the distance between rows."""
    C = x.shape[-1]
    if x.dim() == 2 and x.is_contiguous():
        return x, C
    rows = x.reshape(x.numel() // C, C)
    if rows.stride(1) != 1 or rows.stride(0) < 0:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def _fits(buffer: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if buffer.shape != shape or buffer.dtype != dtype or buffer.device.type != "cpu" or not buffer.is_contiguous():
        raise ValueError(
            f"layer_norm on cpp: an out buffer must be {tuple(shape)} {dtype}, contiguous, on the CPU; "
            f"got {tuple(buffer.shape)} {buffer.dtype} on {buffer.device}, strides {buffer.stride()}"
        )


register_backend("cpp", lambda device_type: f"its extension {_missing}" if _missing else None)
register_backend(
    "cuda", lambda device_type: "this version of tinygpt holds no CUDA C++ kernels yet; use triton or torch"
)
register(
    Impl(
        "layer_norm", "cpp", fwd=layer_norm_fwd, bwd=layer_norm_bwd, devices=("cpu",),
        dtypes=(torch.float32, torch.float16, torch.bfloat16), dims={"C": (1, 1 << 24)},
    )
)  # fmt: skip
