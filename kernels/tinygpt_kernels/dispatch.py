"""Choosing who computes: the calls made to ops, the implementations that may serve them, and one function that picks.

A backend registers an `Impl` per op: two pure functions (`fwd`, `bwd`) or one differentiable function (`call`), and what it
can serve as data. A `Call` is data too, so a machine without a GPU can ask what an H100 would choose.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from . import preferences
from .products import Products
from .spec import BUILTIN, known_backends, plugins, unknown

if TYPE_CHECKING:
    from .op import Op


class BackendError(RuntimeError):
    """No backend of those asked for can serve a call; the message names the call, each reason, and who is able."""


@dataclass(frozen=True)
class Call:
    """What a choice depends on; pure data, so that any machine can ask what another would choose."""

    op: str
    device: str
    dtype: torch.dtype
    grad: bool
    dims: tuple[tuple[str, int], ...] = ()
    features: tuple[str, ...] = ()
    sm: int | None = None
    autograd: bool = True  # False: the pair of kernels is driven by itself, and costs no autograd node

    @property
    def device_type(self) -> str:
        return self.device.partition(":")[0]

    def __str__(self) -> str:
        dims = "".join(f" {name}={size}" for name, size in self.dims)
        features = "".join(f" {feature}" for feature in self.features)
        return f"{self.device} {_short(self.dtype)}{dims}{features}{' with grad' if self.grad else ''}"


@dataclass(frozen=True)
class Impl:
    """One backend's implementation of one op, and what it can serve.

    Either `fwd` and, where gradients are served, `bwd`, on flat arguments (tensors first, then the rest):
        fwd(*tensors, *rest, out=None) -> (*outputs, *saved)
        bwd(*grad_outputs, *tensors, *kept, *rest, needs=..., out=None) -> a gradient or None per tensor argument
    (kept: what the forward saved, after the outputs where the op saves them; needs: a bool per tensor argument), or
    `call(*tensors, *rest) -> outputs`, differentiable through PyTorch's own autograd.

    dims: sizes served, by name: an inclusive range `(low, high)` or a set of values.
    without: features of a call that are not served, each with its reason (None: no better reason than "not implemented").
    refuse: a pure function for what data cannot say; returns a reason or None.
    """

    op: str
    backend: str
    fwd: Callable[..., tuple[torch.Tensor, ...]] | None = None
    bwd: Callable[..., tuple[torch.Tensor | None, ...]] | None = None
    call: Callable[..., Any] | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    dims: Mapping[str, tuple[int, int] | frozenset[int]] = field(default_factory=dict)
    min_sm: int | None = None
    without: Mapping[str, str | None] = field(default_factory=dict)
    refuse: Callable[[Call], str | None] | None = None

    def __post_init__(self) -> None:
        if (self.fwd is None) == (self.call is None):
            raise ValueError(f"{self.op} on {self.backend}: give either fwd (and bwd) or call")

    def reason(self, call: Call) -> str | None:
        """Why this implementation cannot serve `call`; None when it can. Pure: looks at nothing but its arguments."""
        if call.device_type not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not {call.device_type}"
        if call.dtype not in self.dtypes:
            return f"takes {', '.join(map(_short, self.dtypes))}, not {_short(call.dtype)}"
        if self.min_sm and call.sm and call.sm < self.min_sm:
            return f"needs compute capability {self.min_sm / 10:.1f}; this GPU has {call.sm / 10:.1f}"
        if call.grad and self.fwd and not self.bwd:
            return "has no backward"
        for name, size in call.dims:
            allowed = self.dims.get(name)
            if isinstance(allowed, frozenset) and size not in allowed:
                return f"{name}={size} is not one of {', '.join(map(str, sorted(allowed)))}"
            if isinstance(allowed, tuple) and not allowed[0] <= size <= allowed[1]:
                return f"{name}={size} is not within {allowed[0]} to {allowed[1]}"
        for feature in call.features:
            if feature in self.without:
                return self.without[feature] or f"does not implement {feature}"
        return self.refuse(call) if self.refuse else None


@dataclass(frozen=True)
class Backend:
    """A backend as such: whether it can run on a type of device in this process now, whatever the call."""

    name: str
    unavailable: Callable[[str], str | None] = lambda device_type: None
    products: Products | None = None


impls: dict[tuple[str, str], Impl] = {}
backends: dict[str, Backend] = {}
_absent: dict[str, str] = {}  # backend -> why its module could not be imported
ops: dict[str, Op] = {}


def register_backend(
    name: str, unavailable: Callable[[str], str | None] | None = None, products: Products | None = None
) -> None:
    """Announce a backend.

    Args:
        unavailable: given a device type, the reason, with the remedy, why the backend cannot run here; None when it can.
        products: the backend's own matrix products for a step that is written out; None: PyTorch's.
    """
    backends[name] = Backend(name, unavailable or (lambda device_type: None), products)


def register(impl: Impl) -> None:
    """Add one implementation; a backend module calls this once per op when it is imported."""
    if impl.op not in all_ops():
        raise ValueError(unknown("op", impl.op, all_ops()))
    backends.setdefault(impl.backend, Backend(impl.backend))
    impls[impl.op, impl.backend] = impl


def all_ops() -> dict[str, Op]:
    """Every declared op by name."""
    importlib.import_module("tinygpt_kernels.ops")
    return ops


def load_backend(name: str) -> str | None:
    """Import the module behind a backend, once. Returns why that is impossible here, None when it is loaded.

    Only a missing optional package is a reason; any other error in a backend's module is a bug and is raised.
    """
    if name in backends:
        return None
    if name not in _absent:
        try:
            if name in BUILTIN:
                importlib.import_module(BUILTIN[name])
            elif name in plugins():
                plugins()[name].load()
            else:
                raise ValueError(unknown("backend", name, known_backends()))
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "triton":
                raise
            _absent[name] = "triton is not installed; pip install triton (Linux)"
        else:
            backends.setdefault(name, Backend(name))
            return None
    return _absent[name]


def reason(backend: str, call: Call, *, anywhere: bool = False) -> str | None:
    """Why `backend` cannot serve `call`; None when it can. `anywhere` leaves out what this machine lacks and asks the data alone."""
    absent = load_backend(backend)
    if absent:
        return absent
    if not anywhere:
        unavailable = backends[backend].unavailable(call.device_type)
        if unavailable:
            return unavailable
    impl = impls.get((call.op, backend))
    if impl is None:
        return f"has no {call.op}"
    return impl.reason(call)


def choose(call: Call, order: Sequence[str], *, anywhere: bool = False) -> Impl:
    """The first implementation of `order` that serves `call`.

    Raises:
        BackendError: none does; says why for each, and who would.
    """
    candidates = list(
        dict.fromkeys(c for name in order for c in (preferences.order(call) if name == "auto" else (name,)))
    )
    reasons: dict[str, str] = {}
    for name in candidates:
        why = reason(name, call, anywhere=anywhere)
        if why is None:
            return impls[call.op, name]
        reasons[name] = why
    width = max(len(name) for name in (*reasons, "call", "able")) + 2
    able = [
        n for n in known_backends() if n not in ("reference", *reasons) and reason(n, call, anywhere=anywhere) is None
    ]
    lines = [f"{call.op}: {_listed(candidates)} cannot serve this call", f"  {'call':<{width}}{call}"]
    lines += [f"  {name:<{width}}{why}" for name, why in reasons.items()]
    lines.append(f"  {'able':<{width}}{', '.join(able) + '; ' if able else ''}'reference' always serves")
    raise BackendError("\n".join(lines))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(names: Iterable[str]) -> str:
    quoted = [f"'{name}'" for name in names]
    return f"backend {quoted[0]}" if len(quoted) == 1 else f"backends {', '.join(quoted)}"
