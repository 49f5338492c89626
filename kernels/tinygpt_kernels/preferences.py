"""What `auto` picks: preference as data, set from measurements, ending in `torch`.

First what was measured on this very machine (saved.py), then the shipped rules: each names who is tried before `torch`,
where. Where neither speaks of a call, nothing was measured and `torch` serves. Asked once for each kind of call, not at
each call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from . import saved

if TYPE_CHECKING:
    from .dispatch import Call


@dataclass(frozen=True)
class Rule:
    """`order` serves `op` on a type of device, an instruction set and sizes (inclusive ranges) where it was measured faster."""

    op: str
    device: str
    isas: frozenset[str]
    dtypes: frozenset[torch.dtype]
    order: tuple[str, ...]
    dims: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def matches(self, call: Call, isa: str) -> bool:
        """Whether this rule speaks of `call` on a machine with that instruction set."""
        return (
            call.op == self.op
            and call.device_type == self.device
            and isa in self.isas
            and call.dtype in self.dtypes
            and all(self.dims[name][0] <= size <= self.dims[name][1] for name, size in call.dims if name in self.dims)
        )


# As benchmarks/bench_ops.py measures: op with autograd against PyTorch's, 1 and 2 threads of an AVX-512 machine, rows 768 to 4096:
# float32 x1.06 to x1.25 at C = 768, but x0.87 to x1.16 at 128 and 384, where an autograd function in Python costs 30 µs more
# than PyTorch's own and eats what the kernels gain (x1.3 to x1.8 by themselves); bfloat16 x1.08 to x1.65 at 128, 384 and 768.
RULES: tuple[Rule, ...] = (
    Rule(
        "layer_norm",
        "cpu",
        frozenset({"AVX512"}),
        frozenset({torch.float32}),
        ("cpp",),
        {"C": (512, 1024), "R": (512, 8192)},
    ),
    Rule(
        "layer_norm",
        "cpu",
        frozenset({"AVX512"}),
        frozenset({torch.bfloat16}),
        ("cpp",),
        {"C": (128, 1024), "R": (512, 8192)},
    ),
)


@lru_cache(maxsize=1)
def cpu_isa() -> str:
    """The instruction set PyTorch found on this CPU: DEFAULT, AVX2, AVX512, ..."""
    return str(torch.backends.cpu.get_cpu_capability())


def order(call: Call) -> tuple[str, ...]:
    """Backends that `auto` tries for `call`, fastest first; always ends in `torch`."""
    if entry := saved.nearest(call):
        return (*entry.order, "torch")
    for rule in RULES:
        if rule.matches(call, cpu_isa()):
            return (*rule.order, "torch")
    return ("torch",)


def measured(device_type: str) -> bool:
    """Whether anything was measured on such a device: here, or in the shipped rules on this instruction set."""
    return bool(saved.here(device_type)) or any(rule.device == device_type and cpu_isa() in rule.isas for rule in RULES)
