"""Every op the way it is usually written in PyTorch: what the kernels are compared with, held to the same gate.

`OPS`: functions with the op's signature. `pair`: PyTorch's own forward and backward without autograd, where it has functions for
both, so that kernels alone stand beside kernels alone.

# B batch, T tokens, H heads, K key/value heads, D head dim, C channels, R rows, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinygpt_kernels import measure
from tinygpt_kernels.dispatch import all_ops
from tinygpt_kernels.workloads import Workload

aten = torch.ops.aten


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Any:
    h = x + residual
    return F.layer_norm(h, weight.shape, weight, bias, eps), h


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None, dropout_p: float = 0.0,
              **_: Any) -> Tensor:  # fmt: skip
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, None, dropout_p, causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.transpose(1, 2)


def attention_qkv(qkv: Tensor, heads: int, kv_heads: int, *, causal: bool, scale: float | None = None, dropout_p: float = 0.0,
                  **_: Any) -> Tensor:  # fmt: skip
    B, T, E, D = qkv.shape
    parts = qkv.view(B, T, E * D).split([heads * D, kv_heads * D, kv_heads * D], dim=2)
    q, k, v = (part.view(B, T, -1, D).transpose(1, 2) for part in parts)
    y = F.scaled_dot_product_attention(q, k, v, None, dropout_p, causal, scale=scale, enable_gqa=heads != kv_heads)
    return y.transpose(1, 2).contiguous()


def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


def embedding(tokens: Tensor, token: Tensor, position: Tensor | None = None, **_: Any) -> Tensor:
    x = F.embedding(tokens, token)
    return x if position is None else x + position[: tokens.shape[1]]


def cross_entropy(logits: Tensor, targets: Tensor, **_: Any) -> Tensor:
    return F.cross_entropy(logits.float(), targets)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, **_: Any) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


_optimizers: dict[int, Any] = {}  # of the lists a benchmark passes again and again; the lists stay alive with them


def adamw_(params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], *, step: int, lr: float,
           betas: tuple[float, float], eps: float, weight_decay: float, grad_scale: float = 1.0) -> None:  # fmt: skip
    if id(params) not in _optimizers:
        optimizer = torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
            p.grad = g
            optimizer.state[p] = {"step": torch.tensor(float(step - 1)), "exp_avg": m, "exp_avg_sq": v}
        _optimizers[id(params)] = params, optimizer
    _optimizers[id(params)][1].step()


def clip_grad_norm_(grads: list[Tensor], max_norm: float) -> Tensor:
    if id(grads) not in _optimizers:
        parameters = [torch.zeros_like(g) for g in grads]
        for p, g in zip(parameters, grads, strict=True):
            p.grad = g
        _optimizers[id(grads)] = grads, parameters
    return torch.nn.utils.clip_grad_norm_(_optimizers[id(grads)][1], max_norm)


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    q, k, v = q[:, :, None], k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    if q.shape[0] == 1:
        k, v = k[:, :, : int(lengths)], v[:, :, : int(lengths)]
        mask = None
    else:
        mask = (torch.arange(k.shape[2]) < lengths[:, None])[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])[:, :, 0]


OPS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (layer_norm, add_layer_norm, attention, attention_qkv, gelu, embedding, cross_entropy,
                            linear_cross_entropy, adamw_, clip_grad_norm_, decode_attention)
}  # fmt: skip


def pair(workload: Workload, dtype: torch.dtype) -> Callable[[], object] | None:
    """Forward and backward of PyTorch on a CPU without autograd; None where it has no such functions."""
    args, kwargs = measure.unseeded(workload, dtype, "cpu")
    named = dict(zip(all_ops()[workload.op].order, all_ops()[workload.op].flatten(*args, **kwargs), strict=True))
    make = {
        "layer_norm": _norm,
        "add_layer_norm": _norm,
        "attention": _sdpa,
        "attention_qkv": _sdpa,
        "gelu": _gelu,
    }.get(workload.op)
    if make is None or named.get("dropout_p") or named.get("kv_heads", 0) != named.get("heads", 0):
        return None
    run = make(**named)

    def without_autograd() -> object:
        with torch.no_grad():
            return run()

    return without_autograd


def _norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> Callable[[], object]:
    C, dy, dh, needs = x.shape[-1:], torch.randn_like(x), torch.randn_like(x), [True, True, bias is not None]

    def run() -> object:
        h = x if residual is None else x + residual
        _, mean, rstd = aten.native_layer_norm(h, C, weight, bias, eps)
        gradients = aten.native_layer_norm_backward(dy, h, C, mean, rstd, weight, bias, needs)
        return gradients[0] if residual is None else gradients[0].add_(dh)

    return run


def _gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Callable[[], object]:
    dy = torch.randn_like(x)

    def run() -> object:
        z = x if bias is None else x + bias
        F.gelu(z, approximate=approximate)
        dz = aten.gelu_backward(dy, z, approximate=approximate)
        return dz if bias is None else dz.sum(0)

    return run


def _sdpa(causal: bool, scale: float | None, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None,
          qkv: Tensor | None = None, heads: int = 0, **_: Any) -> Callable[[], object] | None:  # fmt: skip
    def run() -> object:
        parts = (q, k, v) if qkv is None else qkv.split(heads, dim=2)
        q_, k_, v_ = (t.transpose(1, 2) for t in parts)
        y, lse = aten._scaled_dot_product_flash_attention_for_cpu(q_, k_, v_, 0.0, causal, scale=scale)
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dy, q_, k_, v_, y, lse, 0.0, causal, scale=scale)  # fmt: skip
        return gradients if qkv is None else torch.cat([g.transpose(1, 2) for g in gradients], dim=2)

    shape = q.shape if q is not None else (*qkv.shape[:2], heads, qkv.shape[3])
    dy = torch.randn(shape, dtype=(q if q is not None else qkv).dtype).transpose(1, 2)
    return run
