"""Backend `triton`: one file per kernel; importing this registers them.

Compiled for sm_80, sm_90, sm_100 and gfx942 and executed in Triton's interpreter by the tests; not yet timed on a GPU.
"""

from ..dispatch import register_backend
from ..interpreter import interpreting, unavailable

if interpreting():
    from . import bf16, remembering

    bf16.patch()
    remembering.patch()

from . import attention, cross_entropy, decode, embedding, gelu, layer_norm, optimizer  # noqa: F401

register_backend("triton", unavailable)
