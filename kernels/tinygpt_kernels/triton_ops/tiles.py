"""Which tile each attention kernel works on, per architecture, width and dtype, and why.

Chosen from compiled code (bfloat16, Triton 3.9), not yet from timings on a GPU: `tinygpt gpu-report` prints the figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .common import INTERPRETING, next_power_of_2


@dataclass(frozen=True)
class Tile:
    """BLOCK_T queries by BLOCK_S keys; tma: load by tensor descriptors, where the tensors allow it."""

    BLOCK_T: int
    BLOCK_S: int
    num_warps: int
    num_stages: int
    tma: bool = False

    def options(self, D: int) -> dict[str, int]:
        """What a launch takes."""
        return {"BLOCK_D": block_d(D), "BLOCK_T": self.BLOCK_T, "BLOCK_S": self.BLOCK_S, "num_warps": self.num_warps,
                "num_stages": self.num_stages}  # fmt: skip


# (kernel, architecture, bytes per element): tile by BLOCK_D
TILES: dict[tuple[str, int, int], dict[int, Tile]] = {
    ("attention_fwd", 80, 2): {64: Tile(128, 128, 8, 3), 128: Tile(128, 64, 8, 3)},
    ("attention_bwd_dq", 80, 2): {64: Tile(128, 64, 8, 2), 128: Tile(64, 64, 4, 2)},
    ("attention_bwd_dkdv", 80, 2): {64: Tile(32, 128, 4, 2), 128: Tile(32, 64, 4, 2)},
    ("attention_fwd", 90, 2): {64: Tile(128, 128, 8, 3, True), 128: Tile(128, 128, 8, 2, True)},
    ("attention_bwd_dq", 90, 2): {64: Tile(64, 128, 4, 2, True), 128: Tile(128, 128, 8, 2, True)},
    ("attention_bwd_dkdv", 90, 2): {64: Tile(64, 64, 4, 2, True), 128: Tile(32, 128, 8, 2, True)},
}

# The interpreter's cost is per program and operation, whatever the size.
INTERPRETED = Tile(128, 128, 4, 1)


def choose(kernel: str, device: torch.device, dtype: torch.dtype, D: int, T: int) -> Tile:
    """The tile for T queries a row on this device."""
    if INTERPRETING:
        return INTERPRETED
    return shipped(kernel, architecture(device), dtype.itemsize, D)


def shipped(kernel: str, arch: int, itemsize: int, D: int) -> Tile:
    """The tile of the tables."""
    table = TILES.get((kernel, arch, itemsize)) or TILES[kernel, 80, itemsize]
    return table[min(width for width in table if width >= block_d(D))]


@lru_cache
def architecture(device: torch.device) -> int:
    """The row of the tables: 90 for Hopper, 80 for everything else."""
    if torch.version.cuda is None:
        return 80
    return 90 if torch.cuda.get_device_capability(device)[0] == 9 else 80


def block_d(D: int) -> int:
    """Head dims are padded to a power of two, at least what a tensor core multiplies."""
    return max(16, next_power_of_2(D))


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as torch.backends.cuda.matmul.fp32_precision says."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can stand for x [B, rows, heads, D]: 16-byte steps, and a D that is not padded."""
    size = x.element_size()
    return (
        x.data_ptr() % 16 == 0 and all(s * size % 16 == 0 and s > 0 for s in x.stride()[:3]) and x.shape[3] == block_d(x.shape[3])
    )


def described(x: Tensor, tma: bool, rows: int) -> object:
    """x as a kernel takes it: a descriptor of tiles of `rows` rows of one head, or x itself."""
    if not tma:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, x.shape[3]])
