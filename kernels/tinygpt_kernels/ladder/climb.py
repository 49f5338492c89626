"""Runs rungs: whether one is right and what is wrong with it, what it asks of the memory, how long a GPU takes."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import parity, timing
from ..cases import Case
from . import build
from .build import LadderError
from .rungs import Rung

_MODES = {"fast": 0, "seeded": 1, "check": 2, "count": 3}
_DOES = {"fast": "run in order", "seeded": "run in a random order", "check": "every access checked"}
_D, _EPS = 64, 1e-5
# Around the sizes of tiles and vectors.
_TRIED = {
    "attention": ((1, 1), (2, 17), (1, 32), (1, 63), (3, 64), (1, 65), (1, 130), (1, 200)),
    "layer_norm": ((1, 8), (3, 64), (65, 256), (5, 264), (2, 1024), (2, 1032), (3, 2056)),
}
COUNTED = {"attention": (1, 256), "layer_norm": (64, 768)}  # heads, T; rows, cols
TIMED = {"attention": (96, 1024), "layer_norm": (16384, 768)}


def _fields(pointers: str, **numbers: Any) -> list[tuple[str, Any]]:
    return [*((name, ctypes.c_void_p) for name in pointers.split()), *numbers.items()]


class _Attention(ctypes.Structure):
    _fields_ = _fields("q k v y scores", heads=ctypes.c_int, T=ctypes.c_int)


class _LayerNorm(ctypes.Structure):
    _fields_ = _fields("x weight bias y", rows=ctypes.c_int, cols=ctypes.c_int, eps=ctypes.c_float)


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a rung: one line for each thing, empty when it is right; and how many runs that took."""

    wrong: tuple[str, ...]
    runs: int


@dataclass(frozen=True)
class Costs:
    """What a rung asks for at COUNTED's sizes, by every warp together.

    requests: of global memory, one for each instruction of a warp. asked: bytes that its threads ask for; moved: bytes of the
    32-byte sectors that they touch (caches may have some of them). shared: bytes asked of shared memory; turns: cycles its banks
    need; conflicts: those of them that another layout would save. barriers, shuffles, products (mma): how many. waited: bytes of
    global memory that nothing is computed for while they come. wide: share of the bytes asked for that move 16 at a time.
    """

    requests: int
    asked: int
    moved: int
    shared: int
    turns: int
    conflicts: int
    barriers: int
    shuffles: int
    products: int
    waited: int
    wide: float


def judge(rung: Rung) -> Verdict:
    """Hold a rung to the truth at many sizes, and look for races and stray accesses.

    Raises:
        LadderError: it does not compile.
    """
    library = build.simulated([rung.path])[0]
    wrong: list[str] = []
    runs = 0
    for sizes in _TRIED[rung.op]:
        # The checker first: it names the line that wrong numbers come from.
        for mode, seed in (("check", 2), ("fast", 0), ("seeded", 1)):
            runs += 1
            if found := _one(rung, library, sizes, mode, seed):
                wrong.append(f"{_named(rung.op, sizes)}, {_DOES[mode]}: {found}")
                break  # the other modes would say the same again
    return Verdict(tuple(dict.fromkeys(wrong)), runs)


def _named(op: str, sizes: tuple[int, int]) -> str:
    return f"{sizes[0]} heads, T {sizes[1]}" if op == "attention" else f"{sizes[0]} rows of {sizes[1]}"


def _one(rung: Rung, library: ctypes.CDLL, sizes: tuple[int, int], mode: str, seed: int) -> str | None:
    case = _case(rung.op, sizes)
    try:
        errors = parity.errors_of(case, _function(rung.op, library, mode, seed), torch.bfloat16)
    except LadderError as error:
        return str(error)
    return "; ".join(f"wrong numbers, {error}" for error in errors if not error.ok) or None


def costs(found: Sequence[Rung]) -> list[Costs]:
    """Count what each rung asks for; all are compiled before the first is counted.

    Raises:
        LadderError: one does not compile, or does not run.
    """
    libraries = build.simulated([rung.path for rung in found])
    return [_counted(rung, library) for rung, library in zip(found, libraries, strict=True)]


def _counted(rung: Rung, library: ctypes.CDLL) -> Costs:
    simulation = build.simulation()
    simulation.simt_forget_counts()
    args, kwargs = _case(rung.op, COUNTED[rung.op]).build(torch.bfloat16)
    _function(rung.op, library, "count", 0)(*args, **kwargs)
    counted: dict[str, Any] = json.loads(simulation.simt_counts())
    kernels = list(counted.values())

    def total(*names: str, what: str | None = None) -> int:
        return sum(kernel[name][what] if what else kernel[name] for kernel in kernels for name in names)

    worldwide, local = ("global read", "global write"), ("shared read", "shared write")
    asked = total(*worldwide, what="bytes")
    widest = sum(kernel[name]["by_width"].get("16", 0) for kernel in kernels for name in worldwide)
    turns = total(*local, what="turns")
    return Costs(
        total(*worldwide, what="requests"), asked, 32 * total(*worldwide, what="sectors"), total(*local, what="bytes"),
        turns, turns - total(*local, what="needed"), total("barriers"), total("shuffles"), total("products"), total("waited"),
        widest / max(asked, 1),
    )  # fmt: skip


def seconds(found: Sequence[Rung]) -> list[float]:
    """Seconds of each rung on the GPU that is here, at TIMED's sizes: medians of interleaved rounds.

    Raises:
        LadderError: no GPU, no nvcc, or a rung that fails.
    """
    if not torch.cuda.is_available():
        raise LadderError("--time needs an NVIDIA GPU that PyTorch can use; there is none here")
    runs: dict[str, timing.Run] = {}
    for rung in found:
        call, argument, _, kept = _prepared(rung.op, build.for_gpu(rung.path), *_inputs(rung.op, "cuda"))

        # `kept` are the tensors whose addresses stand in the argument.
        def run(call: Callable[..., bytes | None] = call, argument: Any = argument, kept: object = kept) -> None:
            if message := call(ctypes.byref(argument), torch.cuda.current_stream().cuda_stream):
                raise LadderError(message.decode())

        run()
        runs[str(rung.path)] = timing.captured(run)
    times = timing.interleaved(runs, rounds=10, seconds=0.02, device="cuda")
    return [timing.median(times[str(rung.path)]) / timing.REPLAYED for rung in found]


def _inputs(op: str, device: str) -> list[Tensor]:
    first, second = TIMED[op]
    shapes: list[tuple[int, ...]] = [(first, second, _D)] * 3
    if op == "layer_norm":
        shapes = [(first, second), (second,), (second,)]
    return [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes]


def _case(op: str, sizes: tuple[int, int]) -> Case:
    first, second = sizes

    def attention(draw: Any) -> Any:
        return tuple(draw.normal(1, second, first, _D) for _ in range(3)), {"causal": True}

    def layer_norm(draw: Any) -> Any:
        return (draw.normal(first, second), draw.normal(second) + 1, draw.normal(second), _EPS), {}

    return Case(op, f"ladder {first}x{second}", attention if op == "attention" else layer_norm, differentiable=False)


def _function(op: str, library: ctypes.CDLL, mode: str, seed: int) -> Callable[..., Tensor]:
    """The rung on the simulated GPU, with the op's signature."""

    def attention(q: Tensor, k: Tensor, v: Tensor, **_options: Any) -> Tensor:
        y = run(*(x[0].transpose(0, 1).contiguous() for x in (q, k, v)))  # [heads, T, D]
        return y.transpose(0, 1)[None]

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = _EPS) -> Tensor:
        return run(x, weight, bias)

    def run(*inputs: Tensor) -> Tensor:
        call, argument, results, kept = _prepared(op, library, *inputs)
        simulation = build.simulation()
        simulation.simt_watch_nothing()
        for name, tensor, written in kept:
            simulation.simt_watch(
                tensor.data_ptr(), tensor.numel(), tensor.element_size(), written, not written, name.encode()
            )
        simulation.simt_mode(_MODES[mode], seed)
        if message := call(ctypes.byref(argument), None):
            raise LadderError(message.decode())
        return results

    return attention if op == "attention" else layer_norm


def _prepared(
    op: str, library: ctypes.CDLL, *inputs: Tensor
) -> tuple[Any, Any, Tensor, list[tuple[str, Tensor, bool]]]:
    """(the function, its argument, the tensor it fills, every tensor with its name and whether it is written)."""
    call = library.tinygpt_rung
    call.restype, call.argtypes = ctypes.c_char_p, (ctypes.c_void_p, ctypes.c_void_p)
    y = torch.full_like(inputs[0], torch.nan)
    tensors = [
        *zip(("q", "k", "v") if op == "attention" else ("x", "weight", "bias"), inputs, [False] * 3, strict=True)
    ]
    tensors.append(("y", y, True))
    argument: ctypes.Structure
    if op == "attention":
        heads, T, _ = inputs[0].shape
        tensors.append(("scores", torch.full((heads, T, T), torch.nan, device=y.device), True))
        argument = _Attention(*(tensor.data_ptr() for _, tensor, _ in tensors), heads, T)
    else:
        argument = _LayerNorm(*(tensor.data_ptr() for _, tensor, _ in tensors), *inputs[0].shape, _EPS)
    return call, argument, y, tensors
