"""adamw_ and clip_grad_norm_ in C++, all tensors in one call: csrc/cpu/optimizer.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import lists
from ..lists import AdamW, Checked
from .common import FLOATS, codes, missing

if not missing:
    from .. import _C


def _adamw(checked: Checked, numbers: AdamW) -> None:
    p, g, m, v = ([t.data_ptr() for t in tensors] for tensors in checked.lists)
    param, grad, moment, _ = codes(checked)
    _C.adamw_(p, g, m, v, checked.sizes, param, grad, moment, *numbers.flat)


def _clip(checked: Checked, max_norm: float) -> Tensor:
    norm = torch.empty((), dtype=torch.float32)
    addresses = [g.data_ptr() for g in checked.lists[0]]
    _C.clip_grad_norm_(addresses, checked.sizes, codes(checked)[0], max_norm, norm.data_ptr())
    return norm


adamw_, clip_grad_norm_ = lists.register("cpp", _adamw, _clip, devices=("cpu",), dtypes=FLOATS)
