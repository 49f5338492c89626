"""Backend `cuda`: the CUDA C++ kernels of csrc/cuda, which the module holds where it was built with nvcc."""

from ...dispatch import register_backend
from . import attention, cross_entropy, decode_attention, embedding, gelu, layer_norm, optimizer  # noqa: F401
from .common import unavailable

register_backend("cuda", unavailable)
