"""What each op accepts, and what a choice of backend depends on: one function per op, on its flat
arguments (tensors first, then the rest).

Each raises ValueError where arguments break the op's contract, and returns the tensor whose device and dtype count, the
sizes, and the features of the call. It runs at every call: nothing is looked at twice, no message is made before it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Description = tuple[Tensor, tuple[tuple[str, int], ...], tuple[str, ...]]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Description:
    if x.dim() == 0 or weight.shape != x.shape[-1:] or (bias is not None and bias.shape != weight.shape):
        raise ValueError(
            f"layer_norm: x {tuple(x.shape)} needs weight and bias of its last dimension, "
            f"got {tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.dtype is not x.dtype and parameter.dtype is not torch.float32:
            raise ValueError(
                f"layer_norm: {name} is {parameter.dtype}; it must be {x.dtype}, as x is, or torch.float32"
            )
    C = x.shape[-1]
    return x, (("C", C), ("R", x.numel() // C if C else 0)), ()


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Description:
    if not (x.shape == residual.shape and x.dtype == residual.dtype):
        raise ValueError(
            f"add_layer_norm: x {tuple(x.shape)} {x.dtype} and residual {tuple(residual.shape)} {residual.dtype} must be alike"
        )
    return layer_norm(x, weight, bias, eps)


def attention(
    q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None, seed: Tensor | None,
    causal: bool, scale: float | None, dropout_p: float,
) -> Description:  # fmt: skip
    fits = (
        q.dim() == k.dim() == v.dim() == 4 and k.shape == v.shape and q.shape[0] == k.shape[0]
        and q.shape[3] == k.shape[3] and k.shape[2] > 0 and q.shape[2] % k.shape[2] == 0
    )  # fmt: skip
    if not fits or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"attention: q [B,T,H,D] {tuple(q.shape)} {q.dtype}, k and v [B,S,K,D] {tuple(k.shape)} {k.dtype}, "
            f"{tuple(v.shape)} {v.dtype}: B, D and dtypes must be equal, k and v alike, H a multiple of K"
        )
    B, T, H, D = q.shape
    dims = (("D", D), ("H", H), ("K", k.shape[2]), ("T", T), ("S", k.shape[1]), ("B", B))
    return q, dims, _attention_features(q, causal, kv_lengths, dropout_p, seed)


def _attention_features(
    q: Tensor, causal: bool, kv_lengths: Tensor | None, p: float, seed: Tensor | None
) -> tuple[str, ...]:
    if not p and kv_lengths is None:
        return ("causal",) if causal else ()
    if not (0.0 <= p < 1.0):
        raise ValueError(f"attention: dropout_p is {p}; it must be at least 0 and below 1")
    if not (kv_lengths is None or kv_lengths.shape == q.shape[:1]):
        raise ValueError(f"attention: kv_lengths must be [B] = [{q.shape[0]}]")
    if not (seed is None or (seed.numel() == 1 and seed.dtype == torch.int64)):
        raise ValueError("attention: seed must be an int64 tensor of one element")
    features = ["causal"] if causal else []
    if kv_lengths is not None:
        features.append("kv_lengths")
    if p:
        features.append("dropout" if seed is None else "seeded dropout")
    return tuple(features)


def attention_qkv(
    qkv: Tensor, kv_lengths: Tensor | None, seed: Tensor | None,
    heads: int, kv_heads: int, causal: bool, scale: float | None, dropout_p: float,
) -> Description:  # fmt: skip
    if qkv.dim() != 4 or heads < 1 or kv_heads < 1 or heads % kv_heads or qkv.shape[2] != heads + 2 * kv_heads:
        raise ValueError(
            f"attention_qkv: qkv {tuple(qkv.shape)} must be [B, T, {heads} + 2*{kv_heads}, D], kv_heads dividing heads"
        )
    B, T, _, D = qkv.shape
    dims = (("D", D), ("H", heads), ("K", kv_heads), ("T", T), ("S", T), ("B", B))
    return qkv, dims, _attention_features(qkv, causal, kv_lengths, dropout_p, seed)


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None) -> Description:
    if not (q.dim() == 3):
        raise ValueError(f"decode_attention: q must be [B, H, D], one new token a row, got {tuple(q.shape)}")
    return attention(q[:, None], k_cache, v_cache, lengths, None, False, scale, 0.0)


def gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Description:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate is {approximate!r}; it must be 'none' or 'tanh'")
    if not (x.dim() > 0 and (bias is None or bias.shape == x.shape[-1:])):
        raise ValueError(f"gelu: bias must have x's last dimension, x is {tuple(x.shape)}")
    C = x.shape[-1]
    return x, (("C", C), ("R", x.numel() // C if C else 0)), ("bias",) if bias is not None else ()


def embedding(
    tokens: Tensor, token: Tensor, position: Tensor | None, positions: Tensor | None, scale: float
) -> Description:
    if not (tokens.dim() == 2 and not tokens.is_floating_point()):
        raise ValueError(f"embedding: tokens must be integers [B, T], got {tuple(tokens.shape)} {tokens.dtype}")
    if position is not None:
        if position.shape[1:] != token.shape[1:] or position.dtype != token.dtype:
            raise ValueError("embedding: the two tables must have the same channels and dtype")
        if positions is None and tokens.shape[1] > position.shape[0]:
            raise ValueError(
                f"embedding: {tokens.shape[1]} tokens a row, but the position table holds {position.shape[0]}"
            )
    if not (positions is None or (position is not None and positions.shape == tokens.shape)):
        raise ValueError("embedding: positions must be [B, T] like tokens, and need a position table")
    return (
        token,
        (("C", token.shape[1]), ("V", token.shape[0]), ("R", tokens.numel())),
        ("positions",) if positions is not None else (),
    )


def cross_entropy(
    logits: Tensor, targets: Tensor, denominator: Tensor | None,
    ignore_index: int, label_smoothing: float, vocab: int | None,
) -> Description:  # fmt: skip
    V = logits.shape[-1]
    if logits.dim() != 2 or targets.shape != logits.shape[:1] or (vocab is not None and not 0 < vocab <= V):
        raise ValueError(
            f"cross_entropy: logits [R, V] {tuple(logits.shape)}, targets [R] {tuple(targets.shape)}, vocab {vocab}"
        )
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"cross_entropy: label_smoothing is {label_smoothing}; it must be at least 0 and below 1")
    return logits, (("V", V), ("R", logits.shape[0])), ()


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *options: Any) -> Description:
    if not (hidden.dim() == 2 and weight.shape[1:] == hidden.shape[1:] and targets.shape == hidden.shape[:1]):
        raise ValueError(
            f"linear_cross_entropy: hidden [R, C] {tuple(hidden.shape)}, weight [V, C] {tuple(weight.shape)}, "
            f"targets [R] {tuple(targets.shape)}"
        )
    return hidden, (("C", hidden.shape[1]), ("V", weight.shape[0]), ("R", hidden.shape[0])), ()


def lists(params: Sequence[Tensor], *rest: Any) -> Description:
    if not params:
        raise ValueError("an optimizer step needs at least one tensor")
    return params[0], (), ()


def clip(grads: Sequence[Tensor], max_norm: float) -> Description:
    if not max_norm > 0:
        raise ValueError(f"clip_grad_norm_: max_norm is {max_norm}; it must be above 0")
    return lists(grads)
