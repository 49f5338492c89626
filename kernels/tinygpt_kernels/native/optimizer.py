"""adamw_ and clip_grad_norm_ in C++, all tensors in one call: csrc/cpu/optimizer.cpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..dispatch import Impl, register
from .common import CODES, FLOATS, missing

if not missing:
    from .. import _C


def _codes(op: str, tensors: Sequence[Tensor]) -> list[int]:
    """The module's numbers for the tensors' dtypes.

    Raises:
        ValueError: a tensor that the kernels cannot take.
    """
    try:
        found = [CODES[t.dtype] for t in tensors]
    except KeyError as error:
        raise ValueError(f"{op} on cpp takes float32, float16 and bfloat16, not {error}; use --backend torch") from None
    for t in tensors:
        if not t.is_cpu:
            raise ValueError(f"{op} on cpp: a tensor is on {t.device}, not on the CPU")
    return found


def _dense(lists: Sequence[Sequence[Tensor]]) -> bool:
    return all(all(map(Tensor.is_contiguous, tensors)) for tensors in lists)


def _on_copies(
    lists: Sequence[Sequence[Tensor]], run: Callable[..., Tensor | None], written: Sequence[int]
) -> Tensor | None:
    """`run` on contiguous lists; of those it writes, what went to copies goes back."""
    packed = [[t.contiguous() for t in tensors] for tensors in lists]
    found = run(*packed)
    for i in written:
        for t, copy in zip(lists[i], packed[i], strict=True):
            if t is not copy:
                t.copy_(copy)
    return found


@torch.library.custom_op("tinygpt_kernels::adamw_cpp", mutates_args=("params", "exp_avgs", "exp_avg_sqs"))
def _adamw_operator(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    step: int, lr: float, betas: Sequence[float], eps: float, weight_decay: float, grad_scale: float,
) -> None:  # fmt: skip
    adamw_(params, grads, exp_avgs, exp_avg_sqs, step, lr, (betas[0], betas[1]), eps, weight_decay, grad_scale)


@torch.library.custom_op("tinygpt_kernels::clip_grad_norm_cpp", mutates_args=("grads",))
def _clip_operator(grads: Sequence[Tensor], max_norm: float) -> Tensor:
    return clip_grad_norm_(grads, max_norm)


_clip_operator.register_fake(lambda grads, max_norm: grads[0].new_empty((), dtype=torch.float32))


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, grad_scale: float,
) -> None:  # fmt: skip
    """ops.adamw_; see there.

    Raises:
        ValueError: lists not alike in length or sizes, a dtype other than float32, float16 and bfloat16, two moments of one
            tensor in different dtypes.
    """
    if torch.compiler.is_compiling():  # addresses cannot be traced; the operator is one node of the graph
        _adamw_operator(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay, grad_scale)
        return
    lists = (params, grads, exp_avgs, exp_avg_sqs)
    sizes, *others = ([t.numel() for t in tensors] for tensors in lists)
    param_codes, grad_codes, moment_codes, square_codes = (_codes("adamw_", tensors) for tensors in lists)
    if any(other != sizes for other in others) or moment_codes != square_codes:
        raise ValueError("adamw_ on cpp: params, grads, exp_avgs and exp_avg_sqs must be alike in length and shapes, and "
                         "exp_avgs and exp_avg_sqs in dtypes")  # fmt: skip
    if not _dense(lists):
        options = (step, lr, betas, eps, weight_decay, grad_scale)
        _on_copies(lists, lambda p, g, m, v: adamw_(p, g, m, v, *options), (0, 2, 3))
        return
    p, g, m, v = ([t.data_ptr() for t in tensors] for tensors in lists)
    _C.adamw_(
        p, g, m, v, sizes, param_codes, grad_codes, moment_codes,
        step, lr, betas[0], betas[1], eps, weight_decay, grad_scale,
    )  # fmt: skip


@torch.no_grad()
def clip_grad_norm_(grads: Sequence[Tensor], max_norm: float) -> Tensor:
    """ops.clip_grad_norm_; see there.

    Raises:
        ValueError: a dtype other than float32, float16 and bfloat16.
    """
    if torch.compiler.is_compiling():
        found: Tensor = _clip_operator(grads, max_norm)
        return found
    codes = _codes("clip_grad_norm_", grads)
    if not _dense([grads]):
        copied = _on_copies([grads], lambda packed: clip_grad_norm_(packed, max_norm), (0,))
        assert copied is not None
        return copied
    norm = torch.empty((), dtype=torch.float32)
    _C.clip_grad_norm_([g.data_ptr() for g in grads], [g.numel() for g in grads], codes, max_norm, norm.data_ptr())
    return norm


for _name, _call in (("adamw_", adamw_), ("clip_grad_norm_", clip_grad_norm_)):
    register(Impl(_name, "cpp", call=_call, devices=("cpu",), dtypes=FLOATS))
