"""What every kernel's launcher needs: rows of a tensor, the device a launch goes to, the number of programs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interpreter import interpreting

INTERPRETING = interpreting()  # fixed when the kernels are defined, which is now
FUSION = {
    "enable_fp_fusion": True
}  # multiply-add as one instruction: Triton's default, about to change, asked for at every launch
Buffers = tuple[Tensor | None, ...]  # a gradient per tensor argument of an op, None where nobody wants one


def rows(x: Tensor) -> Tensor:
    """`x` as [R, C] with contiguous rows: a view where the strides allow, a copy elsewhere."""
    C = x.shape[-1]
    flat = x if x.dim() == 2 else x.reshape(x.numel() // C, C)
    return flat if flat.stride(1) == 1 and flat.stride(0) >= 0 else flat.contiguous()


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Make x's GPU current: Triton launches on the current device's current stream, whatever its arguments."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


pretended: int | str | None = None  # the target whose choices are wanted on a machine that has no such GPU


def architecture(device: torch.device) -> int | str:
    """Compute capability times ten of an NVIDIA GPU, AMD's name of one of theirs."""
    return _architecture(device) if pretended is None else pretended


@lru_cache
def _architecture(device: torch.device) -> int | str:
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 in the interpreter, where programs run one after another."""
    if INTERPRETING:
        return 1
    return _processors(device) if pretended is None else 108


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


@triton.jit
def _sum_parts_kernel(
    part_ptr,  # [P, C] float32
    out_ptr,  # [C]
    P,
    C,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(0, P, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < P)[:, None] & (col < C)[None, :]
        total += tl.sum(
            tl.load(part_ptr + row.to(tl.int64)[:, None] * C + col[None, :], mask=inside, other=0.0), axis=0
        )
    tl.store(out_ptr + col, total, mask=col < C)


def sum_parts(parts: Tensor, out: Tensor) -> None:
    """out [C] = sum over the first dimension of parts [P, C], float32, in a fixed order. The caller has made the device current."""
    P, C = parts.shape
    BLOCK_C = next_power_of_2(C) if INTERPRETING else 128  # the interpreter's time is per operation, whatever its size
    _sum_parts_kernel[(triton.cdiv(C, BLOCK_C),)](parts, out, P, C, ROWS=32, BLOCK_C=BLOCK_C, num_warps=4, **FUSION)
