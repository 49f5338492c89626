"""adamw_ and clip_grad_norm_ on CUDA, all tensors in one launch: csrc/cuda/optimizer.cu.

The addresses travel as an argument of the kernel. Nothing is copied to the device and nobody waits, so that a CUDA graph can
capture a step; it replays with the addresses, the learning rate and the step that it was captured with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import lists
from ...lists import AdamW, Checked
from ..common import FLOATS, codes
from . import common
from .common import MIN_SM


def _adamw(checked: Checked, numbers: AdamW) -> None:
    params, grads, exp_avgs, exp_avg_sqs = checked.lists
    with common.on_device(params[0]):
        common.module.cuda_adamw_(
            [common.updated(p) for p in params], [common.read(g) for g in grads], [common.updated(m) for m in exp_avgs],
            [common.updated(v) for v in exp_avg_sqs], checked.sizes, *codes(checked)[:3], *numbers.flat, common.stream(params[0]),
        )  # fmt: skip


def _clip(checked: Checked, max_norm: float) -> Tensor:
    grads = checked.lists[0]
    norm = common.fresh(dtype=torch.float32, device=grads[0].device)
    parts = common.module.cuda_clip_grad_norm_workspace(checked.sizes)
    workspace = common.fresh(parts, dtype=torch.float32, device=norm.device)
    with common.on_device(norm):
        common.module.cuda_clip_grad_norm_(
            [common.updated(g) for g in grads], checked.sizes, *codes(checked), max_norm, common.written(norm),
            common.written(workspace), common.stream(norm),
        )  # fmt: skip
    return norm


adamw_, clip_grad_norm_ = lists.register("cuda", _adamw, _clip, devices=("cuda",), dtypes=FLOATS, min_sm=MIN_SM)
