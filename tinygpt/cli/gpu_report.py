"""`tinygpt gpu-report`: what Triton and CUDA kernels become on GPUs that need not be here."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt_kernels.interpreter import VARIABLE

from ..errors import UserError
from .arguments import GpuReport, flat

if TYPE_CHECKING:
    from tinygpt_kernels.gpu_report.compiled import Report

_BACKENDS = ("triton", "cuda")


def plan(args: GpuReport) -> Callable[[], int]:
    """Check what needs no compiler, and return the report.

    Raises:
        UserError: a file that is not there, an argument that is no NAME=VALUE, an architecture that is none, a backend without
            kernels for GPUs.
    """
    kernels = [_located(text) for text in args.kernels]
    arguments = dict(_described(text) for text in flat(args.args))
    if arguments and not kernels:
        raise UserError("--args describes a kernel of your own; name it as FILE:KERNEL")
    backends = flat(args.backend)
    for name in backends:
        if name not in _BACKENDS:
            raise UserError(f"--backend {name}: there are kernels for GPUs of {' and '.join(_BACKENDS)}")
    if backends and kernels:
        raise UserError("--backend chooses among this project's kernels; leave it out where you name your own")
    architectures = [_architecture(text) for text in args.arch]
    os.environ.pop(VARIABLE, None)  # an interpreted kernel cannot be compiled
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton's default, which warns that it will change
    return lambda: _report(args, kernels, arguments, architectures, backends or _BACKENDS)


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
    args: GpuReport, kernels: list[tuple[Path, str]], arguments: dict[str, object], architectures: list[int | str],
    backends: Sequence[str],
) -> int:  # fmt: skip
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("triton is not installed; pip install triton (Linux)") from None
    found = (
        _own(backends, args.every, architectures) if not kernels else _others(kernels, arguments, architectures, args)
    )
    if args.json:
        for name, report, figures in found:
            options = dict(report.options) if not kernels else {"warps": args.warps, "stages": args.stages}
            print(
                json.dumps({"kernel": name, "arch": report.arch, "options": options} | figures, default=str), flush=True
            )
        return 0
    for name, report, figures in found:
        _print(name, report, figures)
    print(_LEGEND)
    return 0


def _own(
    backends: Sequence[str], every: bool, architectures: list[int | str]
) -> Iterator[tuple[str, Report, dict[str, Any]]]:
    from tinygpt_kernels.gpu_report import cuda, shipped

    entries = shipped.ATTENTION + shipped.MEMORY_BOUND + (shipped.OTHERS if every else ())
    for arch in architectures:
        if "triton" in backends:
            yield from shipped.reports(entries, arch)
        for report in cuda.reports(arch) if "cuda" in backends and isinstance(arch, int) else ():
            figures = report.figures()
            figures.pop("per_byte", None)  # of loops whose lengths the code does not tell
            yield report.kernel, report, figures


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


_LEGEND = """
warps per SM: what one processor holds of them.
non-MMA per unit: other instructions per 4096 tensor-core operations of a warp, for each loop.
per byte: thread-instructions per byte of device memory. An A100 issues 9.6 per byte it can move, an H100 8.9.
128-bit: share of the accesses that are that wide.
name.cu: CUDA C++, as it lies in the compiled module; all others are Triton's."""


def _print(name: str, report: Report, figures: dict[str, Any]) -> None:
    arch = report.arch if isinstance(report.arch, str) else f"sm_{report.arch}"
    options = dict(report.options)
    if rest := options.pop("BLOCK_B", None):  # a row in two parts
        options["BLOCK_A"] = f"({options['BLOCK_A']}+{rest})"
    sizes = [str(v) for k, v in options.items() if k.startswith(("ROWS", "BLOCK")) and v and k != "BLOCK_D"]
    stages = report.options.get("num_stages")
    how = [f"tile {'x'.join(sizes)}"] if sizes else []
    how.append(f"{report.warps} warps" if report.warps > 1 else "1 warp")
    if stages:
        how.append(f"{stages} stages")
    needs = [f"{report.registers} registers", f"spill {report.spill} B", f"shared {report.shared / 1024:.0f} KB",
             f"{report.resident_warps} warps per SM"]  # fmt: skip
    does = []
    if "non_mma_per_unit" in figures:
        does.append("non-MMA per unit " + " ".join(f"{v:.2f}" for v in figures["non_mma_per_unit"]))
    if "tensor_core" in figures:
        does.append(" ".join(figures["tensor_core"]))
    if "per_byte" in figures:
        does.append(f"per byte {figures['per_byte']:.2f}")
    if "wide_share" in figures:
        does.append(f"128-bit {figures['wide_share']:.2f}")
    print(f"{arch}  {name}\n    {', '.join(how)}: {', '.join(needs)}", flush=True)
    if does:
        print(f"    {', '.join(does)}", flush=True)
