"""Triton's interpreter remembers what it replaces.

Triton 3.8 and 3.9 look through all of triton.language before each launch and before each call of one jitted function by another,
tl.sum and tl.max included: a fifth of the time of kernels as small as tests have them (73 s against 58 for tests/kernels/test_parity.py
and tests/triton/test_attention.py, one after the other on one machine). What is found there never changes.
"""

from __future__ import annotations

import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_found: dict[object, list[tuple[str, Any]]] = {}  # of a module or class, its builtins as Triton wrote them


def patch() -> None:
    """Make the interpreter's search a look-up. Once or often, it is the same; a Triton that searches otherwise is left alone."""
    if hasattr(interpreter, "_patch_builtin") and hasattr(interpreter, "_patch_attr"):
        interpreter._patch_builtin = _patch_builtin


def _patch_builtin(package: object, *builder_and_scope: Any) -> None:
    if package not in _found:
        # Only the first search, which comes before anything is replaced, sees them all.
        _found[package] = [(name, x) for name, x in inspect.getmembers(package) if tl.core.is_builtin(x)]
    for name, builtin in _found[package]:
        if getattr(package, name) is builtin:  # else a launch that goes on has replaced it
            interpreter._patch_attr(package, name, builtin, *builder_and_scope)
