"""An op and the ways to call it: by `auto`, bound to a spec, or all ops together as a model holds them.

`Op.on(spec)` gives a `BoundOp`. It describes each call by a small key (device, dtype, gradient, sizes, features), looks the
key up, and walks the candidates only for a key it never saw. That key is what a call costs above the kernel function (2 to 9 µs,
benchmarks/bench_overhead.py): it holds nothing made for the call but itself, and an op's argument checks live in its
`describe`, next to the sizes they read anyway.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import autograd, dispatch
from .dispatch import Call, Impl, all_ops, choose
from .products import Products
from .spec import Spec, parse_spec, unknown

_CACHE_LIMIT = 4096  # distinct calls a BoundOp remembers: generation with every length to 2048 fits, a leak does not


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
        tensors = [n for n, p in signature.parameters.items() if p.annotation in (torch.Tensor, torch.Tensor | None)]
        # Flat arguments, as kernels take them: the tensors first, then the rest, each in the order of the signature.
        self.order = (*tensors, *(n for n in signature.parameters if n not in tensors))
        self.tensors = len(tensors)
        self.autocasts = frozenset(i for i, name in enumerate(self.order) if name in autocasts)
        self._bound: dict[str, BoundOp] = {}
        self._flatten = _flattener(signature, self.order)
        dispatch.ops[self.name] = self
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
        """Arguments as kernels take them, defaults filled in: tensors first, then the rest."""
        flat: tuple[Any, ...] = self._flatten(*args, **kwargs)
        return flat

    def run_reference(self, flat: tuple[Any, ...]) -> tuple[Any, ...]:
        """The reference on flat arguments: `(*outputs, *saved)`."""
        found = self.reference(**dict(zip(self.order, flat, strict=True)))
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
        for tensor in flat[: self.tensors]:  # noqa: SIM110  a generator costs 0.5 µs more
            if tensor is not None and tensor.requires_grad:
                return True
        return False


class Pair(NamedTuple):
    """An op's two kernels, and whose they are."""

    fwd: Callable[..., Any]
    bwd: Callable[..., Any]
    backend: str


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

    def pair(self, *args: Any, **kwargs: Any) -> Pair | None:
        """`(fwd, bwd, backend)` of what serves these arguments with gradients, for who drives kernels without autograd.

        None: it (backend `torch`) is differentiated by PyTorch's autograd alone.
        """
        impl = choose(replace(self.op.call(*args, grad=True, **kwargs), autograd=False), self.order)
        if impl.backend == "reference":
            fwd, bwd = autograd.reference_pair(self.op)
        elif impl.fwd is None or impl.bwd is None:
            return None
        else:
            fwd, bwd = impl.fwd, impl.bwd
        self.served.setdefault(impl.backend)
        return Pair(fwd, bwd, impl.backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flat = self._flatten(*args, **kwargs)
        if self.op.autocasts:
            flat = _autocast(self.op, flat)
        tensor, dims, features = self._describe(*flat)
        grad = self.op.needs_grad(flat)
        if torch.compiler.is_compiling():
            sizes = tuple((name, int(size)) for name, size in dims)
            backend = _chosen_while_tracing(
                self.op.name, self.order, tensor.device, tensor.dtype, grad, sizes, features
            )
            impl = dispatch.impls[self.op.name, backend]
            return autograd.trace(self.op, impl, _seeded(self.op, flat) if _draws(impl, features) else flat)
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
        run = kernel = autograd.eager(self.op, impl, grad)
        if _draws(impl, features):

            def run(*flat: Any) -> Any:
                return kernel(*_seeded(self.op, flat))

        self._runs[tensor.device, tensor.dtype, grad, dims, features] = run
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
            parsed = replace(
                parsed,
                text=f"{parsed.text} or torch",
                default=default,
                per_op={op: (*order, "torch") for op, order in parsed.per_op.items()},
            )
        for name, op in all_ops().items():
            setattr(self, name, BoundOp(op, parsed.order(name)))

    if TYPE_CHECKING:  # the ops are attributes, set above; at run time an unknown one is an AttributeError with a hint

        def __getattr__(self, name: str) -> BoundOp: ...

    else:

        def __getattr__(self, name):
            raise AttributeError(unknown("op", name, all_ops()))

    def products(self, x: torch.Tensor) -> Products:
        """Matrix products for tensors like `x` [R, C]: of the backend that serves gelu there, whose epilogue they may hold."""
        call = replace(self.gelu.op.call(x, grad=True), autograd=False)
        own = dispatch.backends[choose(call, self.gelu.order).backend].products
        return own if own is not None and own.serves(x) else Products()

    def served(self) -> dict[str, tuple[str, ...]]:
        """Which backends served each op that was called so far."""
        return {name: tuple(op.served) for name, op in vars(self).items() if isinstance(op, BoundOp) and op.served}


def bind(spec: str | Spec = "auto", *, strict: bool = False) -> Kernels:
    """All ops bound to `spec`. Unless `strict`, an op that no named backend serves is served by `torch`; `Kernels.served` tells.

    Raises:
        ValueError: an unknown backend or op in the spec, with the nearest name.
    """
    return Kernels(spec, strict=strict)


def _order_while_tracing(op: str, spec: str | Spec) -> str:
    parsed = parse_spec(spec) if isinstance(spec, str) else spec
    _check_ops(parsed)
    return ",".join(parsed.order(op))


def _chosen_while_tracing(op: str, order: Any, device: Any, dtype: Any, grad: bool, dims: Any, features: Any) -> str:
    call = Call(op, str(device), dtype, grad, tuple(dims), tuple(features), _sm(device))
    impl = choose(call, order)
    if impl.fwd:
        autograd.register_operators(all_ops()[op], impl)
    return impl.backend


# What torch.compiler.assume_constant_result does; calling it would import torch._dynamo, 1.5 s at every start.
_order_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]
_chosen_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


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


def _draws(impl: Impl, features: tuple[str, ...]) -> bool:
    """Whether a call needs a seed it does not bring: a kernel regenerates its mask, and cannot without."""
    return impl.fwd is not None and "dropout" in features


def _seeded(op: Op, flat: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with a seed from PyTorch's generator."""
    seed = torch.randint(2**63 - 1, (1,), device=flat[0].device)
    return tuple(seed if name == "seed" else a for name, a in zip(op.order, flat, strict=True))


def _flattener(signature: inspect.Signature, order: tuple[str, ...]) -> Callable[..., tuple[Any, ...]]:
    # inspect's own `bind` costs 6 µs a call; a lambda with the op's signature costs 0.2.
    defaults = {f"_{n}": p.default for n, p in signature.parameters.items() if p.default is not p.empty}
    parameters, starred = [], False
    for name, p in signature.parameters.items():
        if p.kind is p.KEYWORD_ONLY and not starred:
            parameters.append("*")
            starred = True
        parameters.append(name if p.default is p.empty else f"{name}=_{name}")
    flatten: Callable[..., tuple[Any, ...]] = eval(f"lambda {', '.join(parameters)}: ({', '.join(order)},)", defaults)
    return flatten


@lru_cache
def _sm(device: torch.device) -> int | None:
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor
