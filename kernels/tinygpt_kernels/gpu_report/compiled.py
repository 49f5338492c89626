"""Compiling for a GPU that is not here, and the figures of what came out.

`launches` runs a launcher on CPU tensors and compiles what it would have launched: the specialisation (which arguments are
divisible by 16, which are 1) is then the launcher's own, and it decides how wide memory is accessed. `kernel` compiles one
kernel from a description of its arguments.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from ..interpreter import asked_for
from ..triton_ops import common
from . import sass

Arch = int | str  # 80, 90, 100 ... of NVIDIA's, "gfx942" of AMD's
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Report:
    """One kernel compiled for one target.

    registers: of a thread. spill: bytes stored to local memory. shared: bytes of a block. code: None for AMD's targets.
    options: the launch's constants and numbers of warps and stages.
    """

    kernel: str
    arch: Arch
    options: Mapping[str, object]
    warps: int
    registers: int
    spill: int
    shared: int
    code: sass.Code | None

    @property
    def resident_warps(self) -> int:
        """Warps that one SM holds; the kernel's own number where the target's limits are not known here."""
        if not isinstance(self.arch, int) or self.arch not in sass.LIMITS:
            return self.warps
        return sass.resident_warps(self.arch, self.registers, self.shared, self.warps)[0]

    def figures(self) -> dict[str, Any]:
        """What is printed and held against budgets."""
        found: dict[str, Any] = {"registers": self.registers, "spill": self.spill, "shared": self.shared,
                                 "resident_warps": self.resident_warps}  # fmt: skip
        if self.code is None:
            return found
        loops = [s for s in self.code.loops if s.flop]
        if loops:
            found["non_mma_per_unit"] = [round(s.non_mma_per_unit or 0.0, 2) for s in loops]
        if self.code.tensor_core:
            found["tensor_core"] = self.code.tensor_core
        busiest = self.code.whole if self.code.tensor_core else self.code.busiest
        if busiest.wide_share is not None:
            found["wide_share"] = round(busiest.wide_share, 3)
        if not self.code.tensor_core and busiest.per_byte is not None:
            found["per_byte"] = round(busiest.per_byte, 2)
        return found


class _Driver:
    """Stands where Triton looks for the GPU's driver, and names the target."""

    def __init__(self, arch: Arch) -> None:
        self.target = _target(arch)
        self.device = arch if isinstance(arch, int) else sum(map(ord, arch))  # Triton keeps what it compiled per device

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, *_: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _target(arch: Arch) -> GPUTarget:
    return GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)


@contextlib.contextmanager
def _pretending(arch: Arch) -> Iterator[None]:
    if asked_for():
        raise RuntimeError("Triton's interpreter is on in this process; unset TRITON_INTERPRET to compile")
    driver = triton.runtime.driver
    before = driver._active, common.pretended
    driver.set_active(_Driver(arch))
    common.pretended = arch
    try:
        yield
    finally:
        driver._active, common.pretended = before


def launches(launch: Callable[[], object], arch: Arch) -> list[Report]:
    """Compile every kernel that `launch()` launches, as it launches them; nothing is executed, and nothing compiled twice.

    Args:
        launch: calls launchers with CPU tensors; what it computes is garbage.
        arch: compute capability times ten, or AMD's name of a target.
    """
    found: list[Report] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            compiled = run(self, *args, grid=grid, warmup=True, **options)
        if log.getvalue() or isinstance(arch, str):  # silent: the same kernel as before, compiled in this process
            found.append(_read(self.__name__, arch, options, compiled, log.getvalue()))

    with _pretending(arch), _complete_logs():
        JITFunction.run = compile_only
        try:
            launch()
        finally:
            JITFunction.run = run
    return found


def kernel(function: Any, arguments: Mapping[str, object], arch: Arch, **options: Any) -> Report:
    """Compile one kernel from a description of its arguments.

    Args:
        function: a @triton.jit function, decorated further or not.
        arguments: by name, a type as text ("*bf16:16": a pointer divisible by 16, "i32", "i32:16", "fp32"), or a constant.
        options: num_warps, num_stages.

    Raises:
        ValueError: an argument is not described.
    """
    while not isinstance(function, JITFunction):
        function = function.fn
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], object] = {}
    for i, parameter in enumerate(function.params):
        value = arguments.get(parameter.name, parameter.default)
        if value is parameter._param.empty:
            raise ValueError(f"{function.__name__} needs {parameter.name}: give its type or value")
        is_type = isinstance(value, str) and not parameter.is_constexpr
        kind, _, divisor = str(value).partition(":") if is_type else ("constexpr", "", "")
        signature[parameter.name] = kind
        if not is_type:
            constants[(i,)] = value
        elif divisor:
            attributes[(i,)] = [["tt.divisibility", int(divisor)]]
    log = io.StringIO()
    with _pretending(arch), _complete_logs(), contextlib.redirect_stdout(log):
        source = ASTSource(function, signature, constants, attributes)
        compiled = triton.compile(source, target=_target(arch), options=options)
    return _read(function.__name__, arch, {**arguments, **options}, compiled, log.getvalue())


@contextlib.contextmanager
def _complete_logs() -> Iterator[None]:
    knobs = triton.knobs
    before = knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log
    knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log = True, True
    try:
        yield
    finally:
        knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log = before


def _read(name: str, arch: Arch, options: Mapping[str, object], compiled: Any, log: str) -> Report:
    shown = {k: v for k, v in options.items() if k.isupper() or k.startswith("num_")}
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    if isinstance(arch, str):
        assembly = compiled.asm["amdgcn"]
        registers, spill = (int(re.search(rf"\.{key}:?\s+(\d+)", assembly)[1])  # type: ignore[index]
                            for key in ("vgpr_count", "vgpr_spill_count"))  # fmt: skip
        return Report(name, arch, shown, warps, registers, spill, shared, None)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text, usage = (subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
                       for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "--dump-resource-usage")))  # fmt: skip
    spilled = re.findall(r"(\d+) bytes spill stores", log)
    if not spilled:
        raise RuntimeError(f"ptxas said nothing of {name}'s spills:\n{log}")
    used = re.search(r"REG:(\d+)", usage)
    assert used, usage
    return Report(name, arch, shown, warps, int(used[1]), max(map(int, spilled)), shared, sass.parse(text))
