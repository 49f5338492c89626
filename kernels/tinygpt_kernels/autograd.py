"""One helper that makes a differentiable function of a pair of pure kernels, three times over.

`eager`: a plain `torch.autograd.Function`, or the bare kernel where no gradient is wanted. `torch.library` would do both,
but its dispatch costs 26 µs a call against 6 here. `trace`: the same pair as registered operators, which is what
torch.compile can put into a graph. `reference_pair`: the pair made of the op's reference, so that whatever drives kernels
directly can drive the reference too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from .dispatch import Impl
    from .op import Op

_LIBRARY = torch.library.Library("tinygpt_kernels", "DEF")
_registered: set[str] = set()
_SCHEMA_TYPES = {
    torch.Tensor: "Tensor", torch.Tensor | None: "Tensor?", float: "float", float | None: "float?",
    int: "int", int | None: "int?", bool: "bool", str: "str",
}  # fmt: skip


def eager(op: Op, impl: Impl, grad: bool) -> Callable[..., Any]:
    """What a call outside of torch.compile runs: flat arguments in, the op's outputs out."""
    if impl.call:
        return impl.call
    fwd, outputs = impl.fwd, op.outputs
    assert fwd is not None
    if op.in_place:
        return fwd
    if grad:
        apply: Callable[..., Any] = _function(op, impl).apply
        return apply
    if outputs == 1:
        return lambda *flat: fwd(*flat)[0]
    return lambda *flat: fwd(*flat)[:outputs]


def _function(op: Op, impl: Impl) -> type[torch.autograd.Function]:
    fwd, bwd = impl.fwd, impl.bwd
    assert fwd is not None
    assert bwd is not None
    outputs, saves_outputs, tensors = op.outputs, op.saves_outputs, op.tensors
    count = len(op.flatten_names)
    others = tuple(i for i in range(count) if i not in tensors)

    class KernelFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *flat: Any) -> Any:
            results = fwd(*flat)
            ctx.save_for_backward(*[flat[i] for i in tensors], *results[0 if saves_outputs else outputs :])
            ctx.others = [flat[i] for i in others]
            return results[0] if outputs == 1 else results[:outputs]

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            needs = tuple([ctx.needs_input_grad[i] for i in tensors])
            found = bwd(*grads, *ctx.saved_tensors, *ctx.others, needs=needs)
            result: list[torch.Tensor | None] = [None] * count
            for i, gradient in zip(tensors, found, strict=True):
                result[i] = gradient
            return tuple(result)

    KernelFunction.__name__ = KernelFunction.__qualname__ = f"{op.name}_{impl.backend}"
    return KernelFunction


def trace(op: Op, impl: Impl, flat: tuple[Any, ...]) -> Any:
    """The same call while torch.compile traces it: a registered operator, or PyTorch's own operations."""
    if impl.call is not None:
        return impl.call(*flat)
    results = getattr(torch.ops.tinygpt_kernels, f"{op.name}_{impl.backend}")(*flat)
    if op.outputs + op.saved == 1:
        return results
    return results[0] if op.outputs == 1 else results[: op.outputs]


def register_operators(op: Op, impl: Impl) -> str:
    """Register `tinygpt_kernels::<op>_<backend>` and its backward with schema, fake and autograd; returns the name."""
    name = f"{op.name}_{impl.backend}"
    if name in _registered:
        return name
    fwd, bwd = impl.fwd, impl.bwd
    assert fwd is not None
    parameters = op.__signature__.parameters
    types = [f"{_SCHEMA_TYPES[p.annotation]} {p.name}" for p in parameters.values()]
    names = op.flatten_names
    others = [i for i in range(len(names)) if i not in op.tensors]
    results = op.outputs + op.saved
    kept = [f"Tensor kept_{i}" for i in range(0 if op.saves_outputs else op.outputs, results)]

    def single(values: tuple[torch.Tensor, ...]) -> Any:
        return values[0] if len(values) == 1 else values

    def fake(*flat: Any) -> Any:
        return single(
            tuple(torch.empty_like(r, memory_format=torch.contiguous_format) for r in reference_pair(op)[0](*flat))
        )

    _LIBRARY.define(f"{name}({', '.join(types)}) -> ({', '.join(['Tensor'] * results)})")
    _LIBRARY.impl(name, lambda *flat: single(fwd(*flat)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"tinygpt_kernels::{name}", fake, lib=_LIBRARY)
    _registered.add(name)
    if bwd is None:
        return name

    # An operator cannot return "no tensor": a gradient nobody wants travels as an empty one.
    def backward(*flat: Any) -> Any:
        found = bwd(*flat[:-1], needs=tuple(flat[-1]))
        return single(tuple(flat[0].new_empty(0) if g is None else g for g in found))

    def backward_fake(*flat: Any) -> Any:
        arguments, needs = flat[op.outputs : op.outputs + len(op.tensors)], flat[-1]
        return single(tuple(torch.empty_like(a, memory_format=torch.contiguous_format) if need else flat[0].new_empty(0)
                            for a, need in zip(arguments, needs, strict=True)))  # fmt: skip

    gradients = [f"Tensor grad_{i}" for i in range(op.outputs)]
    arguments = [
        *gradients,
        *(types[i] for i in op.tensors),
        *kept,
        *(types[i] for i in others),
        "bool[] needs",
    ]
    _LIBRARY.define(f"{name}_bwd({', '.join(arguments)}) -> ({', '.join(['Tensor'] * len(op.tensors))})")
    _LIBRARY.impl(f"{name}_bwd", backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tinygpt_kernels::{name}_bwd", backward_fake, lib=_LIBRARY)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = output if isinstance(output, tuple) else (output,)
        ctx.save_for_backward(*[inputs[i] for i in op.tensors], *results[0 if op.saves_outputs else op.outputs :])
        ctx.others = [inputs[i] for i in others]

    def differentiate(ctx: Any, *grads: torch.Tensor) -> Any:
        needs = [ctx.needs_input_grad[i] for i in op.tensors]
        operator = getattr(torch.ops.tinygpt_kernels, f"{name}_bwd")
        found = operator(*grads[: op.outputs], *ctx.saved_tensors, *ctx.others, needs)
        found = found if isinstance(found, (tuple, list)) else (found,)
        result: list[torch.Tensor | None] = [None] * len(names)
        for i, need, gradient in zip(op.tensors, needs, found, strict=True):
            result[i] = gradient if need else None
        return tuple(result)

    torch.library.register_autograd(
        f"tinygpt_kernels::{name}", differentiate, setup_context=setup_context, lib=_LIBRARY
    )
    return name


def reference_pair(op: Op) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`(fwd, bwd)` of the reference with the calling convention of kernels; bwd differentiates a second forward."""

    def copied(values: tuple[torch.Tensor | None, ...], out: tuple[torch.Tensor | None, ...] | None) -> Any:
        if out is None:
            return values
        return tuple(o if v is None or o is None else o.copy_(v) for o, v in zip(out, values, strict=True))

    def fwd(*flat: Any, out: tuple[torch.Tensor, ...] | None = None) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return copied(op.run_reference(flat), out)

    def bwd(*flat: Any, needs: tuple[bool, ...], out: tuple[torch.Tensor | None, ...] | None = None) -> Any:
        grads, rest = flat[: op.outputs], flat[op.outputs :]
        tensors = [
            t.detach().requires_grad_(need) if t is not None else None for t, need in zip(rest, needs, strict=False)
        ]
        kept = op.saved + (op.outputs if op.saves_outputs else 0)
        others = iter(rest[len(op.tensors) + kept :])
        by_place = dict(zip(op.tensors, tensors, strict=True))
        arguments = tuple(by_place[i] if i in by_place else next(others) for i in range(len(op.flatten_names)))
        wanted = [t for t, need in zip(tensors, needs, strict=True) if need and t is not None]
        with torch.enable_grad():
            found = iter(torch.autograd.grad(op.run_reference(arguments)[: op.outputs], wanted, grads))
        return copied(
            tuple(next(found) if need and t is not None else None for t, need in zip(tensors, needs, strict=True)),
            out,
        )

    return fwd, bwd


def parameters_of(signature: inspect.Signature) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of all parameters in order, and of those that may only be given by keyword."""
    names = tuple(signature.parameters)
    return names, tuple(n for n in names if signature.parameters[n].kind is inspect.Parameter.KEYWORD_ONLY)
