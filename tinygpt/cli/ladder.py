"""`tinygpt ladder`: CUDA kernels from naive to fast, rung by rung, run and counted on the CPU; and one of your own beside them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .arguments import Ladder

if TYPE_CHECKING:
    from tinygpt_kernels.ladder import Costs, Rung

    Climbed = list[tuple[Rung, Costs, float | None]]

_OPS = ("attention", "layer_norm")
_GLOBAL = ("requests", "asked", "moved", "wide", "waited")
_BLOCK = ("shared", "turns", "conflicts", "barriers", "shuffles", "mma")
_WIDE = 125  # characters for both in one table
_TOLD = 4  # sizes at which a rung is wrong; the others mostly say the same
_LEGEND = """
requests: of warps to global memory. asked: bytes their threads want; moved: bytes of the 32-byte sectors
that takes, before any cache; wide: share that moves 16 bytes at a time. shared: bytes asked of shared memory;
turns: cycles its banks need for them; conflicts: those of them that another layout would save. mma: products on
tensor cores. waited: bytes of global memory for which nothing is computed while they come.
v: lower than on the rung before, as its text says."""


def plan(args: Ladder) -> Callable[[], int]:
    """Check what needs no torch, and return the climb.

    Raises:
        UserError: an op without a ladder; a file that is not there.
    """
    for op in args.ops:
        if op not in _OPS:
            near = get_close_matches(op, _OPS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {' and '.join(_OPS)}"
            raise UserError(f"there is no ladder for {op!r}; {hint}")
    for path in args.mine:
        if not path.is_file():
            raise UserError(f"no such file: {path}")
    if args.plot is not None and not args.plot.absolute().parent.is_dir():
        raise UserError(f"--plot {args.plot}: there is no directory {args.plot.absolute().parent}")
    return lambda: _climb(args)


def _climb(args: Ladder) -> int:
    from tinygpt_kernels import ladder

    try:
        own = [replace(ladder.read(path), title=path.name, lower=()) for path in args.mine]
        ops = args.ops or tuple(dict.fromkeys(rung.op for rung in own)) or _OPS
        if other := [rung for rung in own if rung.op not in ops]:
            raise UserError(f"{other[0].path} is a rung of {other[0].op}; name that ladder too")
        wrong = [_judged(rung, quiet=args.json) for rung in own]
        climbed = {op: _costs(op, [*ladder.rungs(op), *(r for r in own if r.op == op)], args.time) for op in ops}
    except ladder.LadderError as error:
        raise UserError(str(error)) from None
    if args.json:
        for op, rows in climbed.items():
            for rung, costs, seconds in rows:
                print(
                    json.dumps(
                        {"op": op, "rung": rung.title, "file": str(rung.path), "seconds": seconds} | asdict(costs)
                    )
                )
    else:
        for op, rows in climbed.items():
            _print(op, rows, why=args.why)
        print(_LEGEND)
    if plot := args.plot or (None if args.json else Path("ladder.png")):
        _draw(climbed, plot)
        print(f"\nwrote {plot}", file=sys.stderr if args.json else sys.stdout)
    return 1 if any(wrong) else 0


def _judged(rung: Rung, *, quiet: bool) -> bool:
    """Whether a user's rung is wrong; says in what."""
    from tinygpt_kernels import ladder

    verdict = ladder.judge(rung)
    if verdict.wrong and not quiet:
        print(f"{rung.path} is not right yet:")
        for line in verdict.wrong[:_TOLD]:
            print(f"  {line}")
        if more := len(verdict.wrong[_TOLD:]):
            print(f"  and at {more} other size{'s' * (more > 1)}")
        print()
    elif not quiet:
        print(
            f"{rung.path} is right: {verdict.runs} runs, in order, in a random order, and with every access checked\n"
        )
    return bool(verdict.wrong)


def _costs(op: str, found: Sequence[Rung], timed: bool) -> Climbed:
    from tinygpt_kernels import ladder

    counted = ladder.costs(found)
    seconds: Sequence[float | None] = ladder.seconds(found) if timed else [None] * len(counted)
    return list(zip(found, counted, seconds, strict=True))


def _print(op: str, rows: Climbed, *, why: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from tinygpt_kernels.ladder.climb import COUNTED

    first, second = COUNTED[op]
    sizes = f"{first} head of {second} tokens, D 64, causal" if op == "attention" else f"{first} rows of {second}"
    console = Console() if Console().is_terminal else Console(width=_WIDE)
    console.print(f"\n[bold]{op}[/]: {sizes}, bfloat16\n", highlight=False)
    for rung, _, _ in rows:
        console.print(f"{rung.title}: {rung.idea}", highlight=False, markup=False, soft_wrap=True)
        if why and rung.why:
            console.print(f"\n{rung.why}\n\n    {rung.path}\n", highlight=False, markup=False, soft_wrap=True)
    for columns in [_GLOBAL + _BLOCK] if console.width >= _WIDE else [_GLOBAL, _BLOCK]:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("rung", no_wrap=True)
        timed = columns[0] == "requests" and rows[0][2] is not None
        for column in (*columns, *(["time"] if timed else [])):
            table.add_column(column, justify="right", no_wrap=True)
        for rung, costs, seconds in rows:
            cells = [_cell(costs, column) + (" v" if column in rung.lower else "  ") for column in columns]
            table.add_row(rung.title, *cells, *([_time(seconds)] if timed and seconds is not None else []))
        console.print(table)


def _cell(costs: Costs, column: str) -> str:
    if column == "wide":
        return f"{100 * costs.wide:.0f}%"
    return short(getattr(costs, "products" if column == "mma" else column))


def short(n: float) -> str:
    """A number in three digits: 21.7M."""
    for unit in ("", "k", "M", "G"):
        if n < 999.5:
            return f"{n:.0f}{unit}" if not unit or n >= 99.95 else f"{n:.{1 if n >= 9.995 else 2}f}{unit}"
        n /= 1000
    return f"{n:.0f}T"


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:.0f} µs"


def _draw(climbed: dict[str, Climbed], path: Path) -> None:
    from matplotlib.figure import Figure

    timed = any(row[2] is not None for rows in climbed.values() for row in rows)
    shown = (("moved", "global memory: bytes moved", "#3b6ea5"), ("waited", "of it waited for", "#9db7d5"),
             ("shared", "shared memory: bytes", "#d9a441"))  # fmt: skip
    figure = Figure(figsize=(6.2 * len(climbed), 4.6), dpi=130, layout="constrained")
    for axes, (op, rows) in zip(figure.subplots(1, len(climbed), squeeze=False)[0], climbed.items(), strict=True):
        for k, (name, label, color) in enumerate(shown):
            values = [getattr(costs, name) for _, costs, _ in rows]
            places = [i + 0.27 * (k - 1) for i in range(len(rows))]
            bars = axes.barh(places, [max(v, 1) for v in values], height=0.25, color=color, label=label)
            axes.bar_label(bars, [short(v) if v else "none" for v in values], padding=3, fontsize=7.5, color="#555555")
        axes.set_yticks(range(len(rows)), [
            rung.title + (f"\n{_time(seconds)}" if timed and seconds is not None else "") for rung, _, seconds in rows])  # fmt: skip
        axes.invert_yaxis()
        axes.set_xscale("log")
        most = max(getattr(costs, name) for _, costs, _ in rows for name, _, _ in shown)
        axes.set_xlim(min(c for _, costs, _ in rows for c in (costs.moved, costs.waited)) / 4, 6 * most)
        axes.set_xlabel("bytes")
        axes.set_title(op.replace("_", " "), fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path)
