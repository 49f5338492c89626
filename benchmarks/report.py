"""All figures with one command, on a machine that does nothing else meanwhile.

    python benchmarks/report.py                                                    tables in the terminal
    python benchmarks/report.py --markdown docs/benchmarks.md --plot docs/benchmarks.png
    python benchmarks/report.py --only steps        or ops, or memory
    python benchmarks/report.py --only ops --op attention gelu --dtype bfloat16

Takes about 10 minutes on two cores. Ratios are to the code in benchmarks/peers, above 1 is faster: medians over interleaved rounds.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import bench_ops
import bench_training_step as training
import memory
import torch
from bench_ops import PLAIN
from bench_training_step import Steps

from tinygpt_kernels import saved, timing
from tinygpt_kernels.measure import BOTH, FORWARD, KERNELS, Measurement


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading, in Markdown's marks."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        lines = [
            f"## {self.title}",
            "",
            self.note,
            "",
            f"| {' | '.join(self.header)} |",
            f"|{'---|' * len(self.header)}",
        ]
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in self.rows), ""])

    def text(self) -> str:
        plain = [self.header, *(tuple(cell.replace("**", "") for cell in row) for row in self.rows)]
        widths = [max(len(row[i]) for row in plain) for i in range(len(self.header))]
        lines = ["  ".join(f"{cell:<{w}}" if i < 3 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
                 for row in plain]  # fmt: skip
        return "\n".join([f"\n{self.title}", self.note, "", *(line.rstrip() for line in lines)])


def measure_ops(ops: list[str], dtype: torch.dtype, budget: float) -> Iterator[Measurement]:
    """Every workload of these ops, one after the other."""
    chosen = [w for w in bench_ops.WORKLOADS if w.op in ops]
    for i, workload in enumerate(chosen):
        print(f"\r{i + 1}/{len(chosen)} {workload}".ljust(79), end="", file=sys.stderr, flush=True)
        yield bench_ops.measured(workload, dtype, budget)
    print("\r".ljust(80), end="\r", file=sys.stderr)


def op_table(found: list[Measurement]) -> Table:
    """Ratios by op, size and backend, with geometric means."""
    rows = []
    for op in dict.fromkeys(m.workload.op for m in found):
        group = [m for m in found if m.workload.op == op]
        for backend in dict.fromkeys(name for m in group for name in m.seconds[FORWARD] if name != PLAIN):
            ratios: dict[str, list[float]] = {FORWARD: [], BOTH: [], KERNELS: []}
            for m in group:
                for pass_, ratio in bench_ops.ratios(m, backend).items():
                    ratios[pass_].append(ratio)
                rows.append(_op_row(m, backend))
            means = [f"**{timing.geometric_mean(r):.2f}**" if r else "" for r in ratios.values()]
            rows.append((f"**{op}**", f"**{backend}**", "**geometric mean**", *means, "", "", ""))
    for m in found:
        rows += [(m.workload.op, name, m.workload.shape, f"WRONG: {why}", *[""] * 5) for name, why in m.wrong.items()]
    note = (
        "x plain: how many times faster than the usual PyTorch code. forward: without gradients. forward+backward: the op under "
        "autograd. kernels alone: forward and backward into buffers, as a written-out training step runs them, beside PyTorch's own "
        "pair without autograd where it has one. Rate, share of the ceiling (a large matrix product, or a copy of as many bytes) and "
        "spread are of the last of these."
    )
    header = ("op", "backend", "size", "forward", "forward+backward", "kernels alone", "rate", "of ceiling", "±")
    return Table("Ops, x plain PyTorch", note, header, rows)


def _op_row(m: Measurement, backend: str) -> tuple[str, ...]:
    if backend not in m.seconds[FORWARD]:
        return m.workload.op, backend, m.workload.shape, *[""] * 6
    ratios = bench_ops.ratios(m, backend)
    last = list(ratios)[-1]
    rate = m.rate(last, backend)
    unit = f"G{m.work.unit}/s"
    return (
        m.workload.op, backend, m.workload.shape, *(f"{ratios[p]:.2f}" if p in ratios else "" for p in (FORWARD, BOTH, KERNELS)),
        f"{rate / 1e9:.1f} {unit}", f"{100 * rate / m.ceiling(last):.0f}%",
        f"{100 * timing.spread(m.seconds[last][backend]):.0f}%",
    )  # fmt: skip


def step_table(found: list[Steps]) -> Table:
    """A row for each candidate of each configuration."""
    rows = []
    for steps in found:
        shares = ", ".join(f"{100 * s:.0f}%" for s in steps.shares)
        rows.append((f"**{steps.config}**", "", f"{steps.matmul_rate / 1e9:.0f} GFLOP/s; plain model at {shares} of it"
                     f"{', so noisy' * steps.noisy}", "", "", "", ""))  # fmt: skip
        for name, times in steps.seconds.items():
            rows.append(("", name, f"{len(times)} rounds", f"{1e3 * timing.median(times):.2f}", f"{100 * timing.spread(times):.0f}%",
                         f"{steps.ratio(name):.2f}", f"{steps.ratio(name, training.COMPILED):.2f}"))  # fmt: skip
    note = "One step: gradients, clipping, AdamW. Medians of interleaved rounds, with the loss read at each step."
    return Table("Training step", note, ("configuration", "candidate", "", "ms", "±", "x plain", "x compiled"), rows)


def memory_table(ops: list[str], configs: list[str]) -> Table:
    """Peaks of ops that must not grow with the square, and of whole steps."""
    rows = []
    for op, shapes in ((op, shapes) for op, shapes in memory.MEMORY.items() if op in ops):
        for backend in ("reference", *bench_ops.backends(op)):
            for shape in shapes:
                if op == "linear_cross_entropy" and backend == "reference":
                    continue  # five tensors of R x V
                found = memory.of_op(op, backend, shape)
                rows.append((op, backend, shape, _mb(found["temporaries"]), _mb(found["peak"])))
    for config in configs:
        for name in training.names():
            rows.append(("step", name, config, "", _mb(memory.of_step(name, config)["peak"])))
    note = (
        "Of ops, forward and backward: MB that the process rose by, and those that are neither output nor gradient. Of steps: the most "
        "the whole process ever held, Python and libraries included."
    )
    return Table("Peak memory", note, ("what", "who", "size", "temporaries, MB", "peak, MB"), rows)


def _mb(bytes_: int) -> str:
    return f"{bytes_ / 1e6:.1f}" if bytes_ < 1e8 else f"{bytes_ / 1e6:.0f}"


def plot(path: Path, ops: list[Measurement], steps: list[Steps]) -> None:
    """Geometric means of ops, and milliseconds of steps, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = bool(ops) + len(steps)
    figure, axes = plt.subplots(1, panels, figsize=(5.2 * panels, 3.8), squeeze=False)
    left = list(axes[0])
    if ops:
        axis = left.pop(0)
        means: dict[str, float] = {}
        for op in dict.fromkeys(m.workload.op for m in ops):
            ratios = [list(r.values())[-1] for m in ops if m.workload.op == op and (r := bench_ops.ratios(m, "cpp"))]
            if ratios:
                means[op] = timing.geometric_mean(ratios)
        names = list(means)[::-1]
        axis.barh(names, [means[n] for n in names], color="tab:green")
        axis.axvline(1.0, color="black", linewidth=0.8)
        for y, name in enumerate(names):
            axis.text(means[name], y, f" {means[name]:.2f}", va="center", fontsize=8)
        axis.set_title("C++ kernels, x plain PyTorch\n(forward + backward, geometric mean)", fontsize=9)
        axis.margins(x=0.15)
    for axis, found in zip(left, steps, strict=True):
        milliseconds = {name: 1e3 * timing.median(times) for name, times in found.seconds.items()}
        names = sorted(milliseconds, key=lambda name: milliseconds[name], reverse=True)
        colours = ["tab:green" if name.startswith("tinygpt") else "tab:grey" for name in names]
        axis.barh(names, [milliseconds[n] for n in names], color=colours)
        for y, name in enumerate(names):
            axis.text(milliseconds[name], y, f" {milliseconds[name]:.1f}", va="center", fontsize=8)
        axis.set_title(f"One training step, ms\n{found.config}", fontsize=9)
        axis.margins(x=0.15)
    for axis in axes[0]:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=("ops", "steps", "memory"), default=["ops", "steps", "memory"])
    parser.add_argument("--op", nargs="+", choices=list(bench_ops.SHAPES), default=list(bench_ops.SHAPES))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of ops")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each op and size, at most")
    parser.add_argument(
        "--config", nargs="+", choices=list(training.CONFIGS), default=list(training.CONFIGS), help="of steps"
    )
    parser.add_argument("--rounds", type=int, help="of training steps; 100 and 30 unless given")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    busy = timing.busy()
    if busy:
        print(f"other processes are at work: {busy}; these figures will say little", file=sys.stderr)
    ops: list[Measurement] = []
    steps: list[Steps] = []
    tables = []
    if "steps" in args.only:
        for config in args.config:
            print(f"training steps: {config}", file=sys.stderr)
            steps.append(training.measure(config, args.rounds))
        tables.append(step_table(steps))
        print(tables[-1].text(), flush=True)
    if "ops" in args.only:
        ops = list(measure_ops(args.op, getattr(torch, args.dtype), args.seconds))
        tables.append(op_table(ops))
        print(tables[-1].text(), flush=True)
    if "memory" in args.only:
        tables.append(memory_table(args.op, args.config))
        print(tables[-1].text(), flush=True)
    busy = busy or timing.busy()
    machine = f"{saved.identity('cpu')}, {args.dtype}, {platform.system()}"
    print(f"\n{machine}{'; other processes were at work' if busy else ''}")
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        picture = f"\n![Ops and training steps]({args.plot.name})\n" if args.plot else ""
        warning = "\nOther processes were at work meanwhile: these figures say little.\n" if busy else ""
        head = f"# Benchmarks\n\nMade by `python benchmarks/report.py` on {machine}.\n{warning}{picture}"
        args.markdown.write_text("\n".join([head, *(table.markdown() for table in tables)]))
    if args.plot and (ops or steps):
        plot(args.plot, ops, steps)
    return 1 if any(m.wrong for m in ops) else 0


if __name__ == "__main__":
    sys.exit(main())
