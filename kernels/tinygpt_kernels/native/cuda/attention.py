"""attention and attention_qkv on CUDA: csrc/cuda/attention_fwd.cu and attention_bwd.cu.

# B batch, T query tokens, S key tokens, H query heads, K key/value heads, E = H + 2K, D head dim
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import Impl, register
from ..common import CODES, FLOATS, Buffers, saved_lse
from . import common
from .common import MIN_SM, outputs

HEAD_DIMS = frozenset({32, 64, 96, 128})
_NOWHERE = (0, 0, 0, 0)  # strides of a gradient that nobody wants


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None, seed: Tensor | None,
    causal: bool, scale: float | None, dropout_p: float, *, out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Forward of ops.attention.

    Args:
        q: [B, T, H, D]; k, v: [B, S, K, D]; copied where D is not contiguous, or rows begin at no multiple of 16 bytes.
        out: (y, lse) to write into: [B, T, H, D] in q's dtype and [B, H, T] float32, contiguous.

    Returns:
        (y, lse).
    """
    q, k, v = _rows(q), _rows(k), _rows(v)
    B, T, H, D = q.shape
    y, lse = _results(q, (B, T, H, D), out)
    lengths, seed = _lengths(kv_lengths, q), _seed(seed, dropout_p, q)  # copies must live until the launch
    with common.on_device(q):
        common.module.cuda_attention_fwd(
            common.read(q), q.stride(), common.read(k), k.stride(), common.read(v), v.stride(), CODES[q.dtype],
            common.read(lengths), common.read(seed), common.written(y), common.written(lse),
            causal, _scale(scale, D), dropout_p, (B, T, k.shape[1], H, k.shape[2], D), common.stream(q),
        )  # fmt: skip
    return y, lse


def attention_bwd(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None, seed: Tensor | None, y: Tensor, lse: Tensor,
    causal: bool, scale: float | None, dropout_p: float, *,
    needs: tuple[bool, ...] = (True, True, True, False, False), out: Buffers | None = None,
) -> Buffers:  # fmt: skip
    """Backward of ops.attention.

    Args:
        dy: like y, any strides; q, k, v as in the forward; y, lse: saved by any backend's forward.
        needs: which of dq, dk and dv are wanted.
        out: (dq, dk, dv) to write into, None where not wanted; rows as q's are wanted, no two elements in one place.

    Returns:
        (dq, dk, dv, None, None), None where not wanted.
    """
    q, k, v, dy, y = (_rows(x) for x in (q, k, v, dy, y))
    B, T, H, D = q.shape
    lse = saved_lse("cuda", dy, y, lse, (B, T, H, D), q.dtype)
    if out is None:
        dq, dk, dv = (
            common.fresh(*like.shape, dtype=q.dtype, device=q.device) if need else None
            for need, like in zip(needs[:3], (q, k, v), strict=True)
        )
    else:
        dq, dk, dv = (_gradient(buffer, like) for buffer, like in zip(out[:3], (q, k, v), strict=True))
    lengths, seed = _lengths(kv_lengths, q), _seed(seed, dropout_p, q)
    workspace = _workspace(B, H, T, q)
    with common.on_device(q):
        common.module.cuda_attention_bwd(
            common.read(dy), dy.stride(), common.read(q), q.stride(), common.read(k), k.stride(), common.read(v), v.stride(),
            CODES[q.dtype], common.read(lengths), common.read(seed),
            common.read(y), y.stride(), common.read(lse),
            common.written(dq), _NOWHERE if dq is None else dq.stride(), common.written(dk), _NOWHERE if dk is None else dk.stride(),
            common.written(dv), _NOWHERE if dv is None else dv.stride(), causal, _scale(scale, D), dropout_p,
            (B, T, k.shape[1], H, k.shape[2], D), common.written(workspace), common.stream(q),
        )  # fmt: skip
    return dq, dk, dv, None, None


def attention_qkv_fwd(
    qkv: Tensor, kv_lengths: Tensor | None, seed: Tensor | None, heads: int, kv_heads: int,
    causal: bool, scale: float | None, dropout_p: float, *, out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Forward of ops.attention_qkv, on qkv [B, T, E, D] in place. `out` and what is returned as in attention_fwd."""
    qkv = _rows(qkv)
    B, T, _, D = qkv.shape
    y, lse = _results(qkv, (B, T, heads, D), out)
    lengths, seed = _lengths(kv_lengths, qkv), _seed(seed, dropout_p, qkv)
    strides, q, head = qkv.stride(), common.read(qkv), qkv.stride(2) * qkv.element_size()
    with common.on_device(qkv):
        common.module.cuda_attention_fwd(
            q, strides, q + heads * head, strides, q + (heads + kv_heads) * head, strides, CODES[qkv.dtype],
            common.read(lengths), common.read(seed), common.written(y), common.written(lse),
            causal, _scale(scale, D), dropout_p, (B, T, T, heads, kv_heads, D), common.stream(qkv),
        )  # fmt: skip
    return y, lse


def attention_qkv_bwd(
    dy: Tensor, qkv: Tensor, kv_lengths: Tensor | None, seed: Tensor | None, y: Tensor, lse: Tensor, heads: int, kv_heads: int,
    causal: bool, scale: float | None, dropout_p: float, *,
    needs: tuple[bool, ...] = (True, False, False), out: Buffers | None = None,
) -> Buffers:  # fmt: skip
    """Backward of ops.attention_qkv: (dqkv, None, None), packed as qkv is. `out`: a buffer for dqkv, rows as qkv's are wanted."""
    qkv, dy, y = _rows(qkv), _rows(dy), _rows(y)
    B, T, _, D = qkv.shape
    lse = saved_lse("cuda", dy, y, lse, (B, T, heads, D), qkv.dtype)
    if out is None or out[0] is None:
        dqkv = common.fresh(*qkv.shape, dtype=qkv.dtype, device=qkv.device)
    else:
        _gradient(dqkv := out[0], qkv)
    strides, q, head = qkv.stride(), common.read(qkv), qkv.stride(2) * qkv.element_size()
    grad_strides, dq, grad_head = dqkv.stride(), common.written(dqkv), dqkv.stride(2) * dqkv.element_size()
    lengths, seed = _lengths(kv_lengths, qkv), _seed(seed, dropout_p, qkv)
    workspace = _workspace(B, heads, T, qkv)
    with common.on_device(qkv):
        common.module.cuda_attention_bwd(
            common.read(dy), dy.stride(), q, strides, q + heads * head, strides, q + (heads + kv_heads) * head, strides,
            CODES[qkv.dtype], common.read(lengths), common.read(seed),
            common.read(y), y.stride(), common.read(lse),
            dq, grad_strides, dq + heads * grad_head, grad_strides, dq + (heads + kv_heads) * grad_head, grad_strides,
            causal, _scale(scale, D), dropout_p, (B, T, T, heads, kv_heads, D), common.written(workspace), common.stream(qkv),
        )  # fmt: skip
    return dqkv, None, None


def _whole_rows(x: Tensor) -> bool:
    """Whether a kernel can move the rows of `x`: D contiguous, in pieces of 16 bytes."""
    if x.shape[3] > 1 and x.stride(3) != 1:
        return False
    strides = (stride for stride, size in zip(x.stride()[:3], x.shape, strict=False) if size > 1)
    return x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in strides)


def _rows(x: Tensor) -> Tensor:
    return x if _whole_rows(x) else x.clone(memory_format=torch.contiguous_format)


def _scale(scale: float | None, D: int) -> float:
    return D**-0.5 if scale is None else scale


def _results(q: Tensor, shape: tuple[int, ...], out: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    B, T, H, _ = shape
    if out is None:
        return (common.fresh(*shape, dtype=q.dtype, device=q.device),
                common.fresh(B, H, T, dtype=torch.float32, device=q.device))  # fmt: skip
    y, lse = out
    return (outputs.fits("attention", y, shape, q.dtype, q.device),
            outputs.statistic("attention", (B, H, T), q.device, lse))  # fmt: skip


def _lengths(kv_lengths: Tensor | None, q: Tensor) -> Tensor | None:
    return None if kv_lengths is None else kv_lengths.to(q.device, torch.int64).contiguous()


def _seed(seed: Tensor | None, dropout_p: float, q: Tensor) -> Tensor | None:
    return None if seed is None or not dropout_p else seed.to(q.device)


def _workspace(B: int, H: int, T: int, q: Tensor) -> Tensor:
    size = common.module.cuda_attention_bwd_workspace(B, H, T)
    return common.fresh(size, dtype=torch.float32, device=q.device)


def _gradient(buffer: Tensor | None, like: Tensor) -> Tensor | None:
    if buffer is not None and (
        buffer.shape != like.shape
        or buffer.dtype != like.dtype
        or buffer.device != like.device
        or not _whole_rows(buffer)
    ):
        raise ValueError(
            f"attention on cuda: a buffer for a gradient must be {tuple(like.shape)} {like.dtype} on {like.device}, D contiguous and "
            f"rows at multiples of 16 bytes; got {tuple(buffer.shape)} {buffer.dtype} on {buffer.device}, strides "
            f"{buffer.stride()}"
        )
    return buffer


for _name, _fwd, _bwd in (
    ("attention", attention_fwd, attention_bwd),
    ("attention_qkv", attention_qkv_fwd, attention_qkv_bwd),
):
    register(
        Impl(_name, "cuda", fwd=_fwd, bwd=_bwd, devices=("cuda",), dtypes=FLOATS, dims={"D": HEAD_DIMS}, min_sm=MIN_SM)
    )
