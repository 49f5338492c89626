"""cross_entropy and linear_cross_entropy on CUDA: csrc/cuda/cross_entropy.cu.

# R rows, V columns of memory, `vocab` of them real, C channels

linear_cross_entropy multiplies with PyTorch's matmul, a block of rows at a time, into one reused buffer of logits about as large
as `hidden`, forward and again backward; the gradient is written over them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...dispatch import Impl, register
from ..common import CODES, FLOATS, Buffers, classes, number, row_lse, rows
from . import common
from .common import MIN_SM, outputs


def cross_entropy_fwd(
    logits: Tensor, targets: Tensor, denominator: Tensor | None, ignore_index: int, label_smoothing: float, vocab: int | None, *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Forward of ops.cross_entropy.

    Args:
        logits: [R, V] float32, float16 or bfloat16; the rest as in the op.
        out: (loss [] float32, lse [R] float32) to write into.

    Returns:
        (loss, lse). A target that is no class and not ignore_index makes the loss NaN.
    """
    logits, _ = rows(logits)
    targets = classes("cuda", targets, logits.device)
    loss, lse = _outputs("cross_entropy", targets, out)
    losses = _floats(targets.numel(), like=targets)
    _losses(logits[:, :vocab], targets, ignore_index, label_smoothing, lse, losses)
    _mean(losses, targets, denominator, ignore_index, loss)
    return loss, lse


def cross_entropy_bwd(
    dloss: Tensor, logits: Tensor, targets: Tensor, denominator: Tensor | None, lse: Tensor,
    ignore_index: int, label_smoothing: float, vocab: int | None, *,
    needs: tuple[bool, ...] = (True, False, False), out: Buffers | None = None,
) -> Buffers:  # fmt: skip
    """Backward of ops.cross_entropy.

    Args:
        dloss: one element; logits, targets, denominator and options as in the forward; lse: [R] float32, saved by any
            backend's forward.
        out: (dlogits, ...) to write into; dlogits contiguous like logits, and the logits themselves if these may go.

    Returns:
        (dlogits, None, None).
    """
    (dlogits,) = outputs.gradients("cross_entropy", (logits,), needs[:1], out and out[:1])
    if dlogits is None:
        return None, None, None
    R, V = logits.shape
    logits, _ = rows(logits)
    targets = classes("cuda", targets, logits.device)
    row_lse("cross_entropy", "cuda", lse, R, logits.device)
    factor = _factor(dloss, targets, denominator, ignore_index)
    _dlogits(logits, targets, lse, factor, vocab or V, ignore_index, label_smoothing, dlogits)
    return dlogits, None, None


@torch.no_grad()
def linear_cross_entropy_fwd(
    hidden: Tensor, weight: Tensor, targets: Tensor, denominator: Tensor | None,
    ignore_index: int, label_smoothing: float, vocab: int | None, *, out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Forward of ops.linear_cross_entropy.

    Args:
        hidden: [R, C]; weight: [V, C]; the rest as in the op. out: (loss [] float32, lse [R] float32) to write into.

    Returns:
        (loss, lse).
    """
    targets = classes("cuda", targets, hidden.device)
    loss, lse = _outputs("linear_cross_entropy", targets, out)
    losses = _floats(targets.numel(), like=targets)
    for block, logits in _blocks(hidden, weight):
        _losses(logits[:, :vocab], targets[block], ignore_index, label_smoothing, lse[block], losses[block])
    _mean(losses, targets, denominator, ignore_index, loss)
    return loss, lse


@torch.no_grad()
def linear_cross_entropy_bwd(
    dloss: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, denominator: Tensor | None, lse: Tensor,
    ignore_index: int, label_smoothing: float, vocab: int | None, *,
    needs: tuple[bool, ...] = (True, True, False, False), out: Buffers | None = None,
) -> Buffers:  # fmt: skip
    """Backward of ops.linear_cross_entropy.

    Args:
        dloss: one element; hidden, weight, targets, denominator and options as in the forward; lse: [R] float32, saved by
            any backend's forward.
        out: (dhidden, dweight, ...) to write into, None where not wanted; contiguous like hidden and weight.

    Returns:
        (dhidden, dweight, None, None), None where not wanted.
    """
    R, V = hidden.shape[0], weight.shape[0]
    dhidden, dweight = outputs.gradients("linear_cross_entropy", (hidden, weight), needs[:2], out and out[:2])
    if dhidden is None and dweight is None:
        return None, None, None, None
    targets = classes("cuda", targets, hidden.device)
    row_lse("linear_cross_entropy", "cuda", lse, R, hidden.device)
    factor = _factor(dloss, targets, denominator, ignore_index)
    # Several blocks are added in float32: in 16 bits each sum would round again.
    several = dweight is not None and not 0 < R == _height(hidden, weight)
    total = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if several else None
    for block, logits in _blocks(hidden, weight):
        _dlogits(logits, targets[block], lse[block], factor, vocab or V, ignore_index, label_smoothing, logits)
        if dhidden is not None:
            torch.mm(logits, weight, out=dhidden[block])
        if total is not None:
            total += logits.T @ hidden[block]
        elif dweight is not None:
            torch.mm(logits.T, hidden, out=dweight)
    if total is not None and dweight is not None:
        dweight.copy_(total)
    return dhidden, dweight, None, None


def _height(hidden: Tensor, weight: Tensor) -> int:
    """Rows of logits held at a time: as many as make them as large as `hidden`, a power of two, but at least 64."""
    (R, C), V = hidden.shape, weight.shape[0]
    return min(R, max(64, 1 << max(0, -(-R * C // V) - 1).bit_length()))


def _blocks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Row block by row block: which rows, and their logits [rows, V], in memory that the next block takes again.

    Rows of logits begin at multiples of 16 bytes, which matmul and the kernels are faster with.
    """
    R, V, height, group = hidden.shape[0], weight.shape[0], _height(hidden, weight), 16 // hidden.element_size()
    width = -(-V // group) * group
    buffer = common.fresh(height, width, dtype=hidden.dtype, device=hidden.device)[:, :V]
    for i in range(0, R, max(height, 1)):
        block = slice(i, min(i + height, R))
        yield block, torch.mm(hidden[block], weight.T, out=buffer[: block.stop - i])


def _floats(*shape: int, like: Tensor) -> Tensor:
    return common.fresh(*shape, dtype=torch.float32, device=like.device)


def _outputs(op: str, targets: Tensor, out: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    loss, lse = out or (None, None)
    device = targets.device
    return outputs.statistic(op, (), device, loss), outputs.statistic(op, (targets.numel(),), device, lse)


def _losses(logits: Tensor, targets: Tensor, ignore_index: int, smoothing: float, lse: Tensor, losses: Tensor) -> None:
    """lse and loss of each row of logits [R, vocab], columns contiguous; 0 where the target does not count."""
    with common.on_device(logits):
        common.module.cuda_cross_entropy_fwd(
            common.read(logits), logits.stride(0), CODES[logits.dtype], common.read(targets), ignore_index, *logits.shape,
            smoothing, common.written(lse), common.written(losses), common.stream(logits),
        )  # fmt: skip


def _mean(values: Tensor, targets: Tensor, denominator: Tensor | None, ignore_index: int, mean: Tensor) -> None:
    """The sum of values, divided by the denominator or by the number of targets that count."""
    if denominator is not None:
        denominator = number("cuda", denominator, "denominator", targets.device)
    with common.on_device(targets):
        common.module.cuda_cross_entropy_mean(
            common.read(values), values.numel(), common.read(targets), ignore_index, targets.numel(), common.read(denominator),
            common.written(mean), common.stream(targets),
        )  # fmt: skip


def _factor(dloss: Tensor, targets: Tensor, denominator: Tensor | None, ignore_index: int) -> Tensor:
    """What the gradient of every row that counts is multiplied with: float32 [1]."""
    factor = _floats(1, like=targets)
    _mean(number("cuda", dloss, "dloss", targets.device), targets, denominator, ignore_index, factor)
    return factor


def _dlogits(
    logits: Tensor, targets: Tensor, lse: Tensor, factor: Tensor, vocab: int, ignore_index: int, smoothing: float,
    dlogits: Tensor,
) -> None:  # fmt: skip
    """The gradient of logits [R, V] into dlogits, columns contiguous; these may be the logits. 0 from column `vocab` on."""
    with common.on_device(logits):
        common.module.cuda_cross_entropy_bwd(
            common.read(logits), logits.stride(0), CODES[logits.dtype], common.read(targets), ignore_index, common.read(lse),
            common.read(factor), common.written(dlogits), dlogits.stride(0), *logits.shape, vocab, smoothing,
            common.stream(logits),
        )  # fmt: skip


for _name, _fwd, _bwd, _dims in (
    ("cross_entropy", cross_entropy_fwd, cross_entropy_bwd, {"V": (1, 1 << 24)}),
    (
        "linear_cross_entropy",
        linear_cross_entropy_fwd,
        linear_cross_entropy_bwd,
        {"C": (1, 1 << 24), "V": (1, 1 << 24)},
    ),
):
    register(Impl(_name, "cuda", fwd=_fwd, bwd=_bwd, devices=("cuda",), dtypes=FLOATS, dims=_dims, min_sm=MIN_SM))
