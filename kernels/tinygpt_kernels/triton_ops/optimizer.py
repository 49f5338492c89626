"""AdamW and gradient clipping in Triton, all tensors in one launch (Loshchilov, Hutter 2019, algorithm 2).

A model has a hundred small tensors, and a launch costs as much as updating half a million numbers. So a table on the device
lists every tensor's addresses and sizes, and a program finds its tensor and its piece there. The table is made once per set of
addresses: PyTorch's allocator hands a step's gradients the same ones again.

Clipping sums squares per program, adds the parts in a fixed order in one program, and scales; where nothing is to be scaled, the
last kernel returns without touching memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import lists
from ..lists import AdamW, Checked
from .common import FUSION, INTERPRETING, on_device

BLOCK = 65536 if INTERPRETING else 2048
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float64: tl.float64}
_TABLES_KEPT = 16
_tables: OrderedDict[tuple[object, ...], tuple[Tensor, bool, int]] = OrderedDict()


@triton.jit
def _at(table_ptr, row, programs, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The tensor that row `row` of the table points this program to."""
    pointer = tl.load(table_ptr + row * programs + tl.program_id(0)).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _piece(table_ptr, row, programs, BLOCK: tl.constexpr):
    """This program's piece of its tensor: the first element, and how many there are, from two rows of the table."""
    first = tl.load(table_ptr + row * programs + tl.program_id(0))
    return tl.multiple_of(first, BLOCK), tl.load(table_ptr + (row + 1) * programs + tl.program_id(0)) - first


@triton.jit
def _adamw(
    p_ptr, g_ptr, m_ptr, v_ptr, left, lr, beta1, beta2, eps, decay, grad_scale, correction1, correction2,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    inside = None if WHOLE else at < left
    g = tl.load(g_ptr + at, mask=inside).to(tl.float32) * grad_scale
    m = tl.load(m_ptr + at, mask=inside).to(tl.float32)
    v = tl.load(v_ptr + at, mask=inside).to(tl.float32)
    p = tl.load(p_ptr + at, mask=inside).to(tl.float32)
    m = beta1 * m + (1.0 - beta1) * g
    v = beta2 * v + (1.0 - beta2) * g * g
    step = (m / correction1) / (tl.sqrt(v / correction2) + eps)
    tl.store(m_ptr + at, m, mask=inside)
    tl.store(v_ptr + at, v, mask=inside)
    tl.store(p_ptr + at, p - lr * (decay * p + step), mask=inside)


@triton.jit(do_not_specialize=["programs"])
def _adamw_kernel(
    table_ptr,  # [6, programs] int64: parameter, gradient, exp_avg, exp_avg_sq, first element, elements
    programs,
    lr, beta1, beta2, eps, decay, grad_scale, correction1, correction2,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    first, left = _piece(table_ptr, 4, programs, BLOCK)
    p_ptr = _at(table_ptr, 0, programs, PARAM, ALIGNED) + first
    g_ptr = _at(table_ptr, 1, programs, GRAD, ALIGNED) + first
    m_ptr = _at(table_ptr, 2, programs, MOMENT, ALIGNED) + first
    v_ptr = _at(table_ptr, 3, programs, MOMENT, ALIGNED) + first
    if left >= BLOCK:  # a mask of any size would make every access 32 bits wide
        _adamw(
            p_ptr,
            g_ptr,
            m_ptr,
            v_ptr,
            left,
            lr,
            beta1,
            beta2,
            eps,
            decay,
            grad_scale,
            correction1,
            correction2,
            True,
            BLOCK,
        )
    else:
        _adamw(
            p_ptr,
            g_ptr,
            m_ptr,
            v_ptr,
            left,
            lr,
            beta1,
            beta2,
            eps,
            decay,
            grad_scale,
            correction1,
            correction2,
            False,
            BLOCK,
        )


@triton.jit(do_not_specialize=["programs"])
def _square_sum_kernel(
    table_ptr,  # [3, programs] int64: gradient, first element, elements
    part_ptr,  # [programs] float32
    programs,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first, left = _piece(table_ptr, 1, programs, BLOCK)
    g_ptr = _at(table_ptr, 0, programs, GRAD, ALIGNED) + first + tl.arange(0, BLOCK)
    if left >= BLOCK:
        g = tl.load(g_ptr).to(tl.float32)
    else:
        g = tl.load(g_ptr, mask=tl.arange(0, BLOCK) < left, other=0.0).to(tl.float32)
    tl.store(part_ptr + tl.program_id(0), tl.sum(g * g, 0))


@triton.jit(do_not_specialize=["parts"])
def _norm_kernel(
    part_ptr,  # [parts] float32
    norm_ptr,  # [1] float32
    factor_ptr,  # [1] float32: what gradients are multiplied by
    parts,
    max_norm,
    BLOCK: tl.constexpr,
):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, parts, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(part_ptr + at, mask=at < parts, other=0.0)
    norm = tl.sqrt(tl.sum(total, 0))
    factor = max_norm / (norm + 1e-6)
    tl.store(norm_ptr, norm)
    tl.store(factor_ptr, tl.where(factor < 1.0, factor, tl.where(factor >= 1.0, 1.0, factor)))  # NaN stays NaN


@triton.jit(do_not_specialize=["programs"])
def _scale_kernel(
    table_ptr,  # as in _square_sum_kernel
    factor_ptr,  # [1] float32
    programs,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        first, left = _piece(table_ptr, 1, programs, BLOCK)
        g_ptr = _at(table_ptr, 0, programs, GRAD, ALIGNED) + first + tl.arange(0, BLOCK)
        if left >= BLOCK:
            tl.store(g_ptr, tl.load(g_ptr).to(tl.float32) * factor)
        else:
            inside = tl.arange(0, BLOCK) < left
            tl.store(g_ptr, tl.load(g_ptr, mask=inside).to(tl.float32) * factor, mask=inside)


def _table(lists: Sequence[Sequence[Tensor]]) -> tuple[Tensor, bool, int]:
    """(table, whether all addresses are 16-byte aligned, programs) for lists of tensors alike in length and sizes."""
    pointers = tuple(tuple(t.data_ptr() for t in tensors) for tensors in lists)
    sizes = tuple(t.numel() for t in lists[0])
    device = lists[0][0].device
    key = (device, pointers, sizes)
    if key in _tables:
        _tables.move_to_end(key)
        return _tables[key]
    pieces = [(i, first) for i, size in enumerate(sizes) for first in range(0, size, BLOCK)]
    rows = [[column[i] for i, _ in pieces] for column in pointers]
    rows += [[first for _, first in pieces], [sizes[i] for i, _ in pieces]]
    aligned = all(p % 16 == 0 for column in pointers for p in column)
    found = torch.tensor(rows, dtype=torch.int64, device=device), aligned, len(pieces)
    _tables[key] = found
    if len(_tables) > _TABLES_KEPT:
        _tables.popitem(last=False)
    return found


def _groups(*lists: Sequence[Tensor]) -> list[list[list[Tensor]]]:
    """The lists split so that within a part all tensors of a list have one dtype."""
    found: dict[tuple[torch.dtype, ...], list[list[Tensor]]] = {}
    for row in zip(*lists, strict=True):
        if row[0].numel():
            for column, tensor in zip(
                found.setdefault(tuple(t.dtype for t in row), [[] for _ in row]), row, strict=True
            ):
                column.append(tensor)
    return list(found.values())


def _adamw_step(checked: Checked, numbers: AdamW) -> None:
    step, _, betas, *_ = numbers
    for group in _groups(*checked.lists):
        table, aligned, programs = _table(group)
        with on_device(table):
            _adamw_kernel[(programs,)](
                table, programs, *numbers.flat[1:], 1 - betas[0] ** step, 1 - betas[1] ** step,
                PARAM=_DTYPES[group[0][0].dtype], GRAD=_DTYPES[group[1][0].dtype], MOMENT=_DTYPES[group[2][0].dtype],
                ALIGNED=aligned, BLOCK=BLOCK, num_warps=4, **FUSION,
            )  # fmt: skip


def _clip(checked: Checked, max_norm: float) -> Tensor:
    grads = checked.lists[0]
    norm, factor = (torch.empty((), dtype=torch.float32, device=grads[0].device) for _ in range(2))
    tables = [(*_table(group), _DTYPES[group[0][0].dtype]) for group in _groups(grads)]
    parts = torch.empty(sum(programs for _, _, programs, _ in tables), dtype=torch.float32, device=norm.device)
    with on_device(grads[0]):
        done = 0
        for table, aligned, programs, dtype in tables:
            _square_sum_kernel[(programs,)](
                table, parts[done:], programs, GRAD=dtype, ALIGNED=aligned, BLOCK=BLOCK, num_warps=4, **FUSION
            )
            done += programs
        _norm_kernel[(1,)](parts, norm, factor, done, max_norm, BLOCK=1024, num_warps=4, **FUSION)
        for table, aligned, programs, dtype in tables:
            _scale_kernel[(programs,)](
                table, factor, programs, GRAD=dtype, ALIGNED=aligned, BLOCK=BLOCK, num_warps=4, **FUSION
            )
    return norm


adamw_, clip_grad_norm_ = lists.register(
    "triton",
    _adamw_step,
    _clip,
    devices=("cuda", "cpu"),
    dtypes=(torch.float32, torch.float16, torch.bfloat16),
    min_sm=80,
)
