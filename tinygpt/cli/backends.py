"""`tinygpt backends`: who can compute what here, why not, what would help, and what `auto` picks.

All of it is asked of the dispatcher, with the calls that the ops' named cases make.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from tinygpt_kernels.spec import known_backends, parse_spec

from .arguments import Backends

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tinygpt_kernels.dispatch import Call
    from tinygpt_kernels.op import Kernels

_LIKELY_SM = 80  # what is assumed of a GPU that is not here


@dataclass(frozen=True)
class Cell:
    """One op on one backend. reason: why it does not serve. limits: why it does not serve calls with some options."""

    implemented: bool
    reason: str | None
    limits: dict[str, str]


def plan(args: Backends) -> Callable[[], int]:
    """There is nothing to check."""
    return lambda: _show(args)


def tell_idle(spec: str, device: str) -> None:
    """Say on stderr why a backend that was asked for can serve nothing on a type of device, so that others will."""
    for name in sorted(parse_spec(spec).backends() - {"auto"}):
        if why := unavailable(name, device):
            print(f"tinygpt: backend {name} will serve nothing on {device}: {why}", file=sys.stderr)


def tell_served(spec: str, kernels: Kernels) -> None:
    """Say on stderr who computed what, if a backend was asked for: `layer_norm on cpp; embedding, gelu on torch`."""
    if spec == "auto":
        return
    ops: dict[str, list[str]] = {}
    for op, backends in kernels.served().items():
        ops.setdefault("+".join(backends), []).append(op)
    told = "; ".join(f"{', '.join(names)} on {backend}" for backend, names in ops.items())
    print(f"tinygpt: backend {spec}: {told}", file=sys.stderr)


def _show(args: Backends) -> int:
    import torch

    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    if args.json:
        print(json.dumps(_as_json(devices[0]), indent=1))
        return 0
    from rich.console import Console

    console = Console(highlight=False)
    for device in devices:
        _print_device(console, device)
    _print_auto(console, devices)
    return 0


def _as_json(device: str) -> dict[str, object]:
    """op -> backend -> serves and reason, on the device that training would use; and by name `auto`, what was measured on this
    machine, and `backends`."""
    from tinygpt_kernels import saved

    table: dict[str, object] = {
        op: {name: {"serves": cell.reason is None, "reason": cell.reason} for name, cell in row.items()}
        for op, row in _cells(device).items()
    }
    auto = {kind: {op: _auto(op, kind) for op in _calls(kind)} for kind in ("cpu", "cuda")}
    measured = {kind: [asdict(entry) for entry in saved.here(kind)] for kind in ("cpu", "cuda")}
    return table | {
        "auto": auto,
        "measured here": measured,
        "backends": {name: unavailable(name, device) for name in known_backends()},
    }


def _print_device(console: Console, device: str) -> None:
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    names = known_backends()
    table = Table(title=f"Who serves what on {_described(device)}", title_justify="left", title_style="bold")
    table.add_column("op", no_wrap=True)
    for name in names:
        table.add_column(escape(name), justify="center", no_wrap=True)
    notes: dict[str, int] = {}
    limited = False
    for op, row in _cells(device).items():
        shown = []
        for cell in row.values():
            if not cell.implemented:
                shown.append(Text("–", style="dim"))
            elif cell.reason:
                shown.append(Text(f"✗ {notes.setdefault(cell.reason, len(notes) + 1)}", style="red"))
            else:
                limited |= bool(cell.limits)
                shown.append(Text("✓*" if cell.limits else "✓", style="green"))
        table.add_row(op, *shown)
    console.print(table)
    _legend(console, device, notes, limited)


def _legend(console: Console, device: str, notes: dict[str, int], limited: bool) -> None:
    from tinygpt_kernels import native

    rows = [("✓", "serves"), ("–", "has no such op; with --backend, torch serves it instead unless --strict")]
    rows += [(f"✗ {number}", reason) for reason, number in notes.items()]
    if device == "cpu" and native.isa():
        others = [name for name in native.isas() if name != native.isa()]
        remedy = f"; {native.VARIABLE}={others[-1]} in the environment forces another" if others else ""
        rows.append(("cpp", f"computes with its {native.isa()} kernels (of {', '.join(native.isas())}){remedy}"))
    absent = {name: why for name in known_backends() if (why := unavailable(name, device)) and why not in notes}
    rows += list(absent.items())
    if limited:
        limits: dict[tuple[str, str, str], list[str]] = {}
        for op, row in _cells(device).items():
            for name, cell in row.items():
                for option, why in cell.limits.items() if cell.reason is None else ():
                    limits.setdefault((name, option, why), []).append(op)
        rows += [
            ("✓*", f"serves, but not with {option} ({name}: {', '.join(ops)}): it {why}")
            for (name, option, why), ops in limits.items()
        ]
    console.print(_listing(rows))


def _print_auto(console: Console, devices: list[str]) -> None:
    from tinygpt_kernels import interpreter, preferences, saved

    from .bench import told

    console.print("\n[bold]What auto picks, in the sizes of the presets[/]")
    rows = []
    for kind in ("cpu", "cuda"):
        text = _picks(kind)
        if not preferences.measured(kind):
            text += " (nothing has been measured on such a device yet"
            text += "; `tinygpt bench --save` will measure this one)" if kind in devices else ")"
        elif " or " in text:
            text += " (by size, as measured)"
        rows.append((_described(kind) if kind in devices else f"{kind} (none here)", text))
        if (written_out := _picks(kind, autograd=False)) != _picks(kind):
            rows.append(("", f"in a training step without autograd, {written_out}"))
        rows += [("", f"measured here: {told(entry)}") for entry in saved.here(kind)]
    rows.append(("reference", "never picked; serves when it is asked for by name"))
    console.print(_listing(rows))
    if not interpreter.gpu_present():
        console.print(
            "\nThere is no GPU here: `--backend triton` runs Triton's kernels in its interpreter, for correctness and "
            "not for speed."
        )


def _picks(kind: str, *, autograd: bool = True) -> str:
    """`cpp: gelu; torch: layer_norm`, or `torch for every op`: what `auto` picks for the sizes of the presets."""
    picks: dict[str, list[str]] = {}
    for op in _calls(kind):
        if autograd or _calls(kind)[op][0].grad:
            picks.setdefault(" or ".join(_auto(op, kind, autograd=autograd)), []).append(op)
    if len(picks) == 1:
        return f"{next(iter(picks))} for every op"
    return "; ".join(f"{who}: {', '.join(ops)}" for who, ops in picks.items())


def _listing(rows: list[tuple[str, str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in rows:
        table.add_row(label, Text(text))
    return table


def _cells(device: str) -> dict[str, dict[str, Cell]]:
    """op -> backend -> what the dispatcher says of the op's calls on that type of device."""
    from tinygpt_kernels import dispatch

    for name in known_backends():
        dispatch.load_backend(name)
    cells: dict[str, dict[str, Cell]] = {}
    for op, calls in _calls(device).items():
        cells[op] = {}
        plain = calls[0].features
        for name in known_backends():
            implemented = (op, name) in dispatch.impls
            # Of what is not there, only that it is not there: no remedy for this machine would change it.
            answers = {call: dispatch.reason(name, call, anywhere=not implemented) for call in calls}
            reasons = {call: why for call, why in answers.items() if why is not None}
            refused = [why for call, why in reasons.items() if call.features == plain]
            # A call with two options may be refused for one of them, which a simpler call has told already.
            limits = {
                _options(call, plain): why
                for call, why in reasons.items()
                if call.features != plain
                and not any(other != call and w == why and set(plain) < set(other.features) < set(call.features)
                            for other, w in reasons.items())
            }  # fmt: skip
            cells[op][name] = Cell(implemented, refused[0] if refused else None, limits)
    return cells


@lru_cache
def _calls(device: str) -> dict[str, list[Call]]:
    """The float32 calls that each op's cases make, on a type of device; the plainest first."""
    import torch

    from tinygpt_kernels import dispatch
    from tinygpt_kernels.cases import CASES
    from tinygpt_kernels.parity import call_of

    name, sm = device, None
    if device == "cuda":
        name, sm = "cuda:0", _LIKELY_SM
        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            sm = 10 * major + minor if torch.version.cuda else None
    found: dict[str, dict[Call, None]] = {}
    for case in CASES:
        call = call_of(dispatch.all_ops()[case.op], case, torch.float32)
        found.setdefault(case.op, {})[replace(call, device=name, sm=sm)] = None
    return {op: list(calls) for op, calls in found.items()}


def _auto(op: str, device: str, *, autograd: bool = True) -> list[str]:
    """Backends that `auto` picks for an op in the presets' sizes; more than one where it depends on sizes."""
    import torch

    from tinygpt_kernels import dispatch, workloads

    absent = device == "cuda" and not torch.cuda.is_available()
    call, plain = _calls(device)[op][0], []
    for workload in workloads.default_workloads(op, device):
        sizes = dict(workload.sizes)
        sizes.setdefault("R", sizes.get("B", 1) * sizes.get("T", 1))
        dims = tuple((name, int(sizes.get(name, size))) for name, size in call.dims)
        plain.append(replace(call, dims=dims, autograd=autograd))
    return list(dict.fromkeys(dispatch.choose(call, ("auto",), anywhere=absent).backend for call in plain))


def unavailable(name: str, device: str) -> str | None:
    """Why a backend can serve nothing at all on a type of device here; None when it can serve something."""
    from tinygpt_kernels import dispatch

    reason = dispatch.load_backend(name) or dispatch.backends[name].unavailable(device)
    if reason:
        return reason
    devices = sorted({kind for (_, owner), impl in dispatch.impls.items() if owner == name for kind in impl.devices})
    return None if device in devices else f"runs on {' and '.join(devices) or 'nothing yet'}, not {device}"


def _options(call: Call, plain: tuple[str, ...]) -> str:
    return ", ".join(feature for feature in call.features if feature not in plain) or "without causal"


def _described(device: str) -> str:
    import torch

    from tinygpt_kernels import preferences

    if device == "cuda":
        return f"cuda ({torch.cuda.get_device_name()})"
    return f"{device} ({preferences.cpu_isa()})"
