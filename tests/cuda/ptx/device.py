"""Compiles csrc/cuda to PTX with nvcc, and runs there what the module `_simt` launches."""

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from .machine import Launch, Program, run
from .memory import Global
from .parse import PtxError, kernels

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "build" / "ptx"
WRAPPERS = ROOT / "tests/cuda/wrappers.cu"
FLAGS = ("-std=c++17", "-O3")  # as csrc/CMakeLists.txt has them
ARCHITECTURES = (80, 90)
KEPT = 40  # compiled files in FOLDER


def nvcc():
    """The path of nvcc; None where there is none."""
    return shutil.which(os.environ.get("CUDACXX") or "nvcc")


@cache
def _version():
    return subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout


def sources():
    """Every file with kernels: the ones that are shipped, and those that test simt.cuh."""
    return (*sorted((ROOT / "csrc/cuda").glob("*.cu")), WRAPPERS)


def compiled(source, architecture, csrc=ROOT / "csrc"):
    """What nvcc makes of a source, as text; kept in build/ptx (of another csrc: beside it), by all that it may depend on.

    Raises:
        PtxError: nvcc refuses it.
    """
    folders = (csrc, csrc / "cuda", source.parent)
    read = sorted({p for folder in folders for p in (*folder.glob("*.h"), *folder.glob("*.cuh"))})
    key = hashlib.sha256(f"{_version()} {FLAGS} {architecture} {source.name}".encode())
    for path in (*read, source):
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    folder = FOLDER if csrc == ROOT / "csrc" else csrc.parent
    kept = folder / f"{source.stem}.{architecture}.{key.hexdigest()[:16]}.ptx"
    if kept.exists():
        kept.touch()  # the oldest go first
    else:
        folder.mkdir(parents=True, exist_ok=True)
        new = kept.with_suffix(f".{os.getpid()}")
        command = [nvcc(), *FLAGS, "-ptx", f"-arch=compute_{architecture}", "-I", csrc, source, "-o", new]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise PtxError(f"nvcc: {done.stderr}")
        new.replace(kept)
        for old in sorted(folder.glob("*.ptx"), key=lambda p: p.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)
    return kept.read_text()


def readable(names):
    """Mangled names as C++ has them, those of two-byte types as simt.cuh calls them, large arguments (SIMT_ARGUMENT) by value."""
    found = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    for ours, theirs in (("__half", "simt::half"), ("__nv_bfloat16", "simt::bfloat"), (" const&", "")):
        found = found.replace(ours, theirs)
    return found.splitlines()


def named(text):
    """The kernels of a module of PTX by their readable names."""
    found = kernels(text)
    return dict(zip(readable(found), found.values(), strict=True))


@cache
def library(architecture):
    """All kernels, by their readable names."""
    found = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for text in pool.map(lambda source: compiled(source, architecture), sources()):
            new = named(text)
            assert not (twice := found.keys() & new.keys()), f"more than one file has {twice}"
            found |= new
    # What both architectures have alike is parsed once.
    return {name: _known.setdefault((kernel.name, kernel.body), kernel) for name, kernel in found.items()}


_known = {}


@cache
def _places(file):
    """Offset in a shared object -> readable name of the function there."""
    lines = [
        line.split()
        for line in subprocess.run(["nm", file], capture_output=True, text=True, check=True).stdout.splitlines()
    ]
    symbols = {int(line[0], 16): line[2] for line in lines if len(line) == 3 and line[1] in "tT"}
    return dict(zip(symbols, readable(symbols.values()), strict=True))


@cache
def _program(kernel):
    return Program(kernel)


class Device:
    """The module `_simt`, but for its launches: these run as PTX of one architecture, with the views of `watch` as their memory.

    Attributes:
        launched: the readable names of the kernels, in the order of their launches.
    """

    def __init__(self, simt, kernels, *, only_names=False):
        self._simt, self._kernels, self._only_names = simt, kernels, only_names
        self.launched, self._memory = [], Global()

    def __getattr__(self, name):
        return getattr(self._simt, name)

    def mode(self, name, seed=0):
        pass

    def watch(self, address, sizes, strides, itemsize, writable, initialised, name):
        self._memory.add(address, sizes, strides, itemsize, writable)

    def watch_nothing(self):
        self._memory = Global()

    def launch(self, what, place, grid, block, shared_bytes, arguments):
        name = _places(self._simt.__file__)[place]
        if name not in self._kernels:
            raise PtxError(f"{what}: nvcc made no kernel {name}")
        self.launched.append(name)
        if self._only_names:
            return
        kernel = self._kernels[name]
        try:
            run(Launch(kernel, grid, block, shared_bytes, tuple(arguments)), _program(kernel), self._memory)
        except PtxError as error:
            raise PtxError(f"{what}: {name}: {error}") from None


@contextmanager
def interpreted(simt, kernels, *, only_names=False):
    """A Device whose launches run these kernels (by readable name); with `only_names` they are noted, and nothing runs."""
    device = Device(simt, kernels, only_names=only_names)
    simt.elsewhere(device.launch)
    try:
        yield device
    finally:
        simt.elsewhere(None)
