"""cross_entropy and linear_cross_entropy in C++: csrc/cpu/cross_entropy.cpp.

# R rows, V columns of memory, `vocab` of them real, C channels

linear_cross_entropy goes over slices of the vocabulary, each as wide as one buffer of logits allows: PyTorch's sgemm multiplies,
the kernel reads the product while it is in the cache. So the weight is read once and its gradient written once, whatever R;
slices of rows would read and write them again for each. The backward computes the logits a second time. 16-bit operands are
widened to float32, a slice at a time: PyTorch's 16-bit product on a CPU without instructions for it is slower and rounds the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Impl, register
from .common import CODES, CPU, FLOATS, Buffers, address, classes, missing, number, outputs, row_lse, rows

if not missing:
    from .. import _C

_BLOCK = 1 << 21  # elements of logits held at a time: 8 MB
_ROWS = 8192  # rows of them at most, and columns at least: neither side of the sgemm gets thin
_WIDTH = 256


def _number(x: Tensor | None, name: str) -> Tensor | None:
    return None if x is None else number("cpp", x, name, CPU)


def _outputs(op: str, R: int, out: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    loss, lse = out or (None, None)
    return outputs.statistic(op, (), CPU, loss), outputs.statistic(op, (R,), CPU, lse)


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
    logits, stride = rows(logits)
    R, V = logits.shape
    targets, denominator = classes("cpp", targets, CPU), _number(denominator, "denominator")
    loss, lse = _outputs("cross_entropy", R, out)
    V = vocab or V
    _C.cross_entropy_fwd(
        logits.data_ptr(), stride, CODES[logits.dtype], targets.data_ptr(), ignore_index, R, V, 0, V, label_smoothing,
        0, address(denominator), lse.data_ptr(), loss.data_ptr(),
    )  # fmt: skip
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
    logits_rows, stride = rows(logits)
    R, V = logits_rows.shape
    row_lse("cross_entropy", "cpp", lse, R, CPU)
    targets, denominator = classes("cpp", targets, CPU), _number(denominator, "denominator")
    upstream = _number(dloss, "dloss")
    vocab = vocab or V
    _C.cross_entropy_bwd(
        logits_rows.data_ptr(), stride, CODES[logits.dtype], targets.data_ptr(), ignore_index, lse.data_ptr(),
        address(upstream), address(denominator), dlogits.data_ptr(), V, R, V, vocab, 0, vocab, label_smoothing,
    )  # fmt: skip
    return dlogits, None, None


def _slices(R: int, V: int) -> list[tuple[int, int]]:
    """Ranges of the vocabulary, such that a slice of logits is no larger than the block."""
    width = V if R * V <= _BLOCK else max(_WIDTH, _BLOCK // min(R, _ROWS) // 64 * 64)
    return [(first, min(first + width, V)) for first in range(0, V, width)]


def _blocks(R: int) -> list[tuple[int, int]]:
    return [(i, min(i + _ROWS, R)) for i in range(0, R, _ROWS)]


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
    R, V = hidden.shape[0], vocab or weight.shape[0]
    targets, denominator = classes("cpp", targets, CPU), _number(denominator, "denominator")
    loss, lse = _outputs("linear_cross_entropy", R, out)
    slices, blocks = _slices(R, V), _blocks(R)
    hidden = hidden.float()
    memory = torch.empty(min(R, _ROWS) * slices[0][1], dtype=torch.float32)
    if len(slices) == len(blocks) == 1:
        logits = torch.mm(hidden, weight[:V].float().T, out=memory.view(R, V))
        _C.cross_entropy_fwd(
            logits.data_ptr(), V, 0, targets.data_ptr(), ignore_index, R, V, 0, V, label_smoothing, 0, address(denominator),
            lse.data_ptr(), loss.data_ptr(),
        )  # fmt: skip
        return loss, lse
    state = torch.empty(R, 2, dtype=torch.float64)
    for first, last in slices:
        V_slice = last - first
        columns = weight[first:last].float()
        for i, j in blocks:
            logits = memory[: (j - i) * V_slice].view(j - i, V_slice)
            torch.mm(hidden[i:j], columns.T, out=logits)
            _C.cross_entropy_fwd(
                logits.data_ptr(), V_slice, 0, targets.data_ptr() + 8 * i, ignore_index, j - i, V_slice, first, V,
                label_smoothing, state.data_ptr() + 16 * i, 0, 0, 0,
            )  # fmt: skip
    _C.cross_entropy_fwd(
        0, 0, 0, targets.data_ptr(), ignore_index, R, 0, V, V, label_smoothing, state.data_ptr(), address(denominator),
        lse.data_ptr(), loss.data_ptr(),
    )  # fmt: skip
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
    R, V = hidden.shape[0], vocab or weight.shape[0]
    dhidden, dweight = outputs.gradients("linear_cross_entropy", (hidden, weight), needs[:2], out and out[:2])
    if dhidden is None and dweight is None:
        return None, None, None, None
    row_lse("linear_cross_entropy", "cpp", lse, R, CPU)
    targets = classes("cpp", targets, CPU)
    upstream, divisor = _number(dloss, "dloss"), _number(denominator, "denominator")
    slices, blocks = _slices(R, V), _blocks(R)
    if divisor is None and len(blocks) > 1:
        divisor = (targets != ignore_index).sum().clamp_(min=1).float()
    wide = hidden.float()
    # In 16 bits each sum over slices would round again.
    dwide = dhidden if dhidden is None or dhidden.dtype == torch.float32 else torch.empty_like(wide)
    memory = torch.empty(min(R, _ROWS) * slices[0][1], dtype=torch.float32)
    for first, last in slices:
        V_slice = last - first
        columns = weight[first:last].float()
        dcolumns = None
        if dweight is not None:
            dcolumns = dweight[first:last] if dweight.dtype == torch.float32 else torch.empty_like(columns)
        for i, j in blocks:
            logits = memory[: (j - i) * V_slice].view(j - i, V_slice)
            torch.mm(wide[i:j], columns.T, out=logits)
            _C.cross_entropy_bwd(
                logits.data_ptr(), V_slice, 0, targets.data_ptr() + 8 * i, ignore_index, lse.data_ptr() + 4 * i,
                address(upstream), address(divisor), logits.data_ptr(), V_slice, j - i, V_slice, V_slice, first, V,
                label_smoothing,
            )  # fmt: skip
            if dwide is not None:
                _add_product(dwide[i:j], logits, columns, fresh=first == 0)
            if dcolumns is not None:
                _add_product(dcolumns, logits.T, wide[i:j], fresh=i == 0)
        if dweight is not None and dcolumns is not None and dweight.dtype != torch.float32:
            dweight[first:last] = dcolumns
    if dweight is not None:
        dweight[V if R else 0 :].zero_()
    if dhidden is not None and dwide is not None and dhidden is not dwide:
        dhidden.copy_(dwide)
    return dhidden, dweight, None, None


def _add_product(target: Tensor, a: Tensor, b: Tensor, *, fresh: bool) -> None:
    if fresh:
        torch.mm(a, b, out=target)
    else:
        target.addmm_(a, b)


for _name, _fwd, _bwd, _dims in (
    ("cross_entropy", cross_entropy_fwd, cross_entropy_bwd, {"V": (1, 1 << 31)}),
    (
        "linear_cross_entropy",
        linear_cross_entropy_fwd,
        linear_cross_entropy_bwd,
        {"C": (1, 1 << 24), "V": (1, 1 << 31)},
    ),
):
    register(Impl(_name, "cpp", fwd=_fwd, bwd=_bwd, devices=("cpu",), dtypes=FLOATS, dims=_dims))
