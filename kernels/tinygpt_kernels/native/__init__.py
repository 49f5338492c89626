"""Backends `cpp` and `cuda`: the compiled module, and every check on what is handed to it; one file per family of kernels.

The module sees raw pointers. What goes wrong in here with a wrong number is a wrong write, so these files make every tensor
what the kernels expect (device, dtype, strides) before they pass an address.
"""

from ..dispatch import register_backend
from . import attention, cross_entropy, cuda, embedding, gelu, layer_norm, optimizer  # noqa: F401
from .common import VARIABLE, isa, isas, missing
from .products import CppProducts

__all__ = ["VARIABLE", "isa", "isas"]

register_backend("cpp", lambda device_type: f"its extension {missing}" if missing else None, CppProducts())
