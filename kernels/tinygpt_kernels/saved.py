"""This machine's own preferences: what `tinygpt bench --save` measured, and `auto` follows before the shipped rules.

One JSON file of the user's cache, by what a measurement holds for: processor, instruction set, threads, torch, kernels. Another
machine, another number of threads, a rebuilt extension finds nothing there and takes the shipped rules again. It is read
once, when `auto` first has to choose.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from .spec import known_backends
from .userdir import cache_directory

if TYPE_CHECKING:
    from .dispatch import Call

_NEAR = 2.0  # a measurement speaks of sizes up to so many times larger or smaller, each by itself


@dataclass(frozen=True)
class Entry:
    """Who was faster than `torch` in one kind of call, fastest first; nobody, where `order` is empty.

    grad: forward and backward were measured, else the forward. ratio: of the fastest to `torch`, 1 where that is torch.
    """

    op: str
    dtype: str
    features: tuple[str, ...]
    grad: bool
    dims: tuple[tuple[str, int], ...]
    order: tuple[str, ...]
    ratio: float

    @property
    def kind(self) -> tuple[Any, ...]:
        """All but the sizes and the finding."""
        return self.op, self.dtype, self.features, self.grad


def path() -> Path:
    """The file that holds what was measured."""
    return cache_directory() / "preferences.json"


def entry(call: Call, order: tuple[str, ...], ratio: float) -> Entry:
    """The finding about one kind of call."""
    return Entry(call.op, _short(call.dtype), call.features, call.grad, call.dims, order, ratio)


def load() -> dict[str, list[Entry]]:
    """All measurements by identity. Empty where the file is absent or not ours; what is not an entry in it is left out."""
    try:
        found = json.loads(path().read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {identity: _entries(items) for identity, items in found.items() if isinstance(items, list)}


def save(device: str, entries: Iterable[Entry]) -> None:
    """Keep entries for this machine, beside all others; one of the same kind and sizes is replaced."""
    everything = load()
    mine = identity(device)
    merged = {(e.kind, e.dims): e for e in (*everything.get(mine, ()), *entries)}
    everything[mine] = list(merged.values())
    path().parent.mkdir(parents=True, exist_ok=True)
    temporary = path().with_name(f".{path().name}.{secrets.token_hex(4)}")
    temporary.write_text(json.dumps({key: [asdict(e) for e in found] for key, found in everything.items()}, indent=1))
    os.replace(temporary, path())
    forget()


def clear() -> bool:
    """Delete all measurements; False where there were none."""
    there = path().exists()
    path().unlink(missing_ok=True)
    forget()
    return there


def forget() -> None:
    """Read the file again at the next choice."""
    _here.cache_clear()


def here(device: str) -> tuple[Entry, ...]:
    """What was measured on this device as it is now."""
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        return ()
    return _here(device, torch.get_num_threads())


def nearest(call: Call) -> Entry | None:
    """The measurement that speaks of `call`: the same kind, every size within a factor of two, the nearest of those."""
    found = here(call.device)
    if not found:
        return None
    kind, sizes = (call.op, _short(call.dtype), call.features, call.grad), dict(call.dims)
    near = [(distance, e) for e in found if e.kind == kind and (distance := _distance(dict(e.dims), sizes)) is not None]
    return min(near, key=lambda pair: pair[0])[1] if near else None


def identity(device: str) -> str:
    """What measurements on this device hold for: machine, threads, torch, kernels."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, kernels {_hash(device)}"
    extension = _extension()
    isa = f"{torch.backends.cpu.get_cpu_capability()}{f'/{extension.isa()}' if extension else ''}"
    threads = torch.get_num_threads()
    return f"{processor()} ({isa}), {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}, kernels {_hash(device)}"


def processor() -> str:
    """The CPU's own name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@lru_cache
def _here(device: str, threads: int) -> tuple[Entry, ...]:
    found = load()
    return tuple(found.get(identity(device), ())) if found else ()


def _hash(device: str) -> str:
    """Of the compiled module; on a GPU of the Triton kernels' source too."""
    digest = hashlib.sha256()
    extension = _extension()
    if extension and extension.__file__:
        digest.update(Path(extension.__file__).read_bytes())
    if device.startswith("cuda"):
        for file in sorted((Path(__file__).parent / "triton_ops").glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _extension() -> ModuleType | None:
    try:
        from . import _C
    except ImportError:
        return None
    module: ModuleType = _C
    return module


def _entries(items: list[Any]) -> list[Entry]:
    found = []
    for item in items:
        try:
            dims = tuple((str(name), int(size)) for name, size in item["dims"])
            order = tuple(name for name in item["order"] if name in known_backends() and name != "reference")
            if not (isinstance(item["grad"], bool) and all(size >= 0 for _, size in dims)):
                continue
            found.append(Entry(str(item["op"]), str(item["dtype"]), tuple(map(str, item["features"])), item["grad"], dims, order,
                               float(item["ratio"])))  # fmt: skip
        except (KeyError, TypeError, ValueError):
            continue
    return found


def _distance(measured: dict[str, int], asked: dict[str, int]) -> float | None:
    """How far sizes are apart, in doublings altogether; None when one is too far."""
    if measured.keys() != asked.keys():
        return None
    total = 0.0
    for name, size in asked.items():
        if size != measured[name]:
            if not size or not measured[name]:
                return None
            doublings = abs(math.log2(size / measured[name]))
            if doublings > math.log2(_NEAR):
                return None
            total += doublings
    return total


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
