"""Timing that holds on a noisy machine: candidates take turns in one process, and medians and ratios are reported."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int = 25, seconds: float = 0.01
) -> dict[str, list[float]]:
    """Seconds per call of each candidate, one figure per round; every round gives each about `seconds`, in turn."""
    calls = {}
    for name, run in candidates.items():
        for _ in range(3):
            run()
        start = time.perf_counter()
        run()
        calls[name] = max(1, round(seconds / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            times[name].append((time.perf_counter() - start) / calls[name])
    return times


def median(times: list[float]) -> float:
    """The middle one."""
    return statistics.median(times)


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times faster: the median over rounds of slow / fast, so that drift of the machine cancels."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


def copy_bandwidth(bytes_: int) -> float:
    """Bytes read and written per second by a copy of a tensor of this size on this machine now."""
    source = torch.empty(bytes_ // 4)
    target = torch.empty_like(source)
    return 2 * bytes_ / median(interleaved({"copy": lambda: target.copy_(source)})["copy"])


def keep_freed_memory() -> None:
    """Make glibc keep what is freed, for every candidate alike.

    Left to itself it returns blocks above a moving threshold to the system, and the next one of that size then costs a page
    fault every 4 KB: for outputs of 6 MB and more that was a factor of three, now for one candidate, now for the other.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
