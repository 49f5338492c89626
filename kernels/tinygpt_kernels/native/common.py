"""What every launcher needs: the module or why it is missing, dtype codes, rows of a tensor, checks of buffers."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch  # before the module: it brings the OpenMP runtime that the module then shares
from torch import Tensor

from ..lists import Checked

try:
    from .. import _C

    missing: str | None = None
except ImportError as error:
    if error.name == "tinygpt_kernels._C" or "cannot import name '_C'" in str(error):
        missing = "is not built: install a C++ compiler (g++ or clang++), then run `pip install -e .` again"
    else:
        missing = f"is built but cannot be loaded: {error}; run `pip install -e .` again"

VARIABLE = "TINYGPT_ISA"  # forces an instruction set; read once, when this module is imported


def _forced() -> str | None:
    """Serve from the instruction set that TINYGPT_ISA names, if any; returns why that is impossible."""
    name, supported = os.environ.get(VARIABLE), _C.supported_isas()
    if name and name not in supported:
        return (
            f"is told {VARIABLE}={name!r}, but this build and this CPU have {', '.join(supported)}: "
            f"name one of these, or unset {VARIABLE}"
        )
    if name:
        _C.set_isa(name)
    return None


missing = missing or _forced()

CPU = torch.device("cpu")
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Buffers = tuple[Tensor | None, ...]  # a gradient per tensor argument of an op, None where nobody wants one


def isa() -> str | None:
    """The instruction set whose kernels serve: baseline, avx2, avx512 or neon; None when the extension is missing."""
    return None if missing else _C.isa()


def isas() -> list[str]:
    """The instruction sets that this build and this CPU both have, best last; none when the extension is missing."""
    return [] if missing else _C.supported_isas()


def rows(x: Tensor) -> tuple[Tensor, int]:
    """`x` as [R, C] with contiguous rows, in place where strides allow, and the distance between rows."""
    C = x.shape[-1]
    if x.dim() == 2 and x.is_contiguous():
        return x, C
    flat = x.reshape(x.numel() // C, C)
    if flat.stride(1) != 1 or flat.stride(0) < 0:
        flat = flat.contiguous()
    return flat, flat.stride(0)


def in_rows(x: Tensor) -> tuple[Tensor, int]:
    """The same in whatever shape is cheapest: `x` itself where it is contiguous, and the distance between rows."""
    return (x, x.shape[-1]) if x.is_contiguous() else rows(x)


def contiguous_like(x: Tensor) -> Tensor:
    """A fresh tensor of x's shape and dtype. torch.empty(x.shape, dtype=x.dtype) costs 1.2 µs more."""
    return torch.empty_like(x) if x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def address(x: Tensor | None) -> int:
    """Where a tensor lies; 0 stands for an absent one."""
    return 0 if x is None else x.data_ptr()


def code(x: Tensor | None) -> int:
    """The module's number for a tensor's dtype."""
    return 0 if x is None else CODES[x.dtype]


def codes(checked: Checked) -> list[list[int]]:
    """The module's numbers for the dtypes of lists of tensors."""
    return [[CODES[dtype] for dtype in dtypes] for dtypes in checked.dtypes]


@dataclass(frozen=True)
class Outputs:
    """Where a backend's kernels write: the buffers that a caller gives as `out`, if a kernel may fill them, else fresh memory.

    Attributes:
        backend: for messages.
        like: memory of a tensor's shape and dtype on its device, contiguous.
        floats: memory for so many float32, by shape and device.
    """

    backend: str
    like: Callable[[Tensor], Tensor]
    floats: Callable[[tuple[int, ...], torch.device], Tensor]

    def fits(self, op: str, buffer: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """`buffer`, if a kernel may fill it.

        Raises:
            ValueError: another shape, dtype or device, or not contiguous.
        """
        if buffer.shape != shape or buffer.dtype != dtype or buffer.device != device or not buffer.is_contiguous():
            raise ValueError(
                f"{op} on {self.backend}: an out buffer must be {tuple(shape)} {dtype}, contiguous, on {device}; "
                f"got {tuple(buffer.shape)} {buffer.dtype} on {buffer.device}, strides {buffer.stride()}"
            )
        return buffer

    def result(self, op: str, x: Tensor, buffer: Tensor | None) -> Tensor:
        """Where a result of the shape and dtype of `x` goes.

        Raises:
            ValueError: the buffer does not fit.
        """
        return self.like(x) if buffer is None else self.fits(op, buffer, x.shape, x.dtype, x.device)

    def statistic(self, op: str, shape: tuple[int, ...], device: torch.device, buffer: Tensor | None) -> Tensor:
        """Where float32 of that shape go: what a forward saves, a loss.

        Raises:
            ValueError: the buffer does not fit.
        """
        return self.floats(shape, device) if buffer is None else self.fits(op, buffer, shape, torch.float32, device)

    def gradients(
        self, op: str, tensors: tuple[Tensor | None, ...], needs: tuple[bool, ...], out: Buffers | None
    ) -> Buffers:
        """Where the gradient of each of the tensors goes; None where nobody wants one.

        Args:
            needs: for which of them one is wanted; not looked at where `out` tells.

        Raises:
            ValueError: a buffer does not fit its tensor.
        """
        if out is None:
            return tuple(
                self.like(x) if need and x is not None else None for x, need in zip(tensors, needs, strict=True)
            )
        for buffer, x in zip(out, tensors, strict=True):
            if buffer is not None and x is not None:
                self.fits(op, buffer, x.shape, x.dtype, x.device)
        return out


outputs = Outputs("cpp", contiguous_like, lambda shape, device: torch.empty(shape, dtype=torch.float32))


def saved_lse(backend: str, dy: Tensor, y: Tensor, lse: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`lse` as a backward of attention reads it: float32, contiguous.

    Raises:
        ValueError: dy, y or lse do not belong to a q of that shape and dtype.
    """
    B, T, H, _ = shape
    if dy.shape != shape or y.shape != shape or not dy.dtype == y.dtype == dtype or lse.shape != (B, H, T):
        raise ValueError(
            f"attention on {backend}: dy {tuple(dy.shape)} {dy.dtype}, y {tuple(y.shape)} {y.dtype} and lse {tuple(lse.shape)} "
            f"do not belong to q {tuple(shape)} {dtype}"
        )
    return lse if lse.dtype is torch.float32 and lse.is_contiguous() else lse.float().contiguous()


def belonging(op: str, backend: str, dy: Tensor, x: Tensor) -> Tensor:
    """`dy`, if it can be the gradient of something like `x` [..., C]: as many rows, the same dtype.

    Raises:
        ValueError: it cannot.
    """
    if dy.numel() != x.numel() or dy.shape[-1] != x.shape[-1] or dy.dtype != x.dtype:
        raise ValueError(
            f"{op} on {backend}: dy {tuple(dy.shape)} {dy.dtype} does not belong to x {tuple(x.shape)} {x.dtype}"
        )
    return dy


def table_gradient(backend: str, dy: Tensor, tokens: Tensor, table: Tensor) -> Tensor:
    """`dy`, if it is [B, T, C] in the dtype of `table` [V, C], for tokens [B, T].

    Raises:
        ValueError: it is not.
    """
    if dy.shape != (*tokens.shape, table.shape[1]) or dy.dtype != table.dtype:
        raise ValueError(
            f"embedding on {backend}: dy {tuple(dy.shape)} {dy.dtype} does not belong to tokens {tuple(tokens.shape)} and a "
            f"table {tuple(table.shape)} {table.dtype}"
        )
    return dy


def indices(x: Tensor) -> Tensor:
    """Rows of a table as kernels read them: int64, contiguous."""
    return x.to(torch.int64).contiguous()


def classes(backend: str, targets: Tensor, device: torch.device) -> Tensor:
    """Targets as kernels read them: int64, contiguous, on the logits' device.

    Raises:
        ValueError: no integers, or on another device.
    """
    if targets.dtype == torch.int64 and targets.device == device:
        return targets.contiguous()
    if targets.is_floating_point() or targets.is_complex() or targets.device != device:
        raise ValueError(
            f"cross_entropy on {backend}: targets must be integers on {'the CPU' if device.type == 'cpu' else device}, "
            f"got {targets.dtype} on {targets.device}"
        )
    return targets.to(torch.int64).contiguous()


def number(backend: str, x: Tensor, name: str, device: torch.device) -> Tensor:
    """One float32 in a device's memory.

    Raises:
        ValueError: not one element.
    """
    if x.numel() != 1:
        raise ValueError(f"cross_entropy on {backend}: {name} must hold one element, got {tuple(x.shape)}")
    return x.to(device, torch.float32)


def row_lse(op: str, backend: str, lse: Tensor, R: int, device: torch.device) -> Tensor:
    """`lse`, if it can be what a forward of R rows saved.

    Raises:
        ValueError: it cannot.
    """
    if lse.shape != (R,) or lse.dtype != torch.float32 or not lse.is_contiguous() or lse.device != device:
        raise ValueError(
            f"{op} on {backend}: lse {tuple(lse.shape)} {lse.dtype} does not belong to {R} rows: float32 [{R}]"
        )
    return lse
