"""Backend `torch`: PyTorch's own fused ops, under PyTorch's own autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw

from .dispatch import Impl, register, register_backend
from .ops import visible_keys


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    # F.layer_norm takes fp32 parameters with 16-bit inputs on a CPU and refuses them on a GPU; it wants both parameters alike.
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias, eps).to(x.dtype)


def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    h = x + residual
    return _layer_norm(h, weight, bias, eps), h


def _attention(
    q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None, seed: Tensor | None,
    causal: bool, scale: float | None, dropout_p: float,
) -> Tensor:  # fmt: skip
    if scale is not None and scale <= 0:  # PyTorch's flash kernel for CPUs gives NaN for these (2.13)
        q, scale = (-q, -scale) if scale else (q * 0, 1.0)
    if not q.numel():  # PyTorch's flash kernel for GPUs returns None for these (2.11)
        return q + 0 * (k.sum() + v.sum())
    T, S, grouped = q.shape[1], k.shape[1], q.shape[2] != k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if kv_lengths is None and (not causal or T == S):
        out = F.scaled_dot_product_attention(q, k, v, None, dropout_p, causal, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)
    # is_causal aligns the first query with the first key; this op aligns the last with the last valid one.
    visible = visible_keys(T, S, causal, kv_lengths, q.device)
    sighted = visible.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, visible | ~sighted, dropout_p, scale=scale, enable_gqa=grouped)
    return torch.where(sighted, out, 0).transpose(1, 2)


def _attention_qkv(
    qkv: Tensor, kv_lengths: Tensor | None, seed: Tensor | None, heads: int, kv_heads: int, *options: Any
) -> Tensor:
    q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=2)
    return _attention(q, k, v, kv_lengths, seed, *options)


def _decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None) -> Tensor:
    return _attention(q[:, None], k_cache, v_cache, lengths, None, False, scale, 0.0)[:, 0]


def _gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return F.gelu(x if bias is None else x + bias.to(x.dtype), approximate=approximate)


def _embedding(
    tokens: Tensor, token: Tensor, position: Tensor | None, positions: Tensor | None, scale: float
) -> Tensor:
    x = F.embedding(tokens, token)
    if scale != 1.0:
        x = x * scale
    if position is None:
        return x
    return x + (position[: tokens.shape[1]] if positions is None else F.embedding(positions, position))


def _cross_entropy(
    logits: Tensor, targets: Tensor, denominator: Tensor | None,
    ignore_index: int, label_smoothing: float, vocab: int | None,
) -> Tensor:  # fmt: skip
    if vocab is not None:
        logits = logits[:, :vocab]
    # A 16-bit loss has three digits: the sum is taken in fp32, as the op promises.
    total = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, ignore_index=ignore_index,
                            reduction="sum", label_smoothing=label_smoothing)  # fmt: skip
    return total / ((targets != ignore_index).sum().clamp(min=1) if denominator is None else denominator.reshape(()))


def _linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *options: Any) -> Tensor:
    return _cross_entropy(F.linear(hidden, weight), targets, *options)


@torch.no_grad()
def _adamw_(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
            step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, grad_scale: float) -> None:  # fmt: skip
    if grad_scale != 1.0:
        torch._foreach_mul_(list(grads), grad_scale)
    steps = torch.full((len(params),), float(step - 1), device=params[0].device).unbind()
    adamw(list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), [], list(steps), fused=True, amsgrad=False,
          maximize=False, beta1=betas[0], beta2=betas[1], lr=lr, weight_decay=weight_decay, eps=eps)  # fmt: skip


@torch.no_grad()
def _clip_grad_norm_(grads: Sequence[Tensor], max_norm: float) -> Tensor:
    norm = torch.nn.utils.get_total_norm(grads).float()
    torch._foreach_mul_(list(grads), (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


_SEEDED = {
    "seeded dropout": "draws its dropout mask from PyTorch's generator and cannot take a seed; leave the seed out"
}
_FLOAT = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

register_backend("torch")
register(Impl("layer_norm", "torch", call=_layer_norm, dtypes=_FLOAT))
register(Impl("add_layer_norm", "torch", call=_add_layer_norm, dtypes=_FLOAT))
register(Impl("attention", "torch", call=_attention, dtypes=_FLOAT, without=_SEEDED))
register(Impl("attention_qkv", "torch", call=_attention_qkv, dtypes=_FLOAT, without=_SEEDED))
register(Impl("decode_attention", "torch", call=_decode_attention, dtypes=_FLOAT))
register(Impl("gelu", "torch", call=_gelu, dtypes=_FLOAT))
register(Impl("embedding", "torch", call=_embedding, dtypes=_FLOAT))
register(Impl("cross_entropy", "torch", call=_cross_entropy, dtypes=_FLOAT))
register(Impl("linear_cross_entropy", "torch", call=_linear_cross_entropy, dtypes=_FLOAT))
register(Impl("adamw_", "torch", call=_adamw_, dtypes=_FLOAT))
register(Impl("clip_grad_norm_", "torch", call=_clip_grad_norm_, dtypes=_FLOAT))
