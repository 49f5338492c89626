"""Cross-entropy in Triton, on logits in memory and, row block by row block, on logits that never all are.

# R rows, V columns of memory, `vocab` of them real, C channels

Forward: one pass over a row with a running maximum and a running sum (Milakov, Gimelshein 2018) gives its lse and its loss; a
second kernel adds the losses in a fixed order and divides. Backward: one pass writes (softmax - target) * factor from the lse.

**The aligned way into a row.** With V = 50257 in bfloat16 every row but the first begins off a 16-byte boundary, and a kernel
that takes a row as it lies loads two bytes at a time. But the boundaries are there: between the first and the last one inside a row
lie whole groups of 16 bytes, which move in 128-bit pieces; what is left are two edges of fewer than GROUP elements, read as one
narrow tile of 2 * GROUP. Rows that are aligned (EDGES false) have none.

linear_cross_entropy multiplies with PyTorch's matmul, a block of rows at a time, into one reused buffer of logits, forward and
again backward; the gradient is written over them. Its memory is that buffer, about as large as `hidden`.

Left out: keeping the gradient in the forward (it would need R x C + V x C more memory between the passes).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import Impl, register
from .common import FUSION, INTERPRETING, Buffers, next_power_of_2, on_device

MAX_V = 1 << 18
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _span(row, live, stride, width, GROUP: tl.constexpr, EDGES: tl.constexpr):
    """Where rows begin in memory, in elements [ROWS] int64, and their whole groups in columns: low .. high, int32."""
    begin = row.to(tl.int64) * stride
    low, high = tl.zeros_like(row), tl.where(live, width, 0)
    if EDGES:
        ahead = ((GROUP - begin % GROUP) % GROUP).to(tl.int32)
        low = tl.minimum(ahead, width)
        high = tl.where(live, low + (width - low) // GROUP * GROUP, low)
    return begin, low, high


@triton.jit
def _groups(begin, low, high, start, GROUP: tl.constexpr, EDGES: tl.constexpr, BLOCK: tl.constexpr):
    """Columns [ROWS, BLOCK], their places in memory, and which exist: whole groups of aligned elements, each all or none."""
    lane = start + tl.arange(0, BLOCK)
    base = begin + low
    if EDGES:
        base = tl.multiple_of(base, GROUP)
    inside = lane[None, :] < tl.multiple_of(high - low, GROUP)[:, None]
    return lane[None, :] + low[:, None], base[:, None] + lane[None, :], inside


@triton.jit
def _edges(begin, low, high, live, width, GROUP: tl.constexpr):
    """The columns outside of the whole groups, [ROWS, 2 * GROUP], their places, and which exist."""
    lane = tl.arange(0, 2 * GROUP)[None, :]
    column = tl.where(lane < GROUP, lane, high[:, None] + (lane - GROUP))
    inside = live[:, None] & (column < tl.where(lane < GROUP, low[:, None], width))
    return column, begin[:, None] + column, inside


@triton.jit
def _accumulate(top, total, plain, z, inside, SMOOTHED: tl.constexpr, WIDE: tl.constexpr):
    """Running maximum, sum of exponentials and sum of z [ROWS, N], one each per group of z [ROWS, N, GROUP].

    WIDE: float32 logits. A multiply-add in place of the difference saves an instruction, but of the largest logit itself it leaves
    what rounding `shift * log2(e)` lost, 1e-5 at logits of 200; in two bytes nobody sees that. (The interpreter has no multiply-add:
    only a GPU showed it.)
    """
    new = tl.maximum(top, tl.max(z, 2))
    shift = tl.where(new == float("-inf"), 0.0, new)
    if WIDE:
        e = tl.exp2((z - shift[:, :, None]) * _LOG2E)
    else:
        e = tl.exp2(z * _LOG2E - (shift * _LOG2E)[:, :, None])
    total = total * tl.exp2((top - shift) * _LOG2E) + tl.sum(e, 2)
    if SMOOTHED:
        plain += tl.sum(tl.where(inside, z, 0.0), 2)
    return new, total, plain


@triton.jit
def _accumulate_edges(top, total, plain, logits_ptr, begin, low, high, live, vocab, GROUP: tl.constexpr):
    """The same of what lies outside of the whole groups, into the first column of what is still empty."""
    _column, place, inside = _edges(begin, low, high, live, vocab, GROUP)
    z = tl.load(logits_ptr + place, mask=inside, other=float("-inf")).to(tl.float32)
    highest = tl.max(z, 1)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    first = (tl.arange(0, top.shape[1]) == 0)[None, :]
    top = tl.where(first, highest[:, None], top)
    total = tl.where(first, tl.sum(tl.exp2((z - shift[:, None]) * _LOG2E), 1)[:, None], total)
    return top, total, tl.where(first, tl.sum(tl.where(inside, z, 0.0), 1)[:, None], plain)


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_fwd_kernel(
    logits_ptr,  # [R, V], rows stride_lr apart
    targets_ptr,  # [R]
    loss_ptr,  # [R] float32, 0 where a target does not count
    lse_ptr,  # [R] float32
    stride_lr,
    R,
    vocab,
    ignore_index,
    smoothing,
    SMOOTHED: tl.constexpr,
    EDGES: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < R
    target = tl.load(targets_ptr + row, mask=live, other=0)
    counted = live & (target != ignore_index)
    known = (target >= 0) & (target < vocab)
    begin, low, high = _span(row, live, stride_lr, vocab, GROUP, EDGES)
    chosen = tl.load(logits_ptr + begin + target, mask=counted & known, other=0.0).to(tl.float32)
    N: tl.constexpr = BLOCK_V // GROUP
    top = tl.full([ROWS, N], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, N], tl.float32)
    plain = tl.zeros([ROWS, N], tl.float32)
    if EDGES:
        top, total, plain = _accumulate_edges(top, total, plain, logits_ptr, begin, low, high, live, vocab, GROUP)
    for start in range(0, tl.max(high - low, 0), BLOCK_V):
        _column, place, inside = _groups(begin, low, high, start, GROUP, EDGES, BLOCK_V)
        z = tl.load(logits_ptr + place, mask=inside, other=float("-inf")).to(tl.float32)
        shape: tl.constexpr = [ROWS, N, GROUP]
        top, total, plain = _accumulate(
            top, total, plain, tl.reshape(z, shape), tl.reshape(inside, shape), SMOOTHED, GROUP == 4
        )
    highest = tl.max(top, 1)
    scaled = total * tl.exp2((top - tl.where(live, highest, 0.0)[:, None]) * _LOG2E)
    lse = highest + tl.log2(tl.where(live, tl.sum(scaled, 1), 1.0)) * _LN2
    loss = lse - (1.0 - smoothing) * chosen
    if SMOOTHED:
        loss -= smoothing * tl.sum(plain, 1) / vocab
    loss = tl.where(known, loss, float("nan"))  # a target that is no column: nobody may overlook that
    tl.store(loss_ptr + row, tl.where(counted, loss, 0.0), mask=live)
    tl.store(lse_ptr + row, lse, mask=live)


@triton.jit(do_not_specialize=["ignore_index"])
def _mean_kernel(
    value_ptr,  # [R] float32 summed, or one number, where PER_ROW is false
    targets_ptr,  # [R]
    denominator_ptr,  # [1] or unused
    out_ptr,  # [1] float32
    R,
    ignore_index,
    HAS_DENOMINATOR: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the sum over rows (or the number) divided by the denominator, or by the number of targets that count."""
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, R, BLOCK):
        row = start + tl.arange(0, BLOCK)
        if PER_ROW:
            total += tl.load(value_ptr + row, mask=row < R, other=0.0)
        if not HAS_DENOMINATOR:
            target = tl.load(targets_ptr + row, mask=row < R, other=ignore_index)
            count += (target != ignore_index).to(tl.int32)
    value = tl.sum(total, 0) if PER_ROW else tl.load(value_ptr).to(tl.float32)
    if HAS_DENOMINATOR:
        value = value / tl.load(denominator_ptr).to(tl.float32)
    else:
        value = value / tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    tl.store(out_ptr, value)


@triton.jit
def _gradient(z, lse, factor, column, target, vocab, smoothing, floor, SMOOTHED: tl.constexpr, PADDED: tl.constexpr):
    p = tl.exp2((z - lse[:, None]) * _LOG2E)  # scaling before the difference would cost a digit at large logits
    if SMOOTHED:
        p -= floor
    g = (p - tl.where(column == target[:, None], 1.0 - smoothing, 0.0)) * factor[:, None]
    if PADDED:
        g = tl.where(column < vocab, g, 0.0)
    return g


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_bwd_kernel(
    logits_ptr,  # [R, V], rows stride_lr apart
    targets_ptr,  # [R]
    lse_ptr,  # [R] float32
    factor_ptr,  # [1] float32: upstream gradient / denominator
    dlogits_ptr,  # [R, V], rows V apart; may be the logits themselves
    stride_lr,
    R,
    V,
    vocab,
    ignore_index,
    smoothing,
    SMOOTHED: tl.constexpr,
    PADDED: tl.constexpr,
    SAME: tl.constexpr,
    EDGES: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < R
    target = tl.load(targets_ptr + row, mask=live, other=0)
    lse = tl.load(lse_ptr + row, mask=live, other=0.0)
    factor = tl.where(live & (target != ignore_index), tl.load(factor_ptr), 0.0)
    target = target.to(tl.int32)
    floor = smoothing / vocab
    begin, low, high = _span(row, live, V, V, GROUP, EDGES)
    shift = row.to(tl.int64) * (stride_lr - V)  # from a place in dlogits to the same in logits
    for start in range(0, tl.max(high - low, 0), BLOCK_V):
        column, place, inside = _groups(begin, low, high, start, GROUP, EDGES, BLOCK_V)
        source = place if SAME else place + shift[:, None]
        z = tl.load(logits_ptr + source, mask=inside, other=0.0).to(tl.float32)
        g = _gradient(z, lse, factor, column, target, vocab, smoothing, floor, SMOOTHED, PADDED)
        tl.store(dlogits_ptr + place, g, mask=inside)
    if EDGES:
        column, place, inside = _edges(begin, low, high, live, V, GROUP)
        source = place if SAME else place + shift[:, None]
        z = tl.load(logits_ptr + source, mask=inside, other=0.0).to(tl.float32)
        g = _gradient(z, lse, factor, column, target, vocab, smoothing, floor, SMOOTHED, PADDED)
        tl.store(dlogits_ptr + place, g, mask=inside)


def tile(R: int, V: int) -> tuple[int, int, int]:
    """(ROWS, BLOCK_V, num_warps): 16 elements a thread, two 128-bit pieces of bfloat16."""
    BLOCK_V = min(max(16, next_power_of_2(V)), 65536 if INTERPRETING else 4096)
    ROWS = max(1, min((262144 if INTERPRETING else 2048) // BLOCK_V, next_power_of_2(R)))
    return ROWS, BLOCK_V, max(1, min(8, ROWS * BLOCK_V // 512))


def _losses(
    logits: Tensor, targets: Tensor, vocab: int, ignore_index: int, smoothing: float, loss_R: Tensor, lse_R: Tensor
) -> None:
    R = logits.shape[0]
    ROWS, BLOCK_V, num_warps = tile(R, vocab)
    GROUP = 16 // logits.element_size()
    _cross_entropy_fwd_kernel[(triton.cdiv(R, ROWS),)](
        logits, targets, loss_R, lse_R, logits.stride(0), R, vocab, ignore_index, smoothing, SMOOTHED=smoothing > 0,
        EDGES=logits.stride(0) % GROUP > 0 or vocab % GROUP > 0, GROUP=GROUP, ROWS=ROWS, BLOCK_V=BLOCK_V, num_warps=num_warps, **FUSION,
    )  # fmt: skip


def _mean(value: Tensor, targets: Tensor, denominator: Tensor | None, ignore_index: int, out: Tensor) -> None:
    per_row = value.dim() == 1
    _mean_kernel[(1,)](
        value, targets, denominator, out, targets.numel(), ignore_index,
        HAS_DENOMINATOR=denominator is not None, PER_ROW=per_row, BLOCK=1024, num_warps=4, **FUSION,
    )  # fmt: skip


def _gradients(
    logits: Tensor,
    targets: Tensor,
    lse_R: Tensor,
    factor: Tensor,
    dlogits: Tensor,
    vocab: int,
    ignore_index: int,
    smoothing: float,
) -> None:
    R, V = logits.shape
    ROWS, BLOCK_V, num_warps = tile(R, V)
    GROUP = 16 // logits.element_size()
    _cross_entropy_bwd_kernel[(triton.cdiv(R, ROWS),)](
        logits, targets, lse_R, factor, dlogits, logits.stride(0), R, V, vocab, ignore_index, smoothing,
        SMOOTHED=smoothing > 0, PADDED=vocab < V, SAME=logits.stride(0) == V, EDGES=V % GROUP > 0, GROUP=GROUP,
        ROWS=ROWS, BLOCK_V=BLOCK_V, num_warps=num_warps, **FUSION,
    )  # fmt: skip


def _outputs(R: int, device: torch.device, out: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    if out is not None:
        return out
    return torch.empty((), dtype=torch.float32, device=device), torch.empty(R, dtype=torch.float32, device=device)


def cross_entropy_fwd(
    logits: Tensor, targets: Tensor, denominator: Tensor | None, ignore_index: int, label_smoothing: float, vocab: int | None, *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Forward of ops.cross_entropy; see there. `out`: (loss, lse [R])."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    targets = targets.contiguous()
    R, V = logits.shape
    loss, lse_R = _outputs(R, logits.device, out)
    loss_R = torch.empty(R, dtype=torch.float32, device=logits.device)
    with on_device(logits):
        if R:
            _losses(logits, targets, vocab or V, ignore_index, label_smoothing, loss_R, lse_R)
        _mean(loss_R, targets, denominator, ignore_index, loss)
    return loss, lse_R


def cross_entropy_bwd(
    dloss: Tensor, logits: Tensor, targets: Tensor, denominator: Tensor | None, lse: Tensor,
    ignore_index: int, label_smoothing: float, vocab: int | None, *,
    needs: tuple[bool, ...] = (True, False, False), out: Buffers | None = None,
) -> Buffers:  # fmt: skip
    """Backward of ops.cross_entropy: (dlogits, None, None)."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    targets = targets.contiguous()
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out[0]
    if logits.numel() and dlogits is not None:
        factor = torch.empty(1, dtype=torch.float32, device=logits.device)
        with on_device(logits):
            _mean(dloss.reshape(()), targets, denominator, ignore_index, factor)
            _gradients(logits, targets, lse, factor, dlogits, vocab or logits.shape[1], ignore_index, label_smoothing)
    return dlogits, None, None


def block_rows(R: int, C: int, V: int) -> int:
    """Rows of logits held at a time: as many as make the block as large as `hidden`, a power of two, at least 64."""
    return min(R, max(64, next_power_of_2(triton.cdiv(R * C, V))))


def linear_cross_entropy_fwd(
    hidden: Tensor, weight: Tensor, targets: Tensor, denominator: Tensor | None,
    ignore_index: int, label_smoothing: float, vocab: int | None, *, out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Forward of ops.linear_cross_entropy; see there. `out`: (loss, lse [R])."""
    (R, C), V = hidden.shape, weight.shape[0]
    targets = targets.contiguous()
    loss, lse_R = _outputs(R, hidden.device, out)
    loss_R = torch.empty(R, dtype=torch.float32, device=hidden.device)
    rows = block_rows(R, C, V)
    buffer = torch.empty(rows, V, dtype=hidden.dtype, device=hidden.device)
    with on_device(hidden):
        for i in range(0, R, max(rows, 1)):
            block = slice(i, min(i + rows, R))
            logits = torch.mm(hidden[block], weight.T, out=buffer[: block.stop - i])
            _losses(logits, targets[block], vocab or V, ignore_index, label_smoothing, loss_R[block], lse_R[block])
        _mean(loss_R, targets, denominator, ignore_index, loss)
    return loss, lse_R


def linear_cross_entropy_bwd(
    dloss: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, denominator: Tensor | None, lse: Tensor,
    ignore_index: int, label_smoothing: float, vocab: int | None, *,
    needs: tuple[bool, ...] = (True, True, False, False), out: Buffers | None = None,
) -> Buffers:  # fmt: skip
    """Backward of ops.linear_cross_entropy: (dhidden, dweight, None, None)."""
    (R, C), V = hidden.shape, weight.shape[0]
    targets = targets.contiguous()
    if out is None:
        out = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
                    for x, need in zip((hidden, weight), needs[:2], strict=True))  # fmt: skip
    dhidden, dweight = out[:2]
    if not R:
        if dweight is not None:
            dweight.zero_()
        return dhidden, dweight, None, None
    rows = block_rows(R, C, V)
    buffer = torch.empty(rows, V, dtype=hidden.dtype, device=hidden.device)
    factor = torch.empty(1, dtype=torch.float32, device=hidden.device)
    # Blocks are added in float32: in 16 bits each sum would round again.
    total = (
        torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        if dweight is not None and rows < R
        else None
    )
    with on_device(hidden):
        _mean(dloss.reshape(()), targets, denominator, ignore_index, factor)
        for i in range(0, R, rows):
            block = slice(i, min(i + rows, R))
            logits = torch.mm(hidden[block], weight.T, out=buffer[: block.stop - i])
            _gradients(logits, targets[block], lse[block], factor, logits, vocab or V, ignore_index, label_smoothing)
            if dhidden is not None:
                torch.mm(logits, weight, out=dhidden[block])
            if total is not None:
                total += torch.mm(logits.T, hidden[block])
            elif dweight is not None:
                torch.mm(logits.T, hidden, out=dweight)
    if total is not None and dweight is not None:
        dweight.copy_(total)
    return dhidden, dweight, None, None


for _name, _fwd, _bwd in (
    ("cross_entropy", cross_entropy_fwd, cross_entropy_bwd),
    ("linear_cross_entropy", linear_cross_entropy_fwd, linear_cross_entropy_bwd),
):
    register(
        Impl(
            _name, "triton", fwd=_fwd, bwd=_bwd, devices=("cuda", "cpu"),
            dtypes=(torch.float32, torch.float16, torch.bfloat16), dims={"V": (1, MAX_V)}, min_sm=80,
        )
    )  # fmt: skip
