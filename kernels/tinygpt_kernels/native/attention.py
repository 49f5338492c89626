"""attention and attention_qkv in C++: csrc/cpu/attention_fwd.cpp and attention_bwd.cpp.

# B batch, T query tokens, S key tokens, H query heads, K key/value heads, E = H + 2K, D head dim
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Impl, register
from .common import CODES, CPU, FLOATS, Buffers, address, missing, outputs, saved_lse

if not missing:
    from .. import _C

MAX_D = 256
_NOWHERE = (0, 0, 0, 0)  # strides of a gradient that nobody wants


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None, seed: Tensor | None,
    causal: bool, scale: float | None, dropout_p: float, *, out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Forward of ops.attention.

    Args:
        q: [B, T, H, D]; k, v: [B, S, K, D], D contiguous, else copied.
        out: (y, lse) to write into: [B, T, H, D] in q's dtype and [B, H, T] float32, contiguous.

    Returns:
        (y, lse).
    """
    q, k, v = _last_contiguous(q), _last_contiguous(k), _last_contiguous(v)
    B, T, H, D = q.shape
    y, lse = _results(B, T, H, D, q.dtype, out)
    lengths, seed = _lengths(kv_lengths), _seed(seed, dropout_p)
    _C.attention_fwd(
        q.data_ptr(), q.stride(), k.data_ptr(), k.stride(), v.data_ptr(), v.stride(), CODES[q.dtype],
        address(lengths), address(seed), y.data_ptr(), lse.data_ptr(),
        causal, D**-0.5 if scale is None else scale, dropout_p, (B, T, k.shape[1], H, k.shape[2], D),
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
        out: (dq, dk, dv) to write into, None where not wanted; D contiguous, no two elements in one place.

    Returns:
        (dq, dk, dv, None, None), None where not wanted.
    """
    q, k, v, dy, y = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v, dy, y))
    B, T, H, D = q.shape
    lse = saved_lse("cpp", dy, y, lse, (B, T, H, D), q.dtype)
    if out is None:
        need_q, need_k, need_v = needs[:3]
        dq = torch.empty(q.shape, dtype=q.dtype) if need_q else None
        dk = torch.empty(k.shape, dtype=q.dtype) if need_k else None
        dv = torch.empty(v.shape, dtype=q.dtype) if need_v else None
    else:
        dq, dk, dv = (_gradient(buffer, like) for buffer, like in zip(out[:3], (q, k, v), strict=True))
    lengths, seed = _lengths(kv_lengths), _seed(seed, dropout_p)
    _C.attention_bwd(
        dy.data_ptr(), dy.stride(), q.data_ptr(), q.stride(), k.data_ptr(), k.stride(), v.data_ptr(), v.stride(),
        CODES[q.dtype], address(lengths), address(seed), y.data_ptr(), y.stride(), lse.data_ptr(),
        address(dq), _NOWHERE if dq is None else dq.stride(), address(dk), _NOWHERE if dk is None else dk.stride(),
        address(dv), _NOWHERE if dv is None else dv.stride(),
        causal, D**-0.5 if scale is None else scale, dropout_p, (B, T, k.shape[1], H, k.shape[2], D),
    )  # fmt: skip
    return dq, dk, dv, None, None


def attention_qkv_fwd(
    qkv: Tensor, kv_lengths: Tensor | None, seed: Tensor | None, heads: int, kv_heads: int,
    causal: bool, scale: float | None, dropout_p: float, *, out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Forward of ops.attention_qkv, on qkv [B, T, E, D] in place. `out` and what is returned as in attention_fwd."""
    qkv = _last_contiguous(qkv)
    B, T, _, D = qkv.shape
    y, lse = _results(B, T, heads, D, qkv.dtype, out)
    lengths, seed = _lengths(kv_lengths), _seed(seed, dropout_p)
    strides, q = qkv.stride(), qkv.data_ptr()
    head = strides[2] * qkv.element_size()
    _C.attention_fwd(
        q, strides, q + heads * head, strides, q + (heads + kv_heads) * head, strides, CODES[qkv.dtype],
        address(lengths), address(seed), y.data_ptr(), lse.data_ptr(),
        causal, D**-0.5 if scale is None else scale, dropout_p, (B, T, T, heads, kv_heads, D),
    )  # fmt: skip
    return y, lse


def attention_qkv_bwd(
    dy: Tensor, qkv: Tensor, kv_lengths: Tensor | None, seed: Tensor | None, y: Tensor, lse: Tensor, heads: int, kv_heads: int,
    causal: bool, scale: float | None, dropout_p: float, *,
    needs: tuple[bool, ...] = (True, False, False), out: Buffers | None = None,
) -> Buffers:  # fmt: skip
    """Backward of ops.attention_qkv: (dqkv, None, None), packed as qkv is. `out`: a buffer for dqkv, D contiguous."""
    qkv, dy, y = _last_contiguous(qkv), _last_contiguous(dy), _last_contiguous(y)
    B, T, _, D = qkv.shape
    lse = saved_lse("cpp", dy, y, lse, (B, T, heads, D), qkv.dtype)
    if out is None or out[0] is None:
        dqkv = torch.empty(qkv.shape, dtype=qkv.dtype)
    else:
        _gradient(dqkv := out[0], qkv)
    lengths, seed = _lengths(kv_lengths), _seed(seed, dropout_p)
    strides, q, grad_strides, dq = qkv.stride(), qkv.data_ptr(), dqkv.stride(), dqkv.data_ptr()
    head, grad_head = strides[2] * qkv.element_size(), grad_strides[2] * qkv.element_size()
    _C.attention_bwd(
        dy.data_ptr(), dy.stride(), q, strides, q + heads * head, strides, q + (heads + kv_heads) * head, strides,
        CODES[qkv.dtype], address(lengths), address(seed), y.data_ptr(), y.stride(), lse.data_ptr(),
        dq, grad_strides, dq + heads * grad_head, grad_strides, dq + (heads + kv_heads) * grad_head, grad_strides,
        causal, D**-0.5 if scale is None else scale, dropout_p, (B, T, T, heads, kv_heads, D),
    )  # fmt: skip
    return dqkv, None, None


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _results(
    B: int, T: int, H: int, D: int, dtype: torch.dtype, out: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    if out is None:
        return torch.empty((B, T, H, D), dtype=dtype), torch.empty((B, H, T), dtype=torch.float32)
    y, lse = out
    return outputs.fits("attention", y, (B, T, H, D), dtype, CPU), outputs.statistic("attention", (B, H, T), CPU, lse)


def _lengths(kv_lengths: Tensor | None) -> Tensor | None:
    return None if kv_lengths is None else kv_lengths.to("cpu", torch.int64).contiguous()


def _seed(seed: Tensor | None, dropout_p: float) -> Tensor | None:
    return None if seed is None or not dropout_p else seed.cpu()


def _gradient(buffer: Tensor | None, like: Tensor) -> Tensor | None:
    if buffer is not None and (
        buffer.shape != like.shape or buffer.dtype != like.dtype or buffer.device.type != "cpu"
        or (buffer.stride(3) != 1 and buffer.shape[3] > 1)
    ):  # fmt: skip
        raise ValueError(
            f"attention on cpp: a buffer for a gradient must be {tuple(like.shape)} {like.dtype} with D contiguous, on the CPU; "
            f"got {tuple(buffer.shape)} {buffer.dtype} on {buffer.device}, strides {buffer.stride()}"
        )
    return buffer


for _name, _fwd, _bwd in (
    ("attention", attention_fwd, attention_bwd),
    ("attention_qkv", attention_qkv_fwd, attention_qkv_bwd),
):
    register(Impl(_name, "cpp", fwd=_fwd, bwd=_bwd, devices=("cpu",), dtypes=FLOATS, dims={"D": (1, MAX_D)}))
