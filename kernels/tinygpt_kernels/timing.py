"""Timing that holds on a noisy machine: candidates take turns in one process; medians, spreads and ratios are reported.

Beside any figure stands what this machine can do: the rate of its own large matrix products, the rate of a copy.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .products import Products

Run = Callable[[], object]
_FEWEST = 7  # rounds that a median needs


def interleaved(
    candidates: Mapping[str, Run], *, rounds: int = 25, seconds: float = 0.01, budget: float | None = None, device: str = "cpu"
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds per call of each candidate, one figure per round; every round gives each about `seconds`, in turn.

    Args:
        rounds: how many; every other one runs backwards, so that nobody always follows the same neighbour.
        budget: seconds for everything; fewer rounds are made, but at least 7, where they would take longer.
        device: on "cuda" the GPU's own events are the clock.
    """
    clock = _gpu_seconds if device.startswith("cuda") else _cpu_seconds
    calls, cost = {}, 0.0
    for name, run in candidates.items():
        clock(run, 3)
        once = clock(run, 1)
        calls[name] = max(1, round(seconds / max(once, 1e-7)))
        cost += calls[name] * once
    if budget is not None:
        rounds = max(_FEWEST, min(rounds, int(budget / max(cost, 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(rounds):
        for name in list(candidates)[:: -1 if i % 2 else 1]:
            times[name].append(clock(candidates[name], calls[name]) / calls[name])
    return times


def _cpu_seconds(run: Run, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - start


def _gpu_seconds(run: Run, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return 1e-3 * float(start.elapsed_time(end))


REPLAYED = 10  # calls in one graph


def captured(run: Run) -> Run:
    """`REPLAYED` calls of `run` as one CUDA graph: what the GPU needs, without the Python and the launches between its kernels.

    A call that moves a few megabytes takes a GPU less time than Python takes to ask for it; a training step hides that by capture, and
    a table of kernels should not hold it either. `run` must allocate only through PyTorch and wait for nothing.
    """
    side, now = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(now)
    with torch.cuda.stream(side):  # type: ignore[no-untyped-call]
        for _ in range(3):
            run()
    now.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPLAYED):
            run()

    def replay(
        kept: Run = run,
    ) -> None:  # the graph has the addresses of the tensors that `run` holds, and does not hold them
        graph.replay()

    return replay


def median(times: list[float]) -> float:
    """The middle one."""
    return statistics.median(times)


def spread(times: list[float]) -> float:
    """Half the distance between the quartiles, as a share of the median: half of all rounds lie within median * (1 ± this)."""
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle


def ratios(slow: list[float], fast: list[float]) -> list[float]:
    """How many times faster, round by round, so that drift of the machine cancels."""
    return [s / f for s, f in zip(slow, fast, strict=True)]


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times faster: the median over rounds."""
    return statistics.median(ratios(slow, fast))


def geometric_mean(values: list[float]) -> float:
    """The mean that a ratio and its inverse agree on."""
    return statistics.geometric_mean(values)


def matmul(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Run, float]:
    """A large matrix product into a buffer, and its floating-point operations."""
    n = 8192 if device.startswith("cuda") else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2.0 * n**3


def matmul_rate(device: str = "cpu", dtype: torch.dtype = torch.float32, others: Iterable[Products] = ()) -> float:
    """FLOP/s of this machine's large matrix product, the best of several: a busy neighbour only makes it slower.

    Measured once in a process for the same arguments and number of threads: half a second.

    Args:
        others: whose products count beside PyTorch's own. MKL does half of what a Zen 5 can.
    """
    own = {products.backend: products for products in others}
    key = device, dtype, torch.get_num_threads(), frozenset(own)
    if key not in _rates:
        run, flop = matmul(device, dtype)
        candidates = {"": run}
        for name, products in own.items():
            a, b = (torch.randn(1024, 1024, device=device).to(dtype) for _ in range(2))
            if products.serves(a):
                candidates[name] = partial(products.linear_fwd, a, b, out=torch.empty_like(a))
        seconds = interleaved(candidates, rounds=6, seconds=0.0, device=device)
        _rates[key] = max((flop if not name else 2.0 * 1024**3) / min(times) for name, times in seconds.items())
    return _rates[key]


_rates: dict[tuple[str, torch.dtype, int, frozenset[str]], float] = {}


def copy(bytes_: float, device: str = "cpu") -> Run:
    """A copy that reads and writes `bytes_` together. Its rate is the cache's where that many fit into one."""
    source = torch.zeros(max(1, int(bytes_) // 8), device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def copy_rate(bytes_: float, device: str = "cpu") -> float:
    """Bytes read and written per second by such a copy on this machine now."""
    return bytes_ / median(interleaved({"": copy(bytes_, device)}, device=device)[""])


def busy() -> str | None:
    """What shows that another process holds a core, which makes any time of parallel code meaningless; None when nothing does.

    A small addition takes microseconds, on one thread or on all. Where a thread has to wait for its core, all the others wait
    for it at the end: milliseconds, the scheduler's.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return None
    x = torch.zeros(1 << 16)
    together = median(interleaved({"": lambda: x.add_(1.0)}, rounds=21, seconds=0.002)[""])
    torch.set_num_threads(1)
    try:
        alone = median(interleaved({"": lambda: x.add_(1.0)}, rounds=21, seconds=0.002)[""])
    finally:
        torch.set_num_threads(threads)
    if together < 5 * alone + 5e-5:
        return None
    return f"a small addition takes {1e6 * together:.0f} µs on {threads} threads and {1e6 * alone:.0f} µs on one"


def keep_freed_memory() -> None:
    """Make glibc keep what is freed, for every candidate alike.

    Left to itself it returns blocks above a moving threshold to the system, and the next one of that size then costs a page
    fault every 4 KB: for outputs of 6 MB and more that was a factor of three, now for one candidate, now for the other.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
