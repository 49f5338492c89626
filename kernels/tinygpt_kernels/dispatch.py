"""Choosing who computes: ops, the calls made to them, the implementations that may serve, and one function that picks.

An `Op` is declared once, in ops.py, by its reference. Backends register an `Impl` per op: two pure functions (`fwd`, `bwd`)
or one differentiable function (`call`), and what it can serve as data. `Op.on(spec)` gives a `BoundOp`, which describes each
call by a small key (device, dtype, gradient, sizes), looks the key up, and only on a key it never saw walks the candidates.

What a call costs above the kernel function (measured by benchmarks/bench_overhead.py) is that key: so a key holds no object
made per call but itself, and the checks of an op live in its `describe`, next to the sizes they read anyway.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch

from . import autograd, preferences
from .spec import BUILTIN, Spec, known_backends, parse_spec, plugins, unknown

Results = Any  # a tensor or a tuple of tensors, as the op's contract says
_CACHE_LIMIT = 4096  # distinct calls a BoundOp remembers: generation with every length to 2048 fits, a leak does not


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

    Either `fwd` and, where gradients are served, `bwd`:
        fwd(*arguments, out=None) -> (*outputs, *saved)
        bwd(*grad_outputs, *tensor arguments, *saved, *other arguments, needs=..., out=None) -> a gradient or None per tensor argument
    or `call(*arguments) -> outputs`, differentiable through PyTorch's own autograd.

    dims: sizes served, by name: an inclusive range `(low, high)` or a set of values.
    without: features of a call that are not served, each with its reason (None: no better reason than "not implemented").
    refuse: a pure function for what data cannot say; returns a reason or None.
    """

    op: str
    backend: str
    fwd: Callable[..., tuple[torch.Tensor, ...]] | None = None
    bwd: Callable[..., tuple[torch.Tensor | None, ...]] | None = None
    call: Callable[..., Results] | None = None
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


_impls: dict[tuple[str, str], Impl] = {}
_backends: dict[str, Backend] = {}
_absent: dict[str, str] = {}  # backend -> why its module could not be imported
_ops: dict[str, Op] = {}


def register_backend(name: str, unavailable: Callable[[str], str | None] | None = None) -> None:
    """Announce a backend. `unavailable(device type)` gives the reason, with the remedy, why it cannot run here; None when it can."""
    _backends[name] = Backend(name, unavailable) if unavailable else Backend(name)


def register(impl: Impl) -> None:
    """Add one implementation; a backend module calls this once per op when it is imported."""
    if impl.op not in all_ops():
        raise ValueError(unknown("op", impl.op, all_ops()))
    _backends.setdefault(impl.backend, Backend(impl.backend))
    _impls[impl.op, impl.backend] = impl


def all_ops() -> dict[str, Op]:
    """Every declared op by name."""
    importlib.import_module("tinygpt_kernels.ops")
    return _ops


def load_backend(name: str) -> str | None:
    """Import the module behind a backend, once. Returns why that is impossible here, None when it is loaded.

    Only a missing optional package is a reason; any other error in a backend's module is a bug and is raised.
    """
    if name in _backends:
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
            _backends.setdefault(name, Backend(name))
            return None
    return _absent[name]


def reason(backend: str, call: Call, *, anywhere: bool = False) -> str | None:
    """Why `backend` cannot serve `call`; None when it can. `anywhere` leaves out what this machine lacks and asks the data alone."""
    absent = load_backend(backend)
    if absent:
        return absent
    impl = _impls.get((call.op, backend))
    if impl is None:
        return f"has no {call.op}"
    if not anywhere:
        unavailable = _backends[backend].unavailable(call.device_type)
        if unavailable:
            return unavailable
    return impl.reason(call)


def choose(call: Call, order: Sequence[str], *, anywhere: bool = False) -> Impl:
    """The first implementation of `order` that serves `call`.

    Raises:
        BackendError: none does; says why for each, and who would.
    """
    candidates = list(dict.fromkeys(c for name in order for c in (preferences.order(call) if name == "auto" else (name,))))
    reasons: dict[str, str] = {}
    for name in candidates:
        why = reason(name, call, anywhere=anywhere)
        if why is None:
            return _impls[call.op, name]
        reasons[name] = why
    width = max(len(name) for name in (*reasons, "call", "able")) + 2
    able = [n for n in known_backends() if n not in ("reference", *reasons) and reason(n, call, anywhere=anywhere) is None]
    lines = [f"{call.op}: {_listed(candidates)} cannot serve this call", f"  {'call':<{width}}{call}"]
    lines += [f"  {name:<{width}}{why}" for name, why in reasons.items()]
    lines.append(f"  {'able':<{width}}{', '.join(able) + '; ' if able else ''}'reference' always serves")
    raise BackendError("\n".join(lines))


class Op:
    """One operation: its contract and reference (the wrapped function), and the way to every implementation of it.

    Calling it lets `auto` choose; `.on(spec)` binds it to a spec and never falls back.
    """

    def __init__(
        self,
        reference: Callable[..., Any],
        describe: Callable[..., tuple[torch.Tensor, tuple[tuple[str, int], ...], tuple[str, ...]]],
        *,
        outputs: int = 1,
        saved: int = 0,
        saves_outputs: bool = False,
        autocasts: Sequence[str] = (),
        in_place: bool = False,
    ) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.describe = describe
        self.outputs = outputs
        self.saved = saved
        self.saves_outputs = saves_outputs
        self.in_place = in_place
        self.__doc__ = reference.__doc__
        self.__name__ = self.name
        self.__signature__ = signature = inspect.signature(reference, eval_str=True)
        self.tensors = tuple(
            i for i, p in enumerate(signature.parameters.values()) if p.annotation in (torch.Tensor, torch.Tensor | None)
        )
        self.autocasts = frozenset(i for i, name in enumerate(signature.parameters) if name in autocasts)
        self.flatten_names, self.keywords = autograd.parameters_of(signature)
        self._bound: dict[str, BoundOp] = {}
        self._flatten = _flattener(signature)
        _ops[self.name] = self
        self.auto = BoundOp(self, ("auto",))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.auto(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<op {self.name}{self.__signature__}>"

    def on(self, spec: str | Spec) -> BoundOp:
        """This op served as `spec` says and never otherwise.

        Raises:
            ValueError: the spec names an unknown backend or op.
            BackendError: from the calls that follow, when no named backend can serve them.
        """
        if torch.compiler.is_compiling():
            return BoundOp(self, tuple(_order_while_tracing(self.name, spec).split(",")))
        text = spec if isinstance(spec, str) else spec.text
        bound = self._bound.get(text)
        if bound is None:
            parsed = parse_spec(spec) if isinstance(spec, str) else spec
            _check_ops(parsed)
            bound = self._bound[text] = BoundOp(self, parsed.order(self.name))
        return bound

    def flatten(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Arguments in the order of the signature, defaults filled in."""
        flat: tuple[Any, ...] = self._flatten(*args, **kwargs)
        return flat

    def run_reference(self, flat: tuple[Any, ...]) -> tuple[Any, ...]:
        """The reference on flat arguments: `(*outputs, *saved)`."""
        positional = len(flat) - len(self.keywords)
        found = self.reference(*flat[:positional], **dict(zip(self.keywords, flat[positional:], strict=True)))
        return found if isinstance(found, tuple) else (found,)

    def call(self, *args: Any, grad: bool | None = None, **kwargs: Any) -> Call:
        """The `Call` these arguments make; raises ValueError where they break the op's contract."""
        flat = self.flatten(*args, **kwargs)
        tensor, dims, features = self.describe(*flat)
        needs = self.needs_grad(flat) if grad is None else grad
        return Call(self.name, str(tensor.device), tensor.dtype, needs, dims, features, _sm(tensor.device))

    def needs_grad(self, flat: tuple[Any, ...]) -> bool:
        if self.in_place or not torch.is_grad_enabled():
            return False
        for i in self.tensors:
            if flat[i] is not None and flat[i].requires_grad:
                return True
        return False


class BoundOp:
    """An op and an ordered preference of backends. Callable like the op."""

    def __init__(self, op: Op, order: tuple[str, ...]) -> None:
        self.op = op
        self.order = order
        self.__doc__ = op.__doc__
        self.__name__ = op.name
        self.__signature__ = op.__signature__
        self._flatten = op._flatten
        self._describe = op.describe
        self._runs: dict[Any, Callable[..., Any]] = {}
        self.served: dict[str, None] = {}  # backends that served so far, in order of their first call

    def __repr__(self) -> str:
        return f"<op {self.op.name} on {','.join(self.order)}>"

    def choose(self, *args: Any, grad: bool | None = None, **kwargs: Any) -> Impl:
        """The implementation that these arguments would be served by."""
        return choose(self.op.call(*args, grad=grad, **kwargs), self.order)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flat = self._flatten(*args, **kwargs)
        if self.op.autocasts:
            flat = _autocast(self.op, flat)
        tensor, dims, features = self._describe(*flat)
        grad = self.op.needs_grad(flat)
        if torch.compiler.is_compiling():
            sizes = tuple((name, int(size)) for name, size in dims)
            backend = _chosen_while_tracing(self.op.name, self.order, tensor.device, tensor.dtype, grad, sizes, features)
            return autograd.trace(self.op, _impls[self.op.name, backend], flat)
        run = self._runs.get((tensor.device, tensor.dtype, grad, dims, features))
        if run is None:
            run = self._resolve(tensor, dims, features, grad)
        return run(*flat)

    def _resolve(self, tensor: torch.Tensor, dims: Any, features: Any, grad: bool) -> Callable[..., Any]:
        call = Call(self.op.name, str(tensor.device), tensor.dtype, grad, dims, features, _sm(tensor.device))
        impl = choose(call, self.order)
        self.served.setdefault(impl.backend)
        if len(self._runs) >= _CACHE_LIMIT:
            self._runs.clear()
        run = self._runs[tensor.device, tensor.dtype, grad, dims, features] = autograd.eager(self.op, impl, grad)
        return run


class Kernels:
    """Every op bound to one spec, as attributes: what a model holds instead of a global setting."""

    def __init__(self, spec: str | Spec, *, strict: bool = False) -> None:
        parsed = parse_spec(spec) if isinstance(spec, str) else spec
        self.spec = parsed.text
        self.strict = strict
        _check_ops(parsed)
        if not strict:
            default = (*parsed.default, "torch")
            parsed = replace(parsed, text=f"{parsed.text} or torch", default=default,
                             per_op={op: (*order, "torch") for op, order in parsed.per_op.items()})
        self._spec = parsed

    def __getattr__(self, name: str) -> BoundOp:
        if name.startswith("_") or name not in all_ops():
            raise AttributeError(unknown("op", name, all_ops()))
        bound = BoundOp(all_ops()[name], self._spec.order(name))
        setattr(self, name, bound)
        return bound

    def served(self) -> dict[str, tuple[str, ...]]:
        """Which backends served each op that was called so far."""
        return {name: tuple(op.served) for name, op in vars(self).items() if isinstance(op, BoundOp) and op.served}


def bind(spec: str | Spec = "auto", *, strict: bool = False) -> Kernels:
    """All ops bound to `spec`. Unless `strict`, an op that no named backend serves is served by `torch`; `Kernels.served` tells.

    Raises:
        ValueError: an unknown backend or op in the spec, with the nearest name.
    """
    return Kernels(spec, strict=strict)


@torch.compiler.assume_constant_result
def _order_while_tracing(op: str, spec: str | Spec) -> str:
    parsed = parse_spec(spec) if isinstance(spec, str) else spec
    _check_ops(parsed)
    return ",".join(parsed.order(op))


@torch.compiler.assume_constant_result
def _chosen_while_tracing(op: str, order: Any, device: Any, dtype: Any, grad: bool, dims: Any, features: Any) -> str:
    call = Call(op, str(device), dtype, grad, tuple(dims), tuple(features), _sm(device))
    impl = choose(call, order)
    if impl.fwd:
        autograd.register_operators(all_ops()[op], impl)
    return impl.backend


def _check_ops(spec: Spec) -> None:
    for name in spec.per_op:
        if name not in all_ops():
            raise ValueError(unknown("op", name, all_ops()))


def _autocast(op: Op, flat: tuple[Any, ...]) -> tuple[Any, ...]:
    device_type = flat[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return flat
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(a.to(dtype) if i in op.autocasts else a for i, a in enumerate(flat))


def _flattener(signature: inspect.Signature) -> Callable[..., tuple[Any, ...]]:
    # inspect's own `bind` costs 6 µs a call; a lambda with the op's signature costs 0.2.
    names = list(signature.parameters)
    defaults = {f"_{n}": p.default for n, p in signature.parameters.items() if p.default is not p.empty}
    parameters, starred = [], False
    for name, p in signature.parameters.items():
        if p.kind is p.KEYWORD_ONLY and not starred:
            parameters.append("*")
            starred = True
        parameters.append(name if p.default is p.empty else f"{name}=_{name}")
    flatten: Callable[..., tuple[Any, ...]] = eval(f"lambda {', '.join(parameters)}: ({', '.join(names)},)", defaults)
    return flatten


@lru_cache
def _sm(device: torch.device) -> int | None:
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(names: Iterable[str]) -> str:
    quoted = [f"'{name}'" for name in names]
    return f"backend {quoted[0]}" if len(quoted) == 1 else f"backends {', '.join(quoted)}"
