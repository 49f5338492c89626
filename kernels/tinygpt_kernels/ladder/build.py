"""Compiles the simulation and the rungs, once for each version of their sources, into the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

from ..userdir import cache_directory

CUDA = Path(__file__).parents[3] / "csrc" / "cuda"
LADDER = CUDA / "ladder"
_SIMULATION = ("simt_host", "simt_check", "simt_count", "simt_c")


class LadderError(RuntimeError):
    """What a user can mend: no sources, no compiler, a file that does not compile."""


def simulated(paths: Sequence[Path]) -> list[ctypes.CDLL]:
    """The rungs in these files as libraries for the CPU, compiled where they have changed; all at once.

    Raises:
        LadderError: there are no sources or no compiler; or the compiler's own words on a file.
    """
    base = simulation()  # first: the rungs look for its functions
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [ctypes.CDLL(str(path)) for path in pool.map(lambda path: _rung(path, Path(base._name)), paths)]


@lru_cache
def simulation() -> ctypes.CDLL:
    """The simulation's library, with its functions' types."""
    compiler = _compiler()
    target = _target("simulation", compiler, [CUDA / f"{name}.cpp" for name in _SIMULATION])
    if not target.exists():
        with _folder(target) as folder:
            objects = [folder / f"{name}.o" for name in _SIMULATION]
            commands = [
                [*compiler, "-std=c++17", "-O2", "-g1", "-fPIC", "-c", "-o", str(o), str(CUDA / f"{name}.cpp")]
                for name, o in zip(_SIMULATION, objects, strict=True)
            ]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(_run, commands))
            _link([*compiler, "-shared"], [*map(str, objects), "-ldl"], target, folder)
    library = ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)
    library.simt_mode.argtypes = (ctypes.c_int, ctypes.c_uint64)
    address, size, truth, text = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_char_p
    library.simt_watch.argtypes = (address, size, size, truth, truth, text)
    library.simt_counts.restype = ctypes.c_char_p
    return library


def _rung(path: Path, base: Path) -> Path:
    compiler = _compiler()
    target = _target(path.stem, compiler, [path])
    if not target.exists():
        with _folder(target) as folder:
            # Only to compile: linked like that, ThreadSanitizer's own library would come along.
            made = folder / "rung.o"
            reporting = ["-fsanitize=thread", *_instrumentation(compiler)]
            _run([*compiler, "-xc++", "-std=c++17", "-O1", "-g1", "-fPIC", *reporting, "-Wall", "-Wno-unknown-pragmas",
                  f"-I{LADDER}", "-c", "-o", str(made), str(path)])  # fmt: skip
            _link([*compiler, "-shared"], [str(made), str(base)], target, folder)
    return target


def for_gpu(path: Path) -> ctypes.CDLL:
    """A rung as nvcc compiles it for the GPU that is here.

    Raises:
        LadderError: there is no nvcc, or nvcc's own words.
    """
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if nvcc is None:
        raise LadderError("--time needs nvcc on the path, to compile the rungs for the GPU")
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    target = _target(f"{path.stem}-{architecture}", (nvcc,), [path])
    if not target.exists():
        with _folder(target) as folder:
            _link([nvcc, "-shared", "-std=c++17", "-O3", f"-arch={architecture}", "-Xcompiler", "-fPIC", f"-I{LADDER}"],
                  [str(path)], target, folder)  # fmt: skip
    return ctypes.CDLL(str(target))


def _compiler() -> tuple[str, ...]:
    if not CUDA.is_dir():
        raise LadderError(
            "the ladder needs the project's sources (csrc/cuda), which an installed wheel lacks: clone the repository, and there "
            "`pip install -e .`"
        )
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return (found,)
    raise LadderError("the ladder compiles its rungs and needs a C++ compiler (g++ or clang++), or CXX naming one")


@lru_cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


def _instrumentation(compiler: tuple[str, ...]) -> list[str]:
    # What the simulation wants to be told are loads and stores, not calls.
    if "clang" in _version(compiler[0]):
        return ["-mllvm", "-tsan-instrument-func-entry-exit=0"]
    return ["--param=tsan-instrument-func-entry-exit=0"]


def _target(name: str, compiler: tuple[str, ...], sources: Sequence[Path]) -> Path:
    digest = hashlib.sha256(_version(compiler[0]).encode())
    for path in (*sources, *sorted(CUDA.glob("simt*")), *sorted(LADDER.glob("*h"))):
        digest.update(path.read_bytes())
    return cache_directory() / "ladder" / f"{name}-{digest.hexdigest()[:16]}.so"


@contextmanager
def _folder(target: Path) -> Iterator[Path]:
    """Room to build in, beside where the result goes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=target.parent) as folder:
        yield Path(folder)


def _link(command: list[str], inputs: list[str], target: Path, folder: Path) -> None:
    made = folder / target.name
    _run([*command, "-o", str(made), *inputs])
    made.replace(target)  # whoever builds the same at the same time finds a whole file


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LadderError(f"{' '.join(command)}\n{(done.stderr or done.stdout).strip()}")
