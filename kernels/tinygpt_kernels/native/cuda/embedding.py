"""embedding on CUDA: csrc/cuda/embedding.cu. PyTorch sorts the places by the row they used."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import Impl, register
from ..common import CODES, FLOATS, Buffers, in_rows, indices, table_gradient
from . import common
from .common import MIN_SM, outputs


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
    if out is None:
        x = common.fresh(B, T, C, dtype=token.dtype, device=token.device)
    else:
        x = outputs.fits("embedding", out[0], (B, T, C), token.dtype, token.device)
    # Held until the launch: the memory of a copy that nobody holds is the next copy's.
    tokens, token = indices(tokens), token.contiguous()
    positions = None if positions is None else indices(positions)
    position = None if position is None else position.contiguous()
    with common.on_device(token):
        common.module.cuda_embedding_fwd(
            common.read(tokens), common.read(positions), B * T, T, common.read(token), V,
            common.read(position), 0 if position is None else position.shape[0], common.written(x), CODES[token.dtype], C,
            scale, common.stream(token),
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
    dy_rows, stride = in_rows(table_gradient("cuda", dy, tokens, token))
    dtoken, dposition = outputs.gradients("embedding", (token, position), needs[1:3], out and out[1:3])
    if dtoken is not None:
        _sum_rows(dy_rows, stride, tokens.shape, tokens, scale, dtoken)
    if dposition is not None:
        _sum_rows(dy_rows, stride, tokens.shape, positions, 1.0, dposition)
    return None, dtoken, dposition, None


def _sum_rows(
    dy: Tensor, stride: int, shape: tuple[int, ...], used: Tensor | None, scale: float, dtable: Tensor
) -> None:
    """Each row of `dtable` is scale times the sum of dy where `used` names it; None: the offset within a row of text."""
    places, T, (V, C) = shape[0] * shape[1], shape[1], dtable.shape
    ordered = order = partial = None
    if used is not None:
        ordered, order = torch.sort(used.to(torch.int64).reshape(-1), stable=True)
        rows = common.module.cuda_embedding_bwd_partial(places)
        partial = common.fresh(rows, C, dtype=torch.float32, device=dy.device)
        dtable.zero_()
    with common.on_device(dy):
        common.module.cuda_embedding_bwd(
            common.read(dy), stride, common.read(ordered), common.read(order), places, T, common.written(dtable), V,
            CODES[dy.dtype], C, scale, common.written(partial), common.stream(dy),
        )  # fmt: skip


register(
    Impl(
        "embedding", "cuda", fwd=embedding_fwd, bwd=embedding_bwd, devices=("cuda",), dtypes=FLOATS,
        dims={"C": (1, 1 << 24)}, min_sm=MIN_SM,
    )
)  # fmt: skip
