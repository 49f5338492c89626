"""Compile a kernel for a GPU that is not here and read what came out. Run by test_compiled.py with the interpreter off.

Prints one JSON object per configuration: registers, spill, shared memory, and how wide global memory is accessed.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tinygpt_kernels.triton_ops import layer_norm

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
POINTERS = {
    "_layer_norm_fwd_kernel": ("x_ptr", "weight_ptr", "bias_ptr", "y_ptr"),
    "_layer_norm_bwd_kernel": ("dy_ptr", "x_ptr", "weight_ptr", "dx_ptr"),
}


def figures(name, dtype, C, arch):
    """Compile one kernel as the launcher would for this width and dtype."""
    kernel = getattr(layer_norm, name)
    ROWS, BLOCK_C, warps = layer_norm.tile(4096, C, backward="bwd" in name, interpreting=False)
    constants = {
        "HAS_BIAS": True,
        "NEED_DX": True,
        "NEED_DWEIGHT": True,
        "NEED_DBIAS": True,
        "ROWS": ROWS,
        "BLOCK_C": BLOCK_C,
    }
    signature, fixed, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        if parameter.name in constants:
            signature[parameter.name], fixed[(i,)] = "constexpr", constants[parameter.name]
        elif parameter.name.endswith("_ptr"):
            signature[parameter.name] = f"*{dtype if parameter.name in POINTERS[name] else 'fp32'}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif parameter.name == "eps":
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if parameter.name != "R" and C % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    hip = isinstance(arch, str)
    target = GPUTarget("hip", arch, 64) if hip else GPUTarget("cuda", arch, 32)
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            ASTSource(kernel, signature, fixed, attributes), target=target, options={"num_warps": warps}
        )
    found = {
        "kernel": name,
        "dtype": dtype,
        "C": C,
        "arch": arch,
        "tile": [ROWS, BLOCK_C, warps],
        "shared": compiled.metadata.shared,
    }
    if hip:
        found["spill"] = int(re.search(r"vgpr_spill_count:?\s+(\d+)", compiled.asm["amdgcn"])[1])
        return found
    spill = re.search(r"(\d+) bytes spill stores", log.getvalue())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    widths = [
        int(w) if w else 32
        for w in re.findall(r"\b(?:LDG|STG)\.E(?:\.(?:EF|EL|LU|NA|CONSTANT|U16|S16))*(?:\.(64|128))?", sass)
    ]
    narrow = len(re.findall(r"\b(?:LDG|STG)\.E(?:\.\w+)*?\.[US]16", sass))
    total = sum(widths) - 16 * narrow
    return found | {"registers": int(re.search(r"REG:(\d+)", usage)[1]), "spill": int(spill[1]) if spill else 0,
                    "wide_share": round(sum(w for w in widths if w == 128) / total, 3)}  # fmt: skip


if __name__ == "__main__":
    for arch in (80, 90, 100, "gfx942"):
        for name in POINTERS:
            for dtype in ("bf16", "fp32"):
                for C in (768, 1023, 4096):
                    if arch in (80, 90) or C == 768:
                        print(json.dumps(figures(name, dtype, C, arch)))
                        sys.stdout.flush()
