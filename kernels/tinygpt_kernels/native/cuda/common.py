"""What every launcher needs: the module with the kernels, addresses, fresh memory, the stream.

Everything a kernel is given passes through `module`, `read`, `written`, `updated`, `fresh` and `stream`, looked up here at each
call: where the kernels are simulated on a CPU, these are what is replaced (tests/cuda).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...interpreter import gpu_present
from ..common import Outputs, missing

if not missing:
    from ... import _C

MIN_SM = 80  # cp.async, and matrix products of bfloat16
BUILD = "install NVIDIA's CUDA toolkit (nvcc 12 or later; from PyPI: nvidia-cuda-nvcc, at your toolkit's version)"

module: Any = None if missing else _C


def built_for() -> str | None:
    """The architectures that the CUDA kernels of this build are for; None where it was built without."""
    found: str | None = None if missing else getattr(_C, "cuda_architectures", None)
    return found


@cache
def unavailable(device_type: str) -> str | None:
    """Why the CUDA kernels can run nowhere here; None when they can."""
    if missing:
        return f"its extension {missing}"
    if built_for() is None:
        return f"was built without nvcc: {BUILD}, then run `pip install -e .` again"
    if not gpu_present():
        return "needs an NVIDIA GPU, and there is none here; cpp and torch serve on a CPU"
    if torch.version.cuda is None:
        return f"needs a PyTorch that is built for CUDA; this one is for {'AMD GPUs' if torch.version.hip else 'CPUs'}"
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU that PyTorch can use; it finds none here, though there is a driver"
    why: str = _C.cuda_probe()
    if why:
        built = (
            (built_for() or "").replace("-real", "").replace(",", ", sm_")
        )  # "80-real,90": sm_90's code is there as PTX too
        return (
            f"is built for sm_{built}, which does not run here: {why}; build it anew on this "
            "machine (`pip install -e .`), or name the GPU's architecture with TINYGPT_CUDA_ARCHITECTURES"
        )
    return None


def read(x: Tensor | None) -> int:
    """The address of a tensor that a kernel reads; 0 stands for an absent one."""
    return 0 if x is None else x.data_ptr()


def written(x: Tensor | None) -> int:
    """The address of a tensor that a kernel writes, and may read again."""
    return 0 if x is None else x.data_ptr()


def updated(x: Tensor) -> int:
    """The address of a tensor that a kernel reads and then writes."""
    return x.data_ptr()


def fresh(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that nobody has written."""
    return torch.empty(shape, dtype=dtype, device=device)


outputs = Outputs(
    "cuda",
    lambda x: fresh(*x.shape, dtype=x.dtype, device=x.device),
    lambda shape, device: fresh(*shape, dtype=torch.float32, device=device),
)


def stream(x: Tensor) -> int:
    """PyTorch's current stream on the device of `x`."""
    return torch.cuda.current_stream(x.device).cuda_stream


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the device of `x` the current one, as a launch needs it."""
    if x.device.index is None or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
