"""Every op: its contract, its docstring and its reference in plain PyTorch.

# B batch, T query tokens, S key tokens, H query heads, K key/value heads, E = H + 2K, D head dim,
# C channels, V vocabulary, R rows (all leading dimensions together)

A reference computes in at least fp32 (fp64 where the inputs are fp64), casts once at the end, and returns the op's outputs
followed by what its backward needs. It is the definition: every other backend is held to it, evaluated in fp64.

    ops.layer_norm(x, weight, bias)                 auto: what was measured fastest for this call
    ops.layer_norm.on("triton")(x, weight, bias)    strict: this backend, or BackendError
    ops.layer_norm.on("cpp,torch")                  strict: the first of these that can
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import contracts
from .contracts import Description
from .dispatch import Impl, register, register_backend
from .op import Op
from .philox import keep_mask

_ANY_FLOAT = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def op(describe: Callable[..., Description], **contract: Any) -> Callable[[Callable[..., Any]], Op]:
    """Declare an op from its reference. `describe` checks the arguments and names what a choice of backend depends on."""

    def declare(reference: Callable[..., Any]) -> Op:
        declared = Op(reference, describe, **contract)

        def call(*flat: Any) -> Any:
            results = declared.run_reference(flat)
            return results[0] if declared.outputs == 1 else results[: declared.outputs]

        register(Impl(declared.name, "reference", call=call, dtypes=_ANY_FLOAT))
        return declared

    return declare


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# ---------------------------------------------------------------------------------------------------------------- norms


@op(contracts.layer_norm, saved=2)
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Any:
    """Normalise each row to mean 0 and variance 1, then scale and shift (Ba, Kiros, Hinton 2016, eq. 4).

    y = (x - mean) * rstd * weight + bias with rstd = 1 / sqrt(var + eps), var the biased variance.

    Args:
        x: [..., C] float32, float16 or bfloat16, any strides.
        weight, bias: [C] in x's dtype or float32.
        eps: added to the variance.

    Returns:
        y like x. Saved for backward: mean, rstd [R], at least float32.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    acc = _accumulator(x)
    x_RC = x.reshape(-1, x.shape[-1]).to(acc)
    mean = x_RC.mean(-1)
    centred = x_RC - mean[:, None]
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    y = centred * rstd[:, None] * weight.to(acc)
    if bias is not None:
        y = y + bias.to(acc)
    return y.to(x.dtype).view(x.shape), mean, rstd


@op(contracts.add_layer_norm, outputs=2, saved=2, saves_outputs=True)
def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Any:
    """The residual addition and the norm that follows it: h = x + residual, y = layer_norm(h).

    Args:
        x, residual: [..., C] of one shape and dtype.
        weight, bias, eps: as in layer_norm.

    Returns:
        (y, h), both like x; the norm sees h as it is stored. Saved: mean, rstd [R].
    """
    h = x + residual
    y, mean, rstd = layer_norm.reference(h, weight, bias, eps)
    return y, h, mean, rstd


# ------------------------------------------------------------------------------------------------------------ attention


@op(contracts.attention, saved=1, saves_outputs=True, autocasts=("q", "k", "v"))
def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None,
              kv_lengths: Tensor | None = None, dropout_p: float = 0.0, seed: Tensor | None = None) -> Any:  # fmt: skip
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1): softmax(q kᵀ · scale) v.

    Args:
        q: [B, T, H, D]; k, v: [B, S, K, D], K divides H; float32, float16 or bfloat16, last dimension contiguous.
        causal: a query sees the keys up to its own place; the last query is aligned with the last valid key.
        scale: None means 1 / sqrt(D).
        kv_lengths: [B] integers, how many leading keys of each row are valid; None means S.
        dropout_p: probability of dropping an attention weight; the others are scaled by 1 / (1 - p).
        seed: int64 tensor of one element: the mask is philox.keep_mask(seed, p, (B, H, T, S)), the same on every backend.
            None: PyTorch's generator draws the mask, or for a kernel a seed.

    Returns:
        [B, T, H, D] in q's dtype; a query that sees no key gives 0. Saved: lse [B, H, T], -inf for such a query.

    Under autocast, q, k and v are cast to the autocast dtype.
    """
    acc = _accumulator(q)
    B, T, H, D = q.shape
    S, groups = k.shape[1], H // k.shape[2]
    k, v = (x.to(acc).repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.to(acc), k) * (D**-0.5 if scale is None else scale)
    visible = visible_keys(T, S, causal, kv_lengths, q.device)
    sighted = visible.any(-1, keepdim=True)
    # A row that sees nothing is computed unmasked and then zeroed: softmax over -inf alone has no gradient, only NaN.
    scores = scores.masked_fill(~visible & sighted, -math.inf)
    weights = torch.softmax(scores, dim=-1) * sighted
    if dropout_p and seed is not None:
        weights = weights * keep_mask(seed, dropout_p, (B, H, T, S)) / (1 - dropout_p)
    elif dropout_p:
        weights = F.dropout(weights, dropout_p)
    out = torch.einsum("bhts,bshd->bthd", weights, v).to(q.dtype)
    return out, torch.logsumexp(scores.detach(), dim=-1).masked_fill(~sighted[..., 0], -math.inf)


def visible_keys(T: int, S: int, causal: bool, kv_lengths: Tensor | None, device: torch.device) -> Tensor:
    """Which keys each query sees: bool [B or 1, 1, T, S]. The last query is aligned with the last valid key."""
    key = torch.arange(S, device=device)
    length = torch.full((1,), S, device=device) if kv_lengths is None else kv_lengths.to(device)
    valid = (key < length[:, None])[:, None, None, :]
    if not causal:
        return valid.expand(-1, 1, T, S)
    own = torch.arange(T, device=device) + (length[:, None] - T)
    return valid & (key <= own[:, None, :, None])


@op(contracts.attention_qkv, saved=1, saves_outputs=True, autocasts=("qkv",))
def attention_qkv(qkv: Tensor, heads: int, kv_heads: int, *, causal: bool = True, scale: float | None = None,
                  kv_lengths: Tensor | None = None, dropout_p: float = 0.0, seed: Tensor | None = None) -> Any:  # fmt: skip
    """Self-attention on the packed projection, read in place: no transpose, no copy, and one packed gradient.

    Args:
        qkv: [B, T, E, D], E = heads + 2 * kv_heads: the query heads, then the key heads, then the value heads.
        causal, scale, kv_lengths, dropout_p, seed: as in attention.

    Returns:
        [B, T, heads, D]. Saved: lse [B, heads, T].
    """
    q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=2)
    return attention.reference(
        q, k, v, causal=causal, scale=scale, kv_lengths=kv_lengths, dropout_p=dropout_p, seed=seed
    )


@op(contracts.decode_attention)
def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None = None) -> Any:
    """Attention of one new token per row against its own length of cache.

    Args:
        q: [B, H, D]; k_cache, v_cache: [B, S, K, D]; lengths: [B] integers, keys in use per row, the new token's included.
        scale: None means 1 / sqrt(D).

    Returns:
        [B, H, D] in q's dtype. No gradient is promised by any backend but the reference.
    """
    return attention.reference(q[:, None], k_cache, v_cache, causal=False, scale=scale, kv_lengths=lengths)[0][:, 0]


# ------------------------------------------------------------------------------------------------- activation, embedding


@op(contracts.gelu)
def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Any:
    """Bias add and GELU in one pass (Hendrycks, Gimpel 2016): z Φ(z) with z = x + bias.

    Args:
        x: [..., C]; bias: [C] in x's dtype or float32, or None.
        approximate: "none" for the Gaussian's distribution function, "tanh" for its approximation (GPT-2's).

    Returns:
        like x.
    """
    z = x.to(_accumulator(x))
    if bias is not None:
        z = z + bias.to(z.dtype)
    if approximate == "tanh":
        y = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    else:
        y = 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
    return y.to(x.dtype)


@op(contracts.embedding)
def embedding(tokens: Tensor, token: Tensor, position: Tensor | None = None, positions: Tensor | None = None,
              scale: float = 1.0) -> Any:  # fmt: skip
    """Scaled token row plus position row; the backward is deterministic.

    Args:
        tokens: [B, T] integers below V; token: [V, C]; position: [P, C] or None.
        positions: [B, T] rows of the position table; None means the offset within the row.
        scale: multiplies the token row (sqrt(C) in Vaswani et al. 2017, section 3.4).

    Returns:
        [B, T, C] in the tables' dtype.
    """
    acc = _accumulator(token)
    x = scale * token.to(acc)[tokens]
    if position is not None:
        x = x + (position.to(acc)[: tokens.shape[1]] if positions is None else position.to(acc)[positions])
    return x.to(token.dtype)


# --------------------------------------------------------------------------------------------------------------- losses


@op(contracts.cross_entropy, saved=1)
def cross_entropy(logits: Tensor, targets: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0,
                  vocab: int | None = None, denominator: Tensor | None = None) -> Any:  # fmt: skip
    """Mean negative log-likelihood of the targets.

    Args:
        logits: [R, V]; targets: [R] int64; a target equal to ignore_index does not count.
        label_smoothing: weight of the uniform distribution over the vocabulary (Szegedy et al. 2016, section 7).
        vocab: columns from here on are padding and do not exist; None means V.
        denominator: tensor of one element that divides the sum, in place of the number of counted targets, so that
            gradients accumulated over batches with different padding are exact.

    Returns:
        loss, a scalar, at least float32; 0 with zero gradient when nothing counts. Saved: lse [R].
    """
    logits = logits[:, :vocab].to(_accumulator(logits))
    lse = torch.logsumexp(logits, dim=-1)
    counted = targets != ignore_index
    chosen = logits.gather(1, targets.masked_fill(~counted, 0)[:, None])[:, 0]
    nll = lse - (1 - label_smoothing) * chosen
    if label_smoothing:
        nll = nll - label_smoothing * logits.mean(-1)
    total = torch.where(counted, nll, 0).sum()
    return total / (counted.sum().clamp(min=1) if denominator is None else denominator.reshape(())), lse.detach()


@op(contracts.linear_cross_entropy, saved=1, autocasts=("hidden", "weight"))
def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100,
                         label_smoothing: float = 0.0, vocab: int | None = None,
                         denominator: Tensor | None = None) -> Any:  # fmt: skip
    """cross_entropy(hidden weightᵀ, targets); kernels never hold the R x V logits, this reference does.

    Args:
        hidden: [R, C]; weight: [V, C] in hidden's dtype; targets and options as in cross_entropy.

    Returns:
        loss, a scalar, at least float32. Saved: lse [R]. Under autocast, hidden and weight are cast to the autocast dtype.
    """
    acc = _accumulator(hidden)
    return cross_entropy.reference(hidden.to(acc) @ weight.to(acc).T, targets, ignore_index=ignore_index,
                                   label_smoothing=label_smoothing, vocab=vocab, denominator=denominator)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ optimizer


@op(contracts.lists, in_place=True)
@torch.no_grad()
def adamw_(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor], *,
           step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
           grad_scale: float = 1.0) -> None:  # fmt: skip
    """One AdamW step (Loshchilov, Hutter 2019, algorithm 2) on all tensors, in place.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: lists alike in length and shapes; grads may be overwritten.
        step: 1 at the first step. lr: learning rate, also of the decay: p -= lr * weight_decay * p.
        betas, eps, weight_decay: as in the paper. grad_scale: multiplies the gradients first.
    """
    beta1, beta2 = betas
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        g = g.to(m.dtype) * grad_scale
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.mul_(1 - lr * weight_decay)
        p.add_(((m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)).to(p.dtype), alpha=-lr)


@op(contracts.clip, in_place=True)
@torch.no_grad()
def clip_grad_norm_(grads: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients, in place, so that their common 2-norm is at most max_norm (Pascanu et al. 2013, algorithm 1).

    Returns:
        the norm before scaling, a scalar, at least float32. When it is not finite the gradients become so too.
    """
    norm = torch.stack([g.to(_accumulator(g)).square().sum() for g in grads]).sum().sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for g in grads:
        g.mul_(factor.to(g.dtype))
    return norm


register_backend("reference")
