"""decode_attention on CUDA: csrc/cuda/decode_attention.cu.

# B batch, S room in the cache, H query heads, K key/value heads, D head dim
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import Impl, register
from ..common import CODES, FLOATS
from . import common
from .common import MIN_SM, outputs


def decode_attention_fwd(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None, *, out: tuple[Tensor] | None = None
) -> tuple[Tensor]:  # fmt: skip
    """ops.decode_attention.

    Args:
        q: [B, H, D]; k_cache, v_cache: [B, S, K, D], copied where D is not contiguous; slower where rows of q, k or v begin at no
            multiple of 16 bytes.
        lengths: [B] integers.
        out: (y [B, H, D],) to write into, contiguous, in q's dtype.

    Returns:
        (y,).
    """
    q, k, v = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (q, k_cache, v_cache))
    (B, H, D), (S, K) = q.shape, k.shape[1:3]
    y = outputs.result("decode_attention", q, out and out[0])
    splits = common.module.cuda_decode_attention_splits(B, S, H, K, D, CODES[q.dtype])
    workspace = None if splits == 1 else common.fresh(B * H * splits * (D + 2), dtype=torch.float32, device=q.device)
    with common.on_device(q):
        common.module.cuda_decode_attention_fwd(
            common.read(q), (q.stride(0), 0, q.stride(1)), common.read(k), k.stride(), common.read(v), v.stride(), CODES[q.dtype],
            common.read(lengths.to(q.device, torch.int64).contiguous()), common.written(y), D**-0.5 if scale is None else scale,
            (B, 1, S, H, K, D), common.written(workspace), common.stream(q),
        )  # fmt: skip
    return (y,)


register(
    Impl(
        "decode_attention", "cuda", fwd=decode_attention_fwd, devices=("cuda",), dtypes=FLOATS, dims={"D": (1, 128)},
        min_sm=MIN_SM,
    )
)  # fmt: skip
