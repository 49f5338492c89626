"""`tinygpt gpu-report`: what Triton kernels become on GPUs that need not be here."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt_kernels.interpreter import VARIABLE

from ..errors import UserError
from .arguments import GpuReport, flat

if TYPE_CHECKING:
    from tinygpt_kernels.gpu_report.compiled import Report

_COLUMNS = {
    "registers": "regs", "spill": "spill B", "shared": "shared KB", "resident_warps": "warps/SM",
    "non_mma_per_unit": "non-MMA/unit", "per_byte": "instr/byte", "wide_share": "128-bit",
}  # fmt: skip


def plan(args: GpuReport) -> Callable[[], int]:
    """Check what needs no compiler, and return the report.

    Raises:
        UserError: a file that is not there, an argument that is no NAME=VALUE, an architecture that is none.
    """
    kernels = [_located(text) for text in args.kernels]
    arguments = dict(_described(text) for text in flat(args.args))
    if arguments and not kernels:
        raise UserError("--args describes a kernel of your own; name it as FILE:KERNEL")
    architectures = [_architecture(text) for text in args.arch]
    os.environ.pop(VARIABLE, None)  # an interpreted kernel cannot be compiled
    return lambda: _report(args, kernels, arguments, architectures)


def _located(text: str) -> tuple[Path, str]:
    file, colon, name = text.rpartition(":")
    if not colon or not name.isidentifier():
        raise UserError(f"{text!r} names no kernel; write FILE:KERNEL, for example my.py:add_kernel")
    if not Path(file).is_file():
        raise UserError(f"no such file: {file}")
    return Path(file), name


def _described(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UserError(f"--args {text!r} is not of the form NAME=TYPE or NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _architecture(text: str) -> int | str:
    if text.startswith("gfx"):
        return text
    if not text.isdecimal():
        raise UserError(f"--arch {text!r} is no architecture; write 80, 90 or 100, or a name of AMD's such as gfx942")
    return int(text)


def _report(
    args: GpuReport, kernels: list[tuple[Path, str]], arguments: dict[str, object], architectures: list[int | str]
) -> int:
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("triton is not installed; pip install triton (Linux)") from None
    found = _own(args.every, architectures) if not kernels else _others(kernels, arguments, architectures, args)
    if args.json:
        for name, report, figures in found:
            options = dict(report.options) if not kernels else {"warps": args.warps, "stages": args.stages}
            print(
                json.dumps({"kernel": name, "arch": report.arch, "options": options} | figures, default=str), flush=True
            )
        return 0
    _print_tables(found)
    return 0


def _own(every: bool, architectures: list[int | str]) -> Iterator[tuple[str, Report, dict[str, Any]]]:
    from tinygpt_kernels.gpu_report import shipped

    entries = shipped.ATTENTION + shipped.MEMORY_BOUND + (shipped.OTHERS if every else ())
    for arch in architectures:
        yield from shipped.reports(entries, arch)


def _others(
    kernels: list[tuple[Path, str]], arguments: dict[str, object], architectures: list[int | str], args: GpuReport
) -> Iterator[tuple[str, Report, dict[str, Any]]]:
    from tinygpt_kernels.gpu_report import compiled

    for path, name in kernels:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(path.resolve().parent))
        spec.loader.exec_module(module)
        function = getattr(module, name, None)
        if not hasattr(function, "fn"):
            raise UserError(f"{path} has no Triton kernel {name}")
        for arch in architectures:
            try:
                report = compiled.kernel(function, arguments, arch, num_warps=args.warps, num_stages=args.stages)
            except ValueError as error:
                raise UserError(f"{error}; add it to --args") from None
            yield name, report, report.figures()


def _print_tables(found: Iterator[tuple[str, Report, dict[str, Any]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    errors = Console(stderr=True)
    rows: dict[int | str, list[tuple[str, Report, dict[str, Any]]]] = {}
    with errors.status("compiling"):
        for name, report, figures in found:
            rows.setdefault(report.arch, []).append((name, report, figures))
            if errors.is_terminal:
                errors.print(f"[dim]{report.arch} {name}", highlight=False)
    for arch, kernels in rows.items():
        table = Table(title=str(arch) if isinstance(arch, str) else f"sm_{arch}", title_justify="left")
        table.add_column("kernel")
        table.add_column("tile, warps, stages")
        for heading in _COLUMNS.values():
            table.add_column(heading, justify="right")
        for name, report, figures in kernels:
            table.add_row(name, _tile(report), *(_shown(key, figures.get(key)) for key in _COLUMNS))
        console.print(table)
    console.print(
        "warps/SM: what one processor holds. non-MMA/unit: other instructions per 4096 tensor-core operations of a warp, each loop. "
        "instr/byte: thread-instructions per byte of device memory; an A100 issues 9.6, an H100 8.9 per byte it can move. "
        "128-bit: share of the accesses that are that wide."
    )


def _tile(report: Report) -> str:
    sizes = [str(v) for k, v in report.options.items() if k.startswith(("ROWS", "BLOCK")) and v and k != "BLOCK_D"]
    return f"{'x'.join(sizes)}, {report.warps}, {report.options.get('num_stages', '-')}"


def _shown(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key == "shared":
        return f"{value / 1024:.0f}"
    return " ".join(f"{v:.2f}" for v in value) if isinstance(value, list) else str(value)
