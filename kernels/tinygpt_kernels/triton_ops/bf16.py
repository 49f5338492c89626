"""bfloat16 in Triton's interpreter, made right.

Triton 3.8 and 3.9 hold bfloat16 as uint16 and hand those bits to NumPy: arithmetic on them is integer arithmetic, a cast
to an integer reads the bit pattern, and float32 -> bfloat16 truncates where the hardware rounds. Here every operation on
bfloat16 is computed in float32 and rounded to nearest even. tests/triton/test_bf16.py says when this is no longer needed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

_PATCHED = ("binary_op", "unary_op", "ternary_op", "create_fma", "create_erf", "create_rsqrt", "create_dot")


Array = NDArray[Any]


def widen(bits: Array) -> Array:
    """bfloat16 bits (uint16) as float32."""
    shifted: Array = bits.astype(np.uint32) << 16
    return shifted.view(np.float32)


def narrow(values: Array, *, truncate: bool = False) -> Array:
    """float32 as bfloat16 bits (uint16), rounded to nearest even, or towards zero."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(np.shape(values))
    rounded = bits if truncate else bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)
    rounded = np.where(np.isnan(values), (bits >> 16) | 0x40, rounded >> 16)
    return rounded.astype(np.uint16)


def patch() -> None:
    """Replace the interpreter's operations by ones that are right for bfloat16. Once per process; others stay as they are."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_tinygpt_bf16", False):
        return
    builder._tinygpt_bf16 = True
    for name in _PATCHED:
        setattr(builder, name, _in_float32(getattr(builder, name)))
    cast, convert = builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        src = _wide(src)
        if dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        return interpreter.TensorHandle(narrow(cast(self, src, tl.float32).data), tl.bfloat16)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if tl.bfloat16 not in (src.dtype.scalar, dst_type.scalar):
            return convert(self, src, dst_type, rounding_mode)
        if dst_type.scalar == tl.bfloat16:
            truncate = rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
            wide = cast(self, _wide(src), tl.float32).data
            return interpreter.TensorHandle(narrow(wide, truncate=truncate), tl.bfloat16)
        src = _wide(src)
        if dst_type.scalar == tl.float32:
            return src
        return convert(self, src, dst_type, rounding_mode)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp


def _wide(handle: Any) -> Any:
    if (
        isinstance(handle, interpreter.TensorHandle)
        and handle.dtype.scalar == tl.bfloat16
        and handle.data.dtype == np.uint16
    ):
        return interpreter.TensorHandle(widen(handle.data), tl.float32)
    return handle


def _in_float32(operation: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(operation)
    def wide(self: Any, *args: Any) -> Any:
        widened = [_wide(a) for a in args]
        result = operation(self, *widened)
        # What the operation would have called bfloat16 it now calls float32; comparisons stay bool.
        changed = [new is not old for new, old in zip(widened, args, strict=True)]
        if not any(changed) or result.dtype.scalar != tl.float32:
            return result
        if result.data.dtype == np.bool_:
            return interpreter.TensorHandle(result.data, tl.bfloat16)
        handles = [c for c, a in zip(changed, args, strict=True) if isinstance(a, interpreter.TensorHandle)]
        # The last operand decides the type, as in the interpreter itself: the accumulator of a dot, the addend of an fma.
        return interpreter.TensorHandle(narrow(result.data), tl.bfloat16) if handles[-1] else result

    return wide
