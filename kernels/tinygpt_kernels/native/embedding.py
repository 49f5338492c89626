"""embedding in C++: csrc/cpu/embedding.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Impl, register
from .common import CODES, CPU, FLOATS, Buffers, address, in_rows, indices, missing, outputs, table_gradient

if not missing:
    from .. import _C


def embedding_fwd(
    tokens: Tensor, token: Tensor, position: Tensor | None, positions: Tensor | None, scale: float, *,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor]:  # fmt: skip
    """Forward of ops.embedding. A token or a position that is no row reads nothing and gives NaN.

    Args:
        tokens, positions: [B, T] integers; token: [V, C]; position: [P, C], T <= P unless positions are given.
        out: (x,) to write into, [B, T, C], contiguous.

    Returns:
        (x,).
    """
    B, T = tokens.shape
    V, C = token.shape
    P = 0 if position is None else position.shape[0]
    shape = (B, T, C)
    x = (
        torch.empty(shape, dtype=token.dtype)
        if out is None
        else outputs.fits("embedding", out[0], shape, token.dtype, CPU)
    )
    tokens, token = indices(tokens), token.contiguous()
    position = None if position is None else position.contiguous()
    positions = None if positions is None else indices(positions)
    _C.embedding_fwd(
        tokens.data_ptr(), address(positions), B * T, T, token.data_ptr(), V, address(position), P,
        x.data_ptr(), CODES[token.dtype], C, scale,
    )  # fmt: skip
    return (x,)


def embedding_bwd(
    dy: Tensor, tokens: Tensor, token: Tensor, position: Tensor | None, positions: Tensor | None, scale: float, *,
    needs: tuple[bool, ...] = (False, True, True, False), out: Buffers | None = None,
) -> Buffers:  # fmt: skip
    """Backward of ops.embedding. What an index that is no row was given adds to no row.

    Args:
        dy: [B, T, C] in the tables' dtype, any strides; the rest as in the forward.
        needs: of dtoken and dposition, in second and third place, which are wanted.
        out: (None, dtoken, dposition, None) to write into, None where not wanted; every row is written.

    Returns:
        (None, dtoken, dposition, None), None where not wanted.
    """
    dy_rows, dy_stride = in_rows(table_gradient("cpp", dy, tokens, token))
    B, T, C = dy.shape
    dtoken, dposition = outputs.gradients("embedding", (token, position), needs[1:3], out and out[1:3])
    for gradient, used, factor in ((dtoken, tokens, scale), (dposition, positions, 1.0)):
        if gradient is not None:
            rows = None if used is None else indices(used)
            _C.embedding_bwd(
                dy_rows.data_ptr(), dy_stride, address(rows), B * T, T,
                gradient.data_ptr(), gradient.shape[0], CODES[dy.dtype], C, factor,
            )  # fmt: skip
    return None, dtoken, dposition, None


register(
    Impl("embedding", "cpp", fwd=embedding_fwd, bwd=embedding_bwd, devices=("cpu",), dtypes=FLOATS,
         dims={"C": (1, 1 << 24)})
)  # fmt: skip
