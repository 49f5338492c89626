"""Tiles measured on this GPU, in place of the shipped ones. Nobody waits for it: only `tinygpt tune` measures.

What it finds lies in one JSON file of the user's cache, under the GPU's name, Triton's version and a hash of the kernels' source:
another GPU, a new Triton or a changed kernel finds nothing and takes the shipped tables again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import astuple
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ..userdir import cache_directory
from . import tiles
from .tiles import Tile

Found = dict[str, Tile]
Timer = Callable[[Callable[[], object]], float]
_SOURCES = ("attention_fwd.py", "attention_bwd.py", "common.py")


def path() -> Path:
    """The file that holds what was measured."""
    return cache_directory() / "tuned-tiles.json"


def identity(device: torch.device) -> str:
    """What measurements on this device hold for: GPU, Triton, kernels."""
    source = b"".join((Path(__file__).parent / name).read_bytes() for name in _SOURCES)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return f"{gpu}, triton {triton.__version__}, kernels {hashlib.sha256(source).hexdigest()[:12]}"


def load() -> dict[str, dict[str, dict[str, list[Any]]]]:
    """All measurements: by identity, then by call, then by kernel. Empty where the file is absent or not ours."""
    try:
        found = json.loads(path().read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def save(device: torch.device, call: str, found: Found) -> None:
    """Keep the tiles of a call, beside all others."""
    everything = load()
    everything.setdefault(identity(device), {})[call] = {kernel: list(astuple(tile)) for kernel, tile in found.items()}
    path().parent.mkdir(parents=True, exist_ok=True)
    temporary = path().with_name(f".{path().name}.{secrets.token_hex(4)}")
    temporary.write_text(json.dumps(everything, indent=1))
    os.replace(temporary, path())
    _measured.cache_clear()


def clear() -> bool:
    """Delete all measurements; False where there were none."""
    there = path().exists()
    path().unlink(missing_ok=True)
    _measured.cache_clear()
    return there


@lru_cache
def _measured(device: torch.device) -> dict[str, Found]:
    calls = load().get(identity(device), {})
    return {call: {kernel: Tile(*values) for kernel, values in found.items()} for call, found in calls.items()}


def call_name(D: int, dtype: torch.dtype, T: int) -> str:
    """Calls that share their tiles: `D=64 bfloat16 T<=64`."""
    return f"D={tiles.block_d(D)} {str(dtype).removeprefix('torch.')} T{'<=64' if T <= 64 else '>64'}"


def lookup(kernel: str, x: Tensor, T: int) -> Tile | None:
    """The tile measured for a kernel on x's device; None where nothing was."""
    found = _measured(x.device)
    return found[call][kernel] if found and (call := call_name(x.shape[3], x.dtype, T)) in found else None


def candidates(kernel: str, D: int, itemsize: int) -> list[Tile]:
    """Every shipped tile of a kernel that this head dim can run on, of whatever architecture, with and without descriptors."""
    width = tiles.block_d(D)
    tables = [t for (name, _, size), t in tiles.TILES.items() if name == kernel and size == itemsize]
    if itemsize == 2:
        tables += [tiles.TIGHT[kernel], {128: tiles.SHORT[kernel]}]
    # A tile made for a wider head fits a narrower one; one made for a narrower head may not fit.
    return list(dict.fromkeys(tile for table in tables for w, tile in table.items() if w >= width))


def tune(
    device: torch.device, D: int, dtype: torch.dtype, B: int, T: int, H: int, timer: Timer
) -> Iterator[tuple[str, Tile, float]]:
    """Time every candidate of the three attention kernels for one kind of call, then keep the fastest.

    Args:
        B, T, H: rows, tokens and heads to measure with.
        timer: milliseconds of a call; `triton.testing.do_bench`.

    Yields:
        (kernel, tile, milliseconds) as they are measured; infinity for a tile that this GPU cannot hold.
    """
    from . import attention

    qkv = torch.randn(B, T, 3 * H, D, device=device, dtype=dtype)
    options = (None, None, H, H, True, None, 0.0)
    y, lse = attention.attention_qkv_fwd(qkv, *options)
    dy = torch.randn_like(y)

    def forward() -> object:
        return attention.attention_qkv_fwd(qkv, *options)

    def backward() -> object:
        return attention.attention_qkv_bwd(dy, qkv, None, None, y, lse, *options[2:])

    def timed(run: Callable[[], object], **chosen: Tile) -> float:
        with tiles.forced(chosen):
            try:
                return timer(run)
            except triton.runtime.errors.OutOfResources:
                return float("inf")

    fwd, dq, dkdv = tiles.KERNELS
    times: dict[tuple[Tile, ...], float] = {}
    for tile in candidates(fwd, D, dtype.itemsize):
        times[(tile,)] = timed(forward, **{fwd: tile})
        yield fwd, tile, times[(tile,)]
    best: Found = {fwd: min(times, key=lambda key: times[key])[0]}
    # The two backward kernels are timed together: dkdv's queries must divide dq's, and one call launches both.
    pairs: dict[tuple[Tile, ...], float] = {}
    for pair in itertools.product(candidates(dq, D, dtype.itemsize), candidates(dkdv, D, dtype.itemsize)):
        if pair[0].BLOCK_T % pair[1].BLOCK_T == 0:
            pairs[pair] = timed(backward, **{dq: pair[0], dkdv: pair[1]})
            yield f"{dq} (with {pair[1].BLOCK_T}x{pair[1].BLOCK_S} in dkdv)", pair[0], pairs[pair]
    best[dq], best[dkdv] = min(pairs, key=lambda key: pairs[key])
    save(device, call_name(D, dtype, T), best)
