"""What backends share of the ops on lists of tensors: every check, strided tensors, and their registration.

A backend gives two functions on checked lists, and `register` makes ops.adamw_ and ops.clip_grad_norm_ of
them. What torch.compile traces is one operator for each: addresses cannot be traced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import dispatch
from .dispatch import Impl

Tensors = Sequence[Tensor]
_Result = TypeVar("_Result")
_dtype, _is_cpu = attrgetter("dtype"), attrgetter("is_cpu")


class AdamW(NamedTuple):
    """The numbers of one step, in the order of ops.adamw_."""

    step: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    grad_scale: float

    @property
    def flat(self) -> tuple[int, float, float, float, float, float, float]:
        """As the compiled module takes them: the betas one by one."""
        return self.step, self.lr, *self.betas, self.eps, self.weight_decay, self.grad_scale


class Calls(NamedTuple):
    """ops.adamw_ and ops.clip_grad_norm_ on one backend."""

    adamw_: Callable[..., None]
    clip_grad_norm_: Callable[..., Tensor]


class Checked(NamedTuple):
    """Lists of tensors that a kernel can take: contiguous, on one device, alike in sizes."""

    lists: Sequence[Tensors]
    sizes: list[int]
    dtypes: list[list[torch.dtype]]  # of each list


def register(
    backend: str, adamw: Callable[[Checked, AdamW], None], clip: Callable[[Checked, float], Tensor], **capabilities: Any
) -> Calls:
    """Make the two ops of a backend's kernels, and register them.

    Args:
        adamw: takes params, grads, exp_avgs and exp_avg_sqs, the last two alike in dtypes.
        clip: takes grads; returns the norm, no view.
        capabilities: of `Impl`.
    """
    dtypes = frozenset(capabilities["dtypes"])

    def check(op: str, lists: Sequence[Tensors]) -> Checked:
        device = lists[0][0].device
        place = _is_cpu if device.type == "cpu" else Tensor.get_device  # t.device == device costs three times as much
        own = {place(lists[0][0])}
        found = [list(map(_dtype, tensors)) for tensors in lists]
        sizes, *others = (list(map(Tensor.numel, tensors)) for tensors in lists)
        for tensors, kinds in zip(lists, found, strict=True):
            if not dtypes.issuperset(kinds):
                *names, last = (str(d).removeprefix("torch.") for d in capabilities["dtypes"])
                strange = next(d for d in kinds if d not in dtypes)
                raise ValueError(
                    f"{op} on {backend} takes {', '.join(names)} and {last}, not {strange}; use --backend torch"
                )
            if not own.issuperset(map(place, tensors)):
                elsewhere = next(t.device for t in tensors if t.device != device)
                raise ValueError(f"{op} on {backend}: a tensor is on {elsewhere}, not on {device}")
        if any(other != sizes for other in others) or (others and found[2] != found[3]):
            raise ValueError(f"{op} on {backend}: params, grads, exp_avgs and exp_avg_sqs must be alike in length and shapes, and "
                             "exp_avgs and exp_avg_sqs in dtypes")  # fmt: skip
        return Checked(lists, sizes, found)

    @torch.no_grad()
    def adamw_(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, step: int, lr: float,
               betas: tuple[float, float], eps: float, weight_decay: float, grad_scale: float) -> None:  # fmt: skip
        """ops.adamw_; see there.

        Raises:
            ValueError: lists not alike in length or sizes, tensors on several devices, a dtype that the kernels lack, two moments
                of one tensor in different dtypes.
        """
        if torch.compiler.is_compiling():
            adamw_operator(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay, grad_scale)
            return
        checked = check("adamw_", (params, grads, exp_avgs, exp_avg_sqs))
        numbers = AdamW(step, lr, betas, eps, weight_decay, grad_scale)
        _on_contiguous(checked, lambda packed: adamw(packed, numbers), (0, 2, 3))

    @torch.no_grad()
    def clip_grad_norm_(grads: Tensors, max_norm: float) -> Tensor:
        """ops.clip_grad_norm_; see there.

        Raises:
            ValueError: tensors on several devices, a dtype that the kernels lack.
        """
        if torch.compiler.is_compiling():
            found: Tensor = clip_operator(grads, max_norm)
            return found
        return _on_contiguous(check("clip_grad_norm_", [grads]), lambda packed: clip(packed, max_norm), (0,))

    def adamw_traced(
        params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
        step: int, lr: float, betas: Sequence[float], eps: float, weight_decay: float, grad_scale: float,
    ) -> None:  # fmt: skip
        adamw_(params, grads, exp_avgs, exp_avg_sqs, step, lr, (betas[0], betas[1]), eps, weight_decay, grad_scale)

    def clip_traced(grads: Sequence[Tensor], max_norm: float) -> Tensor:
        return clip_grad_norm_(grads, max_norm)

    name = "tinygpt_kernels::{}_" + backend
    adamw_operator = torch.library.custom_op(
        name.format("adamw"), adamw_traced, mutates_args=("params", "exp_avgs", "exp_avg_sqs")
    )
    clip_operator = torch.library.custom_op(name.format("clip_grad_norm"), clip_traced, mutates_args=("grads",))
    clip_operator.register_fake(lambda grads, max_norm: grads[0].new_empty((), dtype=torch.float32))
    for op, call in (("adamw_", adamw_), ("clip_grad_norm_", clip_grad_norm_)):
        dispatch.register(Impl(op, backend, call=call, **capabilities))
    return Calls(adamw_, clip_grad_norm_)


def _on_contiguous(checked: Checked, run: Callable[[Checked], _Result], written: Sequence[int]) -> _Result:
    """`run` on contiguous tensors; of the lists it writes, what went to copies goes back."""
    if all(all(map(Tensor.is_contiguous, tensors)) for tensors in checked.lists):
        return run(checked)
    packed = [[t.contiguous() for t in tensors] for tensors in checked.lists]
    found = run(checked._replace(lists=packed))
    for i in written:
        for t, copy in zip(checked.lists[i], packed[i], strict=True):
            if t is not copy:
                t.copy_(copy)
    return found
