"""Triton without a GPU: its interpreter, and when that has to be decided. Imports neither torch nor triton.

Triton reads TRITON_INTERPRET when a kernel is defined, its own library functions included: so the choice must stand before
anything imports `triton.language`, and torch does (constructing an optimizer, torch.compile). A command line decides
before it imports torch (`decide`). A library must not flip a switch of the whole process behind its user's back: there,
asking for Triton on a CPU says what to set (`unavailable`).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

VARIABLE = "TRITON_INTERPRET"


@lru_cache(maxsize=1)
def gpu_present() -> bool:
    """Whether an NVIDIA or AMD driver is here with at least one device."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            cuda = ctypes.CDLL(library)
        except OSError:
            continue
        count = ctypes.c_int(0)
        if cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0:
            return True
    return Path("/dev/kfd").exists()


def asked_for() -> bool:
    """Whether the environment asks for the interpreter."""
    return os.environ.get(VARIABLE, "0").lower() in ("1", "true", "on", "yes", "y")


def decide(backends: Iterable[str]) -> str | None:
    """Turn the interpreter on where `triton` is asked for and no GPU is present. Call it before torch is imported.

    Returns:
        a line for the user when Triton will be interpreted, else None.
    """
    if "triton" not in backends or (gpu_present() and not asked_for()):
        return None
    os.environ[VARIABLE] = "1"
    reason = "is set" if gpu_present() else "no GPU is present"
    return (
        f"triton: {VARIABLE}=1 since {reason}: kernels run in Triton's interpreter, for correctness and not for speed"
    )


def interpreting() -> bool:
    """Whether kernels defined now will be interpreted, and Triton's own functions were too."""
    if "triton.language" not in sys.modules:
        return asked_for()
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return asked_for() and isinstance(tl.sum, InterpretedFunction)


def unavailable(device_type: str) -> str | None:
    """Why Triton cannot run on this type of device in this process, with the remedy; None when it can."""
    if device_type == "cuda" or interpreting():
        return None
    if asked_for():
        return f"{VARIABLE}=1 was set after triton was imported; set it in the environment before Python starts"
    return (
        f"compiles for GPUs; on a CPU it needs Triton's interpreter: set {VARIABLE}=1 before Python starts, "
        "or use the command line's --backend triton, which does"
    )
