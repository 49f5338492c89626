"""Record a function that runs kernels over fixed buffers, and play it back without the Python between the kernels.

What a captured graph is on a GPU, for a CPU: checks, views and argument lists are the same at every call when the buffers are, so
they are made once. On a tape stand the calls of the compiled module, and PyTorch's operations that write into what they are
given. Views and fresh buffers are made once, while recording, and kept for as long as the tape: the addresses on it stay theirs.
An operation that returns something new each time cannot be played back; then there is no tape, and the function is called as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import attention, cross_entropy, embedding, gelu, layer_norm, linear
from .common import missing

if not missing:
    from .. import _C

_LAUNCHERS: tuple[ModuleType, ...] = (attention, cross_entropy, embedding, gelu, layer_norm, linear)
_FRESH = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::detach", "aten::alias")


class _Recorder(TorchDispatchMode):
    """Runs what it sees, and writes it down."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []
        self.kept: list[Any] = []
        self.refused: str | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch asks this of a mode. Skipping means importing torch._dynamo at the first call: 1 s and 180 MB for nothing."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.kept.append((args, kwargs, result))
        if func._schema.is_mutable:
            self.calls.append((func, args, kwargs or {}))
        elif not func.is_view and func._schema.name not in _FRESH:
            self.refused = self.refused or func._schema.name
        return result


class _Module:
    """The compiled module, each of whose calls is written down and made."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder

    def __getattr__(self, name: str) -> Any:
        function = getattr(_C, name)

        def call(*args: Any) -> Any:
            self._recorder.calls.append((function, args, {}))
            return function(*args)

        return call


def record(function: Callable[[], object]) -> Callable[[], None] | None:
    """Run `function` once, and return what does the same again; None where something in it cannot be played back.

    Args:
        function: runs kernels of backend `cpp` and operations of PyTorch on tensors that stay what and where they are.
            Other backends' kernels that are no operations of PyTorch's would go unseen.
    """
    recorder = _Recorder()
    try:
        for launcher in _LAUNCHERS:
            launcher._C = _Module(recorder)  # type: ignore[attr-defined]
        with torch.no_grad(), recorder:
            function()
    finally:
        for launcher in _LAUNCHERS:
            launcher._C = _C  # type: ignore[attr-defined]
    if recorder.refused:
        return None
    plain = [(call, args) for call, args, kwargs in recorder.calls if not kwargs]
    calls = recorder.calls

    if len(plain) == len(calls):

        def play() -> None:
            for call, args in plain:
                call(*args)
    else:

        def play() -> None:
            for call, args, kwargs in calls:
                call(*args, **kwargs)

    play.kept = recorder.kept  # type: ignore[attr-defined]
    return play
