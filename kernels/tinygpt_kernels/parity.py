"""The parity rule: an implementation is right when it is as close to the truth as PyTorch's own op is.

The truth is the reference evaluated in float64 on the same inputs. For the output and for every gradient,

    |ours - oracle| / |oracle|  <=  2 * (the same figure of PyTorch's own op in this dtype) + floor(dtype)

in the 2-norm, and no element may be off by more than ten times that bound relative to the largest element.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .cases import Case
from .dispatch import Call, all_ops, reason
from .op import Op

FLOORS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-12}


@dataclass(frozen=True)
class Error:
    """How far one tensor is from the oracle, how far PyTorch's own op is, and how far ours may be."""

    name: str
    relative: float
    peer: float
    bound: float
    worst: float

    @property
    def ok(self) -> bool:
        return self.relative <= self.bound and self.worst <= 10 * self.bound

    @property
    def used(self) -> float:
        """The share of what is allowed that is used up; above 1 is wrong."""
        return max(self.relative / self.bound, self.worst / (10 * self.bound))

    def __str__(self) -> str:
        return f"{self.name}: {self.relative:.3g} of {self.bound:.3g} allowed, worst element {self.worst:.3g} of {10 * self.bound:.3g}"


def check(case: Case, bound: Callable[..., Any] | str, dtype: torch.dtype, device: str = "cpu") -> list[Error]:
    """Run one case on one backend against the oracle, and insist.

    Args:
        bound: the op bound to a backend, or a backend's name.

    Returns:
        an Error per output and gradient.

    Raises:
        AssertionError: at least one is out of bounds; lists them all.
    """
    errors = errors_of(case, bound, dtype, device)
    bad = [str(error) for error in errors if not error.ok]
    assert not bad, f"{case.op} {case.name} {dtype}:\n  " + "\n  ".join(bad)
    return errors


def errors_of(case: Case, bound: Callable[..., Any] | str, dtype: torch.dtype, device: str = "cpu") -> list[Error]:
    """As `check`, but tells good from bad only by `Error.ok`; a tensor that is missing or too many is infinitely wrong."""
    run = all_ops()[case.op].on(bound) if isinstance(bound, str) else bound
    return compare(case, results(case, run, dtype, device), dtype, device)


def compare(case: Case, ours: dict[str, Tensor], dtype: torch.dtype, device: str = "cpu") -> list[Error]:
    """What `errors_of` tells, of `results` that are there already."""
    oracle, peers = truth(case, dtype, device)
    errors = []
    for name in dict.fromkeys((*oracle, *ours)):
        relative = worst = math.inf
        if name in oracle and name in ours:
            relative, worst = _distance(ours[name], oracle[name])
        peer = peers.get(name, 0.0)
        errors.append(Error(name, relative, peer, 2 * peer + FLOORS[dtype], worst))
    return errors


def results(
    case: Case, run: Callable[..., Any], dtype: torch.dtype, device: str = "cpu", *, double: bool = False
) -> dict[str, Tensor]:
    """Outputs and gradients of one call, by name, in float64 on the CPU. `double` widens the rounded inputs to float64 first."""
    op = all_ops()[case.op]
    args, kwargs = case.build(dtype, device)
    flat = [_widened(a) if double else a for a in op.flatten(*args, **kwargs)]
    named = dict(zip(op.order, flat, strict=True))
    leaves = {}
    if case.differentiable:
        for name in op.order[: op.tensors]:
            if named[name] is not None and named[name].is_floating_point() and name != "denominator":
                leaves[name] = named[name] = named[name].detach().requires_grad_()
    found = run(**named)
    if op.in_place:
        outputs = [
            t for a in flat if isinstance(a, (list, tuple)) and a is not flat[1] for t in a if isinstance(t, Tensor)
        ]
        outputs += [found] if found is not None else []
    else:
        outputs = list(found) if isinstance(found, tuple) else [found]
    named = {f"output {i}": t for i, t in enumerate(outputs)}
    if leaves:
        generator = torch.Generator().manual_seed(7)
        upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
        named |= {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {name: t.detach().double().cpu() for name, t in named.items()}


@lru_cache(maxsize=256)
def truth(case: Case, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What is right, and how far PyTorch's own op is from it."""
    op = all_ops()[case.op]
    oracle = results(case, op.on("reference"), dtype, device, double=True)
    # PyTorch's own op; where it has none (a seeded mask), the reference in this dtype is what there is to compare with.
    peer = "torch" if reason("torch", call_of(op, case, dtype, device)) is None else "reference"
    theirs = results(case, op.on(peer), dtype, device)
    errors = {name: _distance(theirs[name], exact)[0] for name, exact in oracle.items()}
    assert all(map(math.isfinite, errors.values())), f"{op.name} {case}: {peer} is no measure, its errors are {errors}"
    return oracle, errors


def call_of(op: Op, case: Case, dtype: torch.dtype, device: str = "cpu") -> Call:
    """The `Call` that a case makes, gradients wanted where it has any."""
    args, kwargs = case.build(dtype, device)
    return op.call(*args, grad=case.differentiable, **kwargs)


def _distance(ours: Tensor, truth: Tensor) -> tuple[float, float]:
    if ours.shape != truth.shape or not torch.isfinite(ours).all():
        return float("inf"), float("inf")
    difference = ours - truth
    norm, largest = truth.norm().item(), truth.abs().max().item() if truth.numel() else 0.0
    if norm == 0.0:
        return difference.norm().item(), difference.norm().item()
    return difference.norm().item() / norm, difference.abs().max().item() / largest


def _widened(a: Any) -> Any:
    if isinstance(a, Tensor):
        return a.double() if a.is_floating_point() else a
    return [_widened(x) for x in a] if isinstance(a, list) else a
