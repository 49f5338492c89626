"""tinygpt: a GPT small enough to read in an afternoon, on interchangeable kernels.

>>> from tinygpt import GPT
>>> model = GPT.from_run("runs/shakespeare")

`import tinygpt` imports nothing else: help texts and argument errors must not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import RunConfig
    from .models.gpt import GPT

__version__ = "0.1.0"
__all__ = ["GPT", "RunConfig", "__version__"]

_HOME = {"GPT": "models.gpt", "RunConfig": "config"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
