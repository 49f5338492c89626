"""The machine a run is on: device, precision, versions, and how fast it multiplies matrices."""

from __future__ import annotations

import os
import platform
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from tinygpt_kernels.saved import processor

from .. import __version__
from ..errors import UserError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str | None) -> torch.device:
    """The device of that name; None means a GPU if there is one, else the CPU.

    Raises:
        UserError: no such device here; says what is.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}; use cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            here = f"{count} GPU{'s' if count > 1 else ''}" if count else "no usable NVIDIA or AMD GPU"
            raise UserError(
                f"--device {name}: there is {here} here; use --device cpu, or install a driver and a torch build for it"
            )
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("--device mps: this machine has no Apple GPU that torch can use; use --device cpu")
    elif device.type != "cpu":
        raise UserError(f"--device {name} is not supported; use cpu, cuda or mps")
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: `auto` is bfloat16 on a GPU that has it, float16 on one that has not, float32 on a CPU."""
    if name != "auto":
        return _DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision for one forward, or nothing in float32."""
    return nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision)


def seed_generators(device: torch.device, seed: int) -> None:
    """Seed PyTorch's generators of the CPU and of this device.

    torch.manual_seed would seed every kind of device, and write down a stack trace for each that has not been used: 0.5 ms.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        module = torch.get_device_module(device)
        getattr(module, "manual_seed_all", module.manual_seed)(seed)


def describe(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, for the run's record."""
    return {
        "tinygpt": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a TorchVersion would not load with weights_only
        "triton": _version("triton"),
        "platform": platform.platform(),
        "processor": processor(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
