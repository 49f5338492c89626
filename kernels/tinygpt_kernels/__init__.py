"""Transformer operations in interchangeable implementations behind one interface.

>>> from tinygpt_kernels import ops
>>> y = ops.layer_norm(x, weight, bias)                 # the fastest implementation measured for this call
>>> y = ops.layer_norm.on("triton")(x, weight, bias)    # this one, or an error that says why not

`import tinygpt_kernels` itself imports nothing, torch included: `spec` and `interpreter` have to be
usable before torch is.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops
    from .dispatch import BackendError, Impl, register, register_backend
    from .op import Kernels, bind

__all__ = ["BackendError", "Impl", "Kernels", "bind", "ops", "register", "register_backend"]

_HOME = dict.fromkeys(("BackendError", "Impl", "register", "register_backend"), "dispatch")
_HOME |= dict.fromkeys(("Kernels", "bind"), "op")


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module(".ops", __name__)
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
