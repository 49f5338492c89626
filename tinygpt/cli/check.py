"""`tinygpt check`: the certificate. Every named case of every op, on every backend that serves it, held to float64."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tinygpt_kernels.spec import known_backends

from ..errors import UserError
from .arguments import Check, flat
from .early import find_backends, find_names, find_ops

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from tinygpt_kernels.cases import Case
    from tinygpt_kernels.parity import Error

_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Result:
    """One case on one backend in one dtype. refused: why it was not served; raised: what came instead of tensors."""

    op: str
    case: str
    backend: str
    dtype: str
    errors: tuple[Error, ...] = ()
    refused: str | None = None
    raised: str | None = None

    @property
    def ok(self) -> bool:
        return self.raised is None and all(error.ok for error in self.errors)

    def as_json(self) -> dict[str, object]:
        """Numbers as they are, and none where a tensor has another shape or is not finite."""
        return {
            "op": self.op, "case": self.case, "backend": self.backend, "dtype": self.dtype,
            "served": self.refused is None, "refused": self.refused, "raised": self.raised,
            "ok": self.ok if self.refused is None else None,
            "tensors": [{"name": e.name, "error": _finite(e.relative), "torch": _finite(e.peer), "allowed": e.bound,
                         "worst": _finite(e.worst), "worst_allowed": 10 * e.bound, "ok": e.ok} for e in self.errors],
        }  # fmt: skip


def plan(args: Check) -> Callable[[], int]:
    """Check all names, and return the check.

    Raises:
        UserError: an unknown backend, op or dtype; offers the nearest name.
    """
    dtypes = find_names("dtype", flat(args.dtype), _DTYPES) or _DTYPES
    backends = find_backends(flat(args.backend))
    ops = find_ops(flat(args.op)) if args.op else ()
    return lambda: _check(args, ops or find_ops(()), backends, dtypes)


def _check(args: Check, ops: tuple[str, ...], backends: tuple[str, ...], dtypes: tuple[str, ...]) -> int:
    from rich.console import Console

    from ..training.machine import describe, pick_device

    device = pick_device(args.device)
    names = _named(backends, device.type) if backends else _serving(device.type)
    results = list(_with_progress(ops, names, dtypes, str(device)))
    served = [result for result in results if result.refused is None]
    failed = [result for result in served if not result.ok]
    if args.json:
        print(json.dumps({"machine": describe(device), "ok": bool(served) and not failed,
                          "results": [result.as_json() for result in results]}, indent=1))  # fmt: skip
    elif served:
        _print(Console(highlight=False), results, failed)
    if not served:
        raise UserError(f"nothing was checked: {results[0].backend} refuses every case: {results[0].refused}")
    return 1 if failed else 0


def _named(backends: tuple[str, ...], device: str) -> tuple[str, ...]:
    """The backends asked for, if each can run here at all.

    Raises:
        UserError: one cannot; says why and what would help.
    """
    from .backends import unavailable

    for name in backends:
        if why := unavailable(name, device):
            raise UserError(f"backend {name} serves nothing on {device}: {why}")
    return backends


def _serving(device: str) -> tuple[str, ...]:
    """Every backend that serves here; what is interpreted is left out, which is said."""
    from tinygpt_kernels import dispatch, interpreter

    from .backends import unavailable

    left_out = (device == "cpu" or interpreter.asked_for()) and dispatch.load_backend("triton") is None
    if left_out:
        print("tinygpt: triton is left out: without a GPU its kernels are interpreted, which takes minutes; "
              "`--backend triton` checks them", file=sys.stderr)  # fmt: skip
    return tuple(
        name for name in known_backends() if not (left_out and name == "triton") and not unavailable(name, device)
    )


def _with_progress(
    ops: tuple[str, ...], backends: tuple[str, ...], dtypes: tuple[str, ...], device: str
) -> Iterator[Result]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tinygpt_kernels.cases import cases

    total = sum(len(cases(op)) for op in ops) * len(dtypes) * len(backends)
    console = Console(stderr=True)
    columns = (MofNCompleteColumn(), BarColumn(bar_width=None), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        for op in ops:
            for case in cases(op):
                for dtype in dtypes:
                    for backend in backends:  # innermost: they share the oracle
                        progress.update(task, description=f"{op} on {backend}")
                        yield check_case(case, backend, dtype, device)
                        progress.advance(task)


def check_case(case: Case, backend: str, dtype_name: str, device: str) -> Result:
    """One case on one backend; whatever the backend raises is a result too."""
    import torch

    from tinygpt_kernels import dispatch, parity

    dtype: torch.dtype = getattr(torch, dtype_name)
    about = (case.op, case.name, backend, dtype_name)
    call = parity.call_of(dispatch.all_ops()[case.op], case, dtype, device)
    if why := dispatch.reason(backend, call):
        return Result(*about, refused=why)
    try:
        return Result(*about, errors=tuple(parity.errors_of(case, backend, dtype, device)))
    except Exception as error:  # a certificate speaks of every case, also of those after this one
        return Result(*about, raised=f"{type(error).__name__}: {error}")


def _print(console: Console, results: list[Result], failed: list[Result]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console.print("[bold]Relative error against float64, beside PyTorch's own and what is allowed[/]")
    width = max(len(name) for name in known_backends()) + 2
    for op, rows in _grouped(results).items():
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for least, justify in ((width, "left"), (8, "left"), (4, "right"), (7, "right"), (7, "right"), (7, "right")):
            table.add_column(justify=justify, no_wrap=True, min_width=least)  # type: ignore[arg-type]
        table.add_column(overflow="fold")
        for (backend, dtype), group in rows.items():
            served = [result for result in group if result.refused is None]
            if served:
                style = None if all(result.ok for result in served) else "red"
                table.add_row(f"  {escape(backend)}", dtype, *map(escape, _row(served)), style=style)
        if table.rows:
            console.print(f"[bold]{op}[/]")
            console.print(table)
    console.print("\nPer row: cases, the error nearest its bound, PyTorch's, the bound, and where.", style="dim")
    refused = _refusals(results)
    if refused:
        console.print("\nNot served")
        for line in refused:
            console.print(f"  {line}", style="dim", markup=False)
    for result in failed:
        console.print(
            f"\n[bold red]✗[/] {result.op} on {escape(result.backend)}, {result.dtype}, case {escape(result.case)}"
        )
        lines = [result.raised] if result.raised else [str(error) for error in result.errors if not error.ok]
        for line in lines:
            console.print(f"  {line}", markup=False)
    count = sum(result.refused is None for result in results)
    verdict = (
        f"[bold red]{len(failed)} of {count} cases are wrong[/]" if failed else f"[green]all {count} cases are right[/]"
    )
    console.print(f"\n{verdict}")


def _row(served: list[Result]) -> tuple[str, ...]:
    """Cases, and of the tensor that is nearest its bound the error, PyTorch's, the bound, its name."""
    wrong = sum(not result.ok for result in served)
    count = f"{wrong} of {len(served)} ✗" if wrong else f"{len(served)} ✓"
    tensors = [(error, result) for result in served for error in result.errors]
    if not tensors:
        return count, "–", "–", "–", "raised, see below"
    worst, result = max(tensors, key=lambda pair: pair[0].used)
    return count, f"{worst.relative:.1e}", f"{worst.peer:.1e}", f"{worst.bound:.1e}", f"{result.case}: {worst.name}"


def _refusals(results: list[Result]) -> list[str]:
    """A line for each backend and reason."""
    absent: dict[str, list[str]] = {}
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for result in results:
        if result.refused == f"has no {result.op}":
            if result.op not in absent.setdefault(result.backend, []):
                absent[result.backend].append(result.op)
        elif result.refused is not None:
            reasons.setdefault((result.backend, result.refused), {})[f"{result.op} ({result.case})"] = None
    lines = [f"{backend}: has no {', '.join(ops)}" for backend, ops in absent.items()]
    return lines + [f"{backend}: {'; '.join(cases)}: it {why}" for (backend, why), cases in reasons.items()]


def _grouped(results: list[Result]) -> dict[str, dict[tuple[str, str], list[Result]]]:
    """By op, then by backend and dtype, each in the order of its first appearance."""
    groups: dict[str, dict[tuple[str, str], list[Result]]] = {}
    for result in results:
        groups.setdefault(result.op, {}).setdefault((result.backend, result.dtype), []).append(result)
    backends = list(dict.fromkeys(result.backend for result in results))
    return {op: dict(sorted(rows.items(), key=lambda row: backends.index(row[0][0]))) for op, rows in groups.items()}


def _finite(x: float) -> Any:
    return x if math.isfinite(x) else None
