"""Where a training step's time goes: every kernel and matrix product of the step that is written out, by share.

    python benchmarks/profile_step.py [--config "char-gpu, batch 8"] [--backend auto] [--steps 30]

Each call is timed by itself, medians over the steps; what the calls do not account for is Python between them. A product's rate
stands beside this machine's rate in large ones.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from bench_training_step import CONFIGS, Batches, model
from rich.console import Console
from rich.table import Table

from tinygpt.config import OptimConfig
from tinygpt.models.step import Step
from tinygpt.optim import AdamW
from tinygpt_kernels import measure
from tinygpt_kernels.products import Products

Times = dict[str, float]


class Clock:
    """Wraps functions so that their time is added up by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.flop: dict[str, int] = defaultdict(int)

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.add(name, time.perf_counter() - start)
            return result

        return timed

    def add(self, name: str, seconds: float, flop: int = 0) -> None:
        self.seconds[name] += seconds
        self.calls[name] += 1
        self.flop[name] += flop


class TimedProducts(Products):
    """Another's products, each timed under its kind and shape."""

    def __init__(self, inner: Products, clock: Clock) -> None:
        self.inner, self.clock, self.fuses_gelu = inner, clock, inner.fuses_gelu

    def _timed(self, kind: str, first: torch.Tensor, second: torch.Tensor, out: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = getattr(self.inner, kind)(first, second, *args, out=out, **kwargs)
        y = out[0] if isinstance(out, tuple) else out
        reduced = first.shape[0] if kind == "linear_bwd_weight" else first.shape[1]
        name = f"{kind} {y.shape[0]} x {y.shape[1]} over {reduced}{' and GELU' if args and args[0] is not None else ''}"
        self.clock.add(name, time.perf_counter() - start, 2 * y.numel() * reduced)
        return result

    def linear_fwd(self, x, weight, bias=None, *, out):  # type: ignore[no-untyped-def]
        return self._timed("linear_fwd", x, weight, out, *(() if bias is None else (bias,)))

    def linear_gelu_fwd(self, x, weight, bias, approximate, *, out):  # type: ignore[no-untyped-def]
        return self._timed("linear_gelu_fwd", x, weight, out, bias, approximate)

    def linear_bwd_input(self, dy, weight, slope=None, *, out):  # type: ignore[no-untyped-def]
        return self._timed("linear_bwd_input", dy, weight, out, slope)

    def linear_bwd_weight(self, dy, x, *, out):  # type: ignore[no-untyped-def]
        return self._timed("linear_bwd_weight", dy, x, out)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=list(CONFIGS), default="char-cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args(arguments)
    shape, _ = CONFIGS[options.config]
    gpt = model(shape, options.backend)
    optimizer = AdamW(gpt.named_parameters(), OptimConfig(), gpt.kernels)
    step = Step(gpt, optimizer, shape.batch)
    x, y = Batches(shape).next()

    def whole() -> float:
        loss = step(x, y)
        optimizer.clip()
        optimizer.step(1e-3)
        return loss.item()

    for _ in range(3):
        whole()
    untimed = []
    for _ in range(options.steps):
        start = time.perf_counter()
        whole()
        untimed.append(time.perf_counter() - start)

    clock = Clock()
    step = Step(gpt, optimizer, shape.batch)  # anew: one that has run is a recording, in which there is nothing to wrap
    for op in (
        "layer_norm",
        "add_layer_norm",
        "attention",
        "gelu",
        "embedding",
        "cross_entropy",
        "linear_cross_entropy",
    ):
        pair = getattr(step, f"_{op}", None)
        if pair is not None:
            timed = clock.wrap(f"{op} forward", pair.fwd), clock.wrap(f"{op} backward", pair.bwd)
            setattr(step, f"_{op}", pair._replace(fwd=timed[0], bwd=timed[1]))
    step.products = TimedProducts(step.products, clock)
    optimizer.clip = clock.wrap("clip", optimizer.clip)  # type: ignore[method-assign]
    optimizer.step = clock.wrap("adamw", optimizer.step)  # type: ignore[method-assign]
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(options.steps):
        clock.seconds.clear(), clock.calls.clear(), clock.flop.clear()
        start = time.perf_counter()
        whole()
        total = time.perf_counter() - start
        for name, seconds in clock.seconds.items():
            found[name].append(seconds)
        found["between the calls"].append(total - sum(clock.seconds.values()))

    rate = measure.matmul_rate("cpu", torch.float32)
    table = Table(
        title=f"{options.config}: {1e3 * statistics.median(untimed):.1f} ms a step, products at {rate / 1e9:.0f} GFLOP/s"
    )
    for column in ("what", "calls", "ms", "share", "GFLOP/s"):
        table.add_column(column, justify="left" if column == "what" else "right")
    medians = {name: statistics.median(times) for name, times in found.items()}
    whole_time = sum(medians.values())
    for name, seconds in sorted(medians.items(), key=lambda item: -item[1]):
        flop = clock.flop.get(name, 0)
        table.add_row(name, str(clock.calls.get(name, "")), f"{1e3 * seconds:.2f}", f"{100 * seconds / whole_time:.1f} %",
                      f"{flop / seconds / 1e9:.0f}" if flop else "")  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
