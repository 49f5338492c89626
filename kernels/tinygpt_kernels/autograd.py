"""One helper that makes a differentiable function of a pair of pure kernels, three times over.

`eager`: a plain `torch.autograd.Function`, or the bare kernel where no gradient is wanted. `torch.library` would do both,
but its dispatch costs 26 µs a call against 6 here. `trace`: the same pair as registered operators, which is what
torch.compile can put into a graph. `reference_pair`: the pair made of the op's reference, so that whatever drives kernels
directly can drive the reference too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

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
    assert impl.fwd is not None
    assert impl.bwd is not None
    fwd, bwd = impl.fwd, impl.bwd
    outputs, tensors, name = op.outputs, op.tensors, f"{op.name}_{impl.backend}"
    kept_from = 0 if op.saves_outputs else outputs
    no_gradients = (None,) * (len(op.order) - tensors)

    class KernelFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *flat: Any) -> Any:
            results = fwd(*flat)
            ctx.save_for_backward(*flat[:tensors], *results[kept_from:])
            ctx.others = flat[tensors:]
            return results[0] if outputs == 1 else results[:outputs]

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            if torch.is_grad_enabled():  # once_differentiable says the same, for 5 µs a call
                raise RuntimeError(f"{name} has no second derivative; use 'reference' or 'torch' for create_graph=True")
            found = bwd(*grads, *ctx.saved_tensors, *ctx.others, needs=ctx.needs_input_grad[:tensors])
            return found + no_gradients

    KernelFunction.__name__ = KernelFunction.__qualname__ = name
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
    _registered.add(name)
    fwd, bwd = impl.fwd, impl.bwd
    assert fwd is not None
    tensors, results = op.tensors, op.outputs + op.saved
    kept_from = 0 if op.saves_outputs else op.outputs
    types = [f"{_SCHEMA_TYPES[op.__signature__.parameters[n].annotation]} {n}" for n in op.order]

    def fake(*flat: Any) -> Any:
        return _single(tuple(_contiguous_like(r) for r in reference_pair(op)[0](*flat)))

    _LIBRARY.define(f"{name}({', '.join(types)}) -> ({', '.join(['Tensor'] * results)})")
    _LIBRARY.impl(name, lambda *flat: _single(fwd(*flat)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"tinygpt_kernels::{name}", fake, lib=_LIBRARY)
    if bwd is None:
        return name

    # An operator cannot return "no tensor": a gradient nobody wants travels as an empty one. Nor the same tensor twice.
    def backward(*flat: Any) -> Any:
        assert bwd is not None
        found = bwd(*flat[:-1], needs=tuple(flat[-1]))
        own = (g if g is None or all(g is not other for other in found[:i]) else g.clone() for i, g in enumerate(found))
        return _single(tuple(flat[0].new_empty(0) if g is None else g for g in own))

    def backward_fake(*flat: Any) -> Any:
        wanted = zip(flat[op.outputs : op.outputs + tensors], flat[-1], strict=True)
        return _single(tuple(_contiguous_like(t) if need else flat[0].new_empty(0) for t, need in wanted))

    gradients = [f"Tensor grad_{i}" for i in range(op.outputs)]
    kept = [f"Tensor kept_{i}" for i in range(kept_from, results)]
    arguments = [*gradients, *types[:tensors], *kept, *types[tensors:], "bool[] needs"]
    _LIBRARY.define(f"{name}_bwd({', '.join(arguments)}) -> ({', '.join(['Tensor'] * tensors)})")
    _LIBRARY.impl(f"{name}_bwd", backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tinygpt_kernels::{name}_bwd", backward_fake, lib=_LIBRARY)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        kept = (output if isinstance(output, tuple) else (output,))[kept_from:]
        ctx.save_for_backward(*inputs[:tensors], *kept)
        ctx.others = inputs[tensors:]

    def differentiate(ctx: Any, *grads: torch.Tensor) -> Any:
        needs = list(ctx.needs_input_grad[:tensors])
        operator = getattr(torch.ops.tinygpt_kernels, f"{name}_bwd")
        found = operator(*grads[: op.outputs], *ctx.saved_tensors, *ctx.others, needs)
        found = found if isinstance(found, (tuple, list)) else (found,)
        wanted = [gradient if need else None for need, gradient in zip(needs, found, strict=True)]
        return (*wanted, *[None] * (len(op.order) - tensors))

    torch.library.register_autograd(
        f"tinygpt_kernels::{name}", differentiate, setup_context=setup_context, lib=_LIBRARY
    )
    return name


def _single(values: tuple[Any, ...]) -> Any:
    return values[0] if len(values) == 1 else values


def _contiguous_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def reference_pair(op: Op) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`(fwd, bwd)` of the reference with the calling convention of kernels; bwd differentiates a second forward."""

    def copied(values: tuple[torch.Tensor | None, ...], out: tuple[torch.Tensor | None, ...] | None) -> Any:
        if out is None:
            return values
        return tuple(o if v is None or o is None else o.copy_(v) for o, v in zip(out, values, strict=True))

    def fwd(*flat: Any, out: tuple[torch.Tensor, ...] | None = None) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            results: tuple[torch.Tensor, ...] = copied(op.run_reference(flat), out)
            return results

    def bwd(*flat: Any, needs: tuple[bool, ...], out: tuple[torch.Tensor | None, ...] | None = None) -> Any:
        kept = op.saved + (op.outputs if op.saves_outputs else 0)
        grads, rest = flat[: op.outputs], flat[op.outputs :]
        tensors = [
            t.detach().requires_grad_(need) if t is not None else None
            for t, need in zip(rest[: op.tensors], needs, strict=True)
        ]
        wanted = [t for t in tensors if t is not None and t.requires_grad]
        with torch.enable_grad():
            outputs = op.run_reference((*tensors, *rest[op.tensors + kept :]))[: op.outputs]
            found = iter(torch.autograd.grad(outputs, wanted, grads))
        gradients = tuple(next(found) if t is not None and t.requires_grad else None for t in tensors)
        return copied(gradients, out)

    return fwd, bwd
