"""The CUDA kernels of the compiled module, as nvcc left them in it: read from the file, so that no nvcc is needed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from ..native.common import missing
from . import sass
from .compiled import TOOLS, Report

_TYPES = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}
_USAGE = re.compile(r" Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_TEXT = re.compile(r"^\.text\.(\S+):$", re.MULTILINE)
_THREADS = re.compile(r"EIATTR_MAX_THREADS.*?\.word\s+0x([0-9a-f]+)", re.DOTALL)


def reports(arch: int, file: Path | None = None) -> list[Report]:
    """Every CUDA kernel of the module for one architecture; none where the module was built without them, or not for it.

    A report's `spill` is the bytes of stack a thread needs: with none there is no spill.

    Args:
        file: another build of the module.
    """
    if file is None:
        if missing:
            return []
        from .. import _C

        file = Path(_C.__file__)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([TOOLS / "cuobjdump", "-xelf", f"sm_{arch}", file.resolve()], cwd=folder, capture_output=True)
        for cubin in sorted(Path(folder).glob(f"*sm_{arch}.cubin")):
            used, text = (
                subprocess.run([TOOLS / tool, *options, cubin], capture_output=True, text=True, check=True).stdout
                for tool, options in (("cuobjdump", ["--dump-resource-usage"]), ("nvdisasm", []))
            )
            usage = {name: tuple(map(int, numbers)) for name, *numbers in _USAGE.findall(used)}
            parts = _TEXT.split(text)
            for name, code in zip(parts[1::2], parts[2::2], strict=True):
                registers, stack, shared = usage[name]
                options: dict[str, object] = {}
                threads = _THREADS.search(text[text.index(f".nv.info.{name}") :])
                found.append(Report(readable(name), arch, options, int(threads[1], 16) // 32 if threads else 1, registers, stack,
                                    shared, sass.parse(code)))  # fmt: skip
    return sorted(found, key=lambda report: report.kernel)


def readable(mangled: str) -> str:
    """`layer_norm.cu backward<bfloat16, true>` for the name that the compiler made of it."""
    rest, parts = mangled.removeprefix("_ZN"), []
    while length := re.match(r"\d+", rest):
        start = length.end()
        parts.append(rest[start : start + int(length[0])])
        rest = rest[start + int(length[0]) :]
    file = next(
        (re.sub(r"^_GLOBAL__N__[0-9a-f]+_\d+_(\w+)_cu_[0-9a-f_]+$", r"\1.cu ", p) for p in parts if "GLOBAL__N" in p),
        "",
    )
    given = []
    if rest.startswith("I"):
        for kind, boolean, number in re.findall(
            r"(f|6__half|13__nv_bfloat16)|Lb([01])E|Li(\d+)E", rest[1 : rest.index("EE") + 1]
        ):
            given.append(_TYPES.get(kind) or (("false", "true")[int(boolean)] if boolean else number))
    return file + parts[-1] + (f"<{', '.join(given)}>" if given else "")
