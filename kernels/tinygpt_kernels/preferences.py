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
    """`order` serves `op` on a type of device, an instruction set and sizes (inclusive ranges) where it was measured faster.

    autograd: whether it speaks of ops under autograd, or of pairs of kernels driven by themselves; None: of both.
    """

    op: str
    device: str
    isas: frozenset[str]
    dtypes: frozenset[torch.dtype]
    order: tuple[str, ...]
    dims: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    autograd: bool | None = None

    def matches(self, call: Call, isa: str) -> bool:
        """Whether this rule speaks of `call` on a machine with that instruction set."""
        return (
            call.op == self.op
            and call.device_type == self.device
            and isa in self.isas
            and call.dtype in self.dtypes
            and self.autograd in (None, call.autograd)
            and all(self.dims[name][0] <= size <= self.dims[name][1] for name, size in call.dims if name in self.dims)
        )


_FLOAT32, _BFLOAT16 = frozenset({torch.float32}), frozenset({torch.bfloat16})
_AVX2, _AVX512 = frozenset({"AVX2"}), frozenset({"AVX512"})


def _cpp(
    op: str, isas: frozenset[str], dtypes: frozenset[torch.dtype], autograd: bool | None = None, **dims: tuple[int, int]
) -> Rule:
    return Rule(op, "cpu", isas, dtypes, ("cpp",), dims, autograd)


# Two threads of a Zen 3 (AVX2), float32, `python benchmarks/report.py --only ops`, forward and backward, times PyTorch's speed.
# Kernels by themselves: attention 1.2 to 2.8, attention_qkv 1.3 to 3.4, layer_norm 1.2 to 1.6, add_layer_norm 1.2 to 1.8, gelu 2.1
# to 4.9, cross_entropy 2.9 to 3.6, embedding 2.4 to 3.0 but 0.5 in a table of 50304 rows, linear_cross_entropy 0.75 to 1.0.
# The last two serve all the same: PyTorch has no pair to put in their place, and one op on autograd would put the step on it.
_PAIRS = (
    "attention", "attention_qkv", "layer_norm", "add_layer_norm", "gelu", "embedding", "cross_entropy", "linear_cross_entropy"
)  # fmt: skip
_MANY = 1 << 30

RULES: tuple[Rule, ...] = (
    *(_cpp(op, _AVX2, _FLOAT32, autograd=False) for op in _PAIRS),
    # Under autograd a kernel pays for a node written in Python, some 30 µs: attention 1.2 to 2.2, attention_qkv 1.3 to 2.8, gelu 1.8
    # to 4.4, cross_entropy 1.1 at 768 x 65 to 2.8; the norms 0.8 to 1.3, above 1 in the sizes named; embedding 1.1 to 1.4 in a
    # table of 65 rows; linear_cross_entropy 0.7 to 0.8, nowhere.
    _cpp("attention", _AVX2, _FLOAT32, D=(16, 128), T=(32, 4096)),
    _cpp("attention_qkv", _AVX2, _FLOAT32, D=(16, 128), T=(32, 4096)),
    _cpp("gelu", _AVX2, _FLOAT32, C=(256, 8192), R=(384, _MANY)),
    _cpp("cross_entropy", _AVX2, _FLOAT32, V=(32, 1 << 17), R=(256, _MANY)),
    _cpp("embedding", _AVX2, _FLOAT32, V=(1, 1024), C=(64, 1024), R=(384, _MANY)),
    _cpp("layer_norm", _AVX2, _FLOAT32, C=(128, 2048), R=(2048, _MANY)),
    _cpp("layer_norm", _AVX2, _FLOAT32, C=(768, 2048), R=(512, _MANY)),
    _cpp("add_layer_norm", _AVX2, _FLOAT32, C=(384, 2048), R=(512, _MANY)),
    _cpp("adamw_", _AVX2, _FLOAT32),  # 1.1 to 2.1
    _cpp("clip_grad_norm_", _AVX2, _FLOAT32),  # 1.6 to 4.1
    # Two threads of a Zen 5 (AVX-512), the same command. Kernels by themselves: attention 2.7 to 4.2, attention_qkv 2.6 to 4.3, the
    # norms 1.1 to 1.9, gelu 1.9 to 7, cross_entropy 1.9 to 3, embedding 1.8 to 3.2, linear_cross_entropy 0.75 to 0.9.
    # Under autograd: attention 2.5 to 4.2, gelu 1.4 to 6, cross_entropy 1.4 to 2.2, layer_norm
    # 1.0 to 1.5 (1.02 at 768 x 128), add_layer_norm 1.0 to 1.6, embedding 1.5 to 2.4.
    *(_cpp(op, _AVX512, _FLOAT32, autograd=False) for op in _PAIRS),
    _cpp("attention", _AVX512, _FLOAT32 | _BFLOAT16, D=(16, 128), T=(32, 4096)),
    _cpp("attention_qkv", _AVX512, _FLOAT32 | _BFLOAT16, D=(16, 128), T=(32, 4096)),
    _cpp("gelu", _AVX512, _FLOAT32, C=(256, 8192), R=(384, _MANY)),
    _cpp("cross_entropy", _AVX512, _FLOAT32 | _BFLOAT16, V=(32, 1 << 17), R=(256, _MANY)),
    _cpp("embedding", _AVX512, _FLOAT32 | _BFLOAT16, V=(1, 1 << 17), C=(64, 1024), R=(384, _MANY)),
    _cpp("layer_norm", _AVX512, _FLOAT32, C=(128, 2048), R=(2048, _MANY)),
    _cpp("layer_norm", _AVX512, _FLOAT32, C=(384, 2048), R=(512, _MANY)),
    _cpp("add_layer_norm", _AVX512, _FLOAT32, C=(128, 2048), R=(512, _MANY)),
    _cpp("adamw_", _AVX512, _FLOAT32),  # 1.04 to 2.4
    _cpp("clip_grad_norm_", _AVX512, _FLOAT32),  # 1.6 to 3.4
    # bfloat16 there: attention 2.0 to 10, cross_entropy 1.7 to 4.2, the norms 1.4 to 2.2, embedding 2.0 to 3.2 at 65 rows, adamw_ 1.5
    # to 2.7, clipping 8. gelu is 1.2 to 4.4 with its gradient but 0.9 without, and a rule does not tell the two apart.
    # linear_cross_entropy 0.2 to 0.4: PyTorch multiplies bfloat16 directly. So no pairs, whose step would need it.
    _cpp("layer_norm", _AVX512, _BFLOAT16, C=(128, 2048), R=(512, _MANY)),
    _cpp("add_layer_norm", _AVX512, _BFLOAT16, C=(128, 2048), R=(512, _MANY)),
    _cpp("adamw_", _AVX512, _BFLOAT16),
    _cpp("clip_grad_norm_", _AVX512, _BFLOAT16),
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
