"""`tinygpt bench`: backends on a user's own sizes; right first, then timed in turn; what `auto` picks, and shall pick from now on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tinygpt_kernels.spec import known_backends

from ..errors import UserError
from .arguments import Bench, flat
from .early import find_backends, find_names, find_ops

if TYPE_CHECKING:
    from rich.console import Console

    from tinygpt_kernels.measure import Measurement
    from tinygpt_kernels.saved import Entry
    from tinygpt_kernels.workloads import Workload

_DTYPES = ("float32", "bfloat16", "float16")


def plan(args: Bench) -> Callable[[], int]:
    """Check all names and sizes, and return the measurement.

    Raises:
        UserError: an unknown op, backend, dtype or size, options that exclude each other; says what would do.
    """
    if args.list or args.clear:
        if args.list and args.clear:
            raise UserError("--list and --clear are not allowed together")
        return _clear if args.clear else lambda: _list(args.json)
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads {args.threads} must be at least 1")
    dtypes = find_names("dtype", flat(args.dtype), _DTYPES) or ("float32",)
    backends = find_backends(flat(args.backend))
    shapes = flat(args.shape)
    if shapes and not args.op:
        raise UserError(
            f"--shape {shapes[0]} needs an op whose shape it is, for example --op layer_norm --shape R=2048,C=384"
        )
    if args.op or shapes:
        ops = find_ops(flat(args.op))
        from tinygpt_kernels import workloads

        for op in ops:
            for shape in shapes:
                try:
                    workloads.workload(op, shape)
                except ValueError as error:
                    raise UserError(f"--shape {shape}: {error}") from None
    return lambda: _bench(args, find_ops(flat(args.op)), backends, dtypes, shapes)


def _bench(
    args: Bench, ops: Sequence[str], backends: Sequence[str], dtypes: Sequence[str], shapes: Sequence[str]
) -> int:
    import torch
    from rich.console import Console

    from tinygpt_kernels import saved, timing
    from tinygpt_kernels.workloads import default_workloads, workload

    from ..training.machine import describe, pick_device

    device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    names = _timed(backends, device.type)
    if args.save and "torch" not in names:
        names = ("torch", *names)
    todo = [w for op in ops for w in ([workload(op, s) for s in shapes] or default_workloads(op, device.type))]
    console = Console(highlight=False)
    found: list[Measurement] = []
    busy = timing.busy() if device.type == "cpu" else None
    if not args.json:
        console.print(f"[bold]{saved.identity(str(device))}[/]")
    for measurement in _with_progress(todo, names, dtypes, str(device)):
        found.append(measurement)
        if not args.json:
            _print(console, measurement)
    if device.type == "cpu":
        busy = busy or timing.busy()
    keep = args.save and not busy
    if keep:
        saved.save(str(device), [entry for m in found for entry in m.findings()])
    if args.json:
        print(json.dumps({"machine": describe(device) | {"identity": saved.identity(str(device)), "busy": busy},
                          "measurements": [as_json(m) for m in found], "saved": keep}, indent=1))  # fmt: skip
    elif keep:
        console.print(f"\nkept in {saved.path()}; auto follows it from now on, `tinygpt backends` shows it, "
                      "`tinygpt bench --clear` forgets it")  # fmt: skip
    elif not args.save:
        console.print("\n`--save` makes auto follow these figures on this machine.", style="dim")
    if busy:
        print(f"tinygpt: other processes are at work: {busy}. These times say little{'; nothing was saved' * args.save}; "
              "run it again when the machine is idle", file=sys.stderr)  # fmt: skip
    return 1 if any(m.wrong for m in found) or (busy and args.save) else 0


def _timed(backends: Sequence[str], device: str) -> tuple[str, ...]:
    """The backends asked for, or all that serve here for speed.

    Raises:
        UserError: one that was asked for serves nothing here, or is interpreted.
    """
    from tinygpt_kernels import interpreter

    from .backends import unavailable

    interpreted = {"triton"} if device == "cpu" or interpreter.asked_for() else set()
    for name in backends:
        if name in interpreted:
            raise UserError("backend triton would be interpreted here, for correctness; its times would say nothing. "
                            "`tinygpt gpu-report` reads its machine code")  # fmt: skip
        if why := unavailable(name, device):
            raise UserError(f"backend {name} serves nothing on {device}: {why}")
    skipped = {"reference", *interpreted}
    return tuple(backends) or tuple(n for n in known_backends() if n not in skipped and not unavailable(n, device))


def _with_progress(
    todo: Sequence[Workload], backends: Sequence[str], dtypes: Sequence[str], device: str
) -> Iterator[Measurement]:
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from tinygpt_kernels.measure import measure

    console = Console(stderr=True)
    columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.description}"))
    # No refreshing thread: it would be timed too.
    with Progress(
        *columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=len(todo) * len(dtypes))
        for workload in todo:
            for dtype in dtypes:
                progress.update(task, description=f"{workload} {dtype}", refresh=True)
                try:
                    measurement = measure(workload, backends, getattr(torch, dtype), device)
                except RuntimeError as error:
                    if "memory" not in str(error):
                        raise
                    raise UserError(f"{workload} {dtype} does not fit into memory; take smaller sizes") from None
                yield measurement
                progress.advance(task)


def _print(console: Console, m: Measurement) -> None:
    from rich.markup import escape
    from rich.table import Table

    from tinygpt_kernels import timing
    from tinygpt_kernels.measure import BOTH, FORWARD

    unit, scale = f"G{m.work.unit}/s", 1e9
    ceiling = "the fastest large matrix product here" if m.work.unit == "FLOP" else "a copy of as many bytes"
    console.print(f"\n[bold]{m.workload.op}[/] {m.workload.shape} {str(m.dtype).removeprefix('torch.')}, "
                  f"{m.threads} thread{'s' if m.threads > 1 else ''}")  # fmt: skip
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("", "", "median", "±", unit, "of ceiling", "x torch"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for pass_, times in m.seconds.items():
        for i, name in enumerate(sorted(times, key=lambda name: timing.median(times[name]))):
            ratio, share = m.ratio(pass_, name), m.rate(pass_, name) / m.ceiling(pass_)
            table.add_row(
                "" if i else pass_, escape(name), _time(timing.median(times[name])), f"{100 * timing.spread(times[name]):.0f}%",
                f"{m.rate(pass_, name) / scale:.1f}", f"{100 * share:.0f}%", "" if ratio is None else f"{ratio:.2f}",
                style="green" if name == m.winner(pass_) else None,
            )  # fmt: skip
    console.print(table)
    ceilings = list(dict.fromkeys(f"{m.ceiling(pass_) / scale:.1f}" for pass_ in m.seconds))
    console.print(f"ceiling: {ceiling}, {' and '.join(ceilings)} {unit}", style="dim")
    console.print("fastest: " + "; ".join(f"{pass_} {escape(m.winner(pass_))}" for pass_ in m.seconds))
    picked = [f"{escape(m.auto(FORWARD))} forward"]
    picked += [f"{escape(m.auto(BOTH))} with gradients"] if BOTH in m.seconds else []
    console.print(f"auto picks {', '.join(picked)}")
    for name, why in m.wrong.items():
        console.print(f"[bold red]{escape(name)} is wrong and was not timed:[/] {escape(why)}")
    for name, why in m.refused.items():
        console.print(f"{escape(name)} was not timed: it {escape(why)}", style="dim")
    if m.gated is not None:
        console.print(
            f"correctness was checked at {m.gated.shape}: float64 would not fit into memory at full size", style="dim"
        )


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:.1f} µs" if seconds < 1e-3 else f"{1e3 * seconds:.2f} ms"


def as_json(m: Measurement) -> dict[str, Any]:
    """One measurement: figures by pass and backend, ceilings, winners, choices."""
    from tinygpt_kernels import timing

    passes = {}
    for pass_, times in m.seconds.items():
        figures = {
            name: {"seconds": timing.median(found), "spread": timing.spread(found), "rounds": len(found),
                   "rate": m.rate(pass_, name), "share_of_ceiling": m.rate(pass_, name) / m.ceiling(pass_),
                   "ratio_to_torch": m.ratio(pass_, name)} for name, found in times.items()
        }  # fmt: skip
        passes[pass_] = {
            "backends": figures,
            "ceiling": m.ceiling(pass_),
            "winner": m.winner(pass_),
            "auto": m.auto(pass_),
        }
    return {
        "op": m.workload.op, "shape": m.workload.shape, "dtype": str(m.dtype).removeprefix("torch."), "device": m.device,
        "threads": m.threads, "unit": f"{m.work.unit}/s", "passes": passes, "refused": m.refused, "wrong": m.wrong,
        "checked_at": (m.gated or m.workload).shape,
    }  # fmt: skip


def _list(as_json: bool) -> int:
    from dataclasses import asdict

    from tinygpt_kernels import saved

    found = saved.load()
    if as_json:
        print(json.dumps({identity: [asdict(e) for e in entries] for identity, entries in found.items()}, indent=1))
        return 0
    if not found:
        print(f"nothing was measured yet ({saved.path()} is absent or empty)")
    for identity, entries in found.items():
        print(identity)
        for entry in entries:
            print(f"  {told(entry)}")
    return 0


def told(entry: Entry) -> str:
    """One finding in a line: `gelu float32 C=512 R=768 with grad: cpp x2.31`."""
    words = [entry.op, entry.dtype, *(f"{name}={size}" for name, size in entry.dims), *entry.features]
    who = f"{entry.order[0]} x{entry.ratio:.2f}" if entry.order else "torch"
    return f"{' '.join(words)}{' with grad' if entry.grad else ''}: {who}"


def _clear() -> int:
    from tinygpt_kernels import saved

    print(f"deleted {saved.path()}" if saved.clear() else "nothing was measured yet", file=sys.stdout)
    return 0
