"""Which tile each attention kernel works on, per architecture, width and dtype, and why.

Chosen from compiled code (bfloat16, Triton 3.9), not yet from timings on a GPU: `tinygpt gpu-report` prints the figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from . import common
from .common import FUSION, INTERPRETING, architecture, next_power_of_2


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
        return {"TMA": self.tma, "BLOCK_D": block_d(D), "BLOCK_T": self.BLOCK_T, "BLOCK_S": self.BLOCK_S, "num_warps": self.num_warps,
                "num_stages": self.num_stages, **FUSION}  # fmt: skip


KERNELS = _FWD, _DQ, _DKDV = "attention_fwd", "attention_bwd_dq", "attention_bwd_dkdv"

# (kernel, row of architectures, bytes per element): tile by head dim, padded to a power of two. Beside each the non-MMA instructions
# per unit of its unmasked loop, and the registers, in bfloat16 and causal, Triton 3.9; spill is 0 everywhere. What was left:
# 128 x 64 at D = 64 spilled 28 to 40 bytes with 4 warps; 64 x 128 keys by queries at D = 128 spilled 32 to 88 on both machines.
TILES: dict[tuple[str, int, int], dict[int, Tile]] = {
    (_FWD, 80, 2): {
        32: Tile(128, 128, 8, 2),  # 6.2, 192
        64: Tile(128, 128, 8, 3),  # 3.91, 207
        128: Tile(128, 64, 8, 3),  # 3.12, 225
        256: Tile(64, 32, 8, 2),  # 4.81, 185; 64 keys need 104 KB, more than sm_86 and sm_89 have
    },
    (_DQ, 80, 2): {
        32: Tile(64, 64, 4, 2),  # 4.27, 168
        64: Tile(128, 64, 8, 2),  # 2.44, 186
        128: Tile(64, 64, 4, 2),  # 1.74, 255
        256: Tile(32, 32, 4, 2),  # 2.11, 177
    },
    (_DKDV, 80, 2): {
        32: Tile(32, 128, 4, 2),  # 3.84, 242
        64: Tile(32, 128, 4, 2),  # 2.35, 255
        128: Tile(32, 64, 4, 2),  # 2.12, 253
        256: Tile(32, 32, 8, 1),  # 2.51, 172
    },
    (_FWD, 90, 2): {
        32: Tile(64, 128, 4, 3, tma=True),  # 6.80, 168, three blocks an SM
        64: Tile(128, 128, 8, 3, tma=True),  # 3.62, 208
        128: Tile(128, 128, 8, 2, tma=True),  # 1.98, 231; without descriptors 2.21 and a spill of 24
        256: Tile(128, 64, 8, 2, tma=True),  # 1.73, 243
    },
    (_DQ, 90, 2): {
        32: Tile(64, 128, 4, 2, tma=True),  # 4.09, 178
        64: Tile(64, 128, 4, 2, tma=True),  # 2.13, 223
        128: Tile(128, 128, 8, 2, tma=True),  # 1.16, 250
        256: Tile(32, 32, 4, 2),
    },
    (_DKDV, 90, 2): {
        32: Tile(64, 64, 4, 2, tma=True),  # 4.53, 169
        64: Tile(64, 64, 4, 2, tma=True),  # 2.31, 212
        128: Tile(32, 128, 8, 2, tma=True),  # 1.96, 218
        256: Tile(32, 32, 8, 1),
    },
    # float32 without tensor cores: a thread holds whole rows of both factors, so tiles are small.
    (_FWD, 80, 4): {64: Tile(32, 32, 4, 2), 128: Tile(32, 16, 4, 2), 256: Tile(16, 16, 8, 1)},
    (_DQ, 80, 4): {64: Tile(32, 32, 4, 2), 128: Tile(32, 16, 4, 2), 256: Tile(16, 16, 8, 2)},
    (_DKDV, 80, 4): {
        32: Tile(32, 32, 4, 2),
        64: Tile(16, 32, 4, 1),  # 32 queries spilled 1072 bytes on sm_90
        128: Tile(16, 32, 4, 1),
        256: Tile(16, 16, 8, 1),
    },
}  # fmt: skip

# Rows of at most 64 queries, a character model's context: a tile of 128 would compute one half for nothing.
SHORT: dict[str, Tile] = {_FWD: Tile(64, 64, 4, 2), _DQ: Tile(64, 64, 4, 2), _DKDV: Tile(32, 64, 4, 2)}

# What needs registers of its own: dropout's random numbers, per-row lengths, a padded head dim, pointers in place of descriptors
# on sm_90. With the tiles above, such calls spilled 4 to 668 bytes; with these none does.
TIGHT: dict[str, dict[int, Tile]] = {
    _FWD: {64: Tile(128, 64, 8, 2), 128: Tile(64, 64, 4, 2)},
    _DQ: {64: Tile(128, 32, 8, 2), 128: Tile(64, 32, 4, 2)},
    _DKDV: {64: Tile(32, 64, 8, 2), 128: Tile(32, 64, 8, 2)},
}

# The interpreter's cost is per program and operation, whatever the size.
INTERPRETED = Tile(128, 128, 4, 1)

_forced: dict[str, Tile] = {}


def choose(kernel: str, x: Tensor, T: int, *, plain: bool) -> Tile:
    """The tile of a kernel for tensors like x [B, rows, heads, D] and T queries a row.

    Args:
        plain: there is neither dropout nor a length per row, and tensor descriptors can stand for the tensors.
    """
    if _forced:
        return _forced.get(kernel, INTERPRETED)
    if INTERPRETING:
        return INTERPRETED
    if plain and common.pretended is None:
        from .tuning import lookup

        if tile := lookup(kernel, x, T):
            return tile
    D, arch = x.shape[3], architecture(x.device)
    return shipped(kernel, arch, x.dtype.itemsize, D, T, plain)


@contextmanager
def forced(by_kernel: Mapping[str, Tile]) -> Iterator[None]:
    """Make `choose` give these tiles: to measure and to test them."""
    _forced.update(by_kernel)
    try:
        yield
    finally:
        _forced.clear()


@lru_cache(maxsize=1024)
def shipped(kernel: str, arch: int | str, itemsize: int, D: int, T: int, plain: bool = True) -> Tile:
    """The tile of the tables. arch: compute capability times ten, or AMD's name of a target."""
    width = block_d(D)
    row = 90 if itemsize == 2 and arch in (90, 100, 103) else 80
    if itemsize == 2 and width <= 128 and not plain:
        table = TIGHT[kernel]
    elif itemsize == 2 and T <= 64 and width <= 128:
        return SHORT[kernel]
    else:
        table = TILES[kernel, row, itemsize]
    tile = table[min(w for w in table if w >= width)]
    if not plain:
        tile = replace(tile, tma=False)
    if isinstance(arch, str):  # 64 KB of shared memory a block
        return Tile(min(64, tile.BLOCK_T), min(64, tile.BLOCK_S), 4, 1)
    return tile


def block_d(D: int) -> int:
    """Head dims are padded to a power of two, at least what a tensor core multiplies."""
    return max(16, next_power_of_2(D))


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as torch.backends.cuda.matmul.fp32_precision says."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def describable(*tensors: Tensor) -> bool:
    """Whether tensor descriptors can stand for tensors [B, rows, heads, D]: 16-byte steps, and a D that is not padded."""
    for x in tensors:
        size = x.element_size()
        b, t, h, _ = x.stride()
        aligned = not ((x.data_ptr() | b * size | t * size | h * size) % 16) and b > 0 and t > 0 and h > 0
        if not aligned or x.shape[3] != block_d(x.shape[3]):
            return False
    return True


def described(x: Tensor, rows: int) -> object:
    """A descriptor of x's tiles of `rows` rows of one head."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, x.shape[3]])
