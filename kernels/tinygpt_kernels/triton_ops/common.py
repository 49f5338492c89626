"""What every kernel's launcher needs: rows of a tensor, the device a launch goes to, the number of programs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from ..interpreter import interpreting

INTERPRETING = interpreting()  # fixed when the kernels are defined, which is now


def rows(x: Tensor) -> Tensor:
    """`x` as [R, C] with contiguous rows: a view where the strides allow, a copy elsewhere."""
    C = x.shape[-1]
    flat = x if x.dim() == 2 else x.reshape(x.numel() // C, C)
    return flat if flat.stride(1) == 1 and flat.stride(0) >= 0 else flat.contiguous()


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Make x's GPU current: Triton launches on the current device's current stream, whatever its arguments."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


@lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 in the interpreter, where programs run one after another."""
    if INTERPRETING:
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
