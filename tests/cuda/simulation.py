"""The CUDA kernels on this machine's CPU: builds the module that simulates them, and lets the launchers run on it.

python tests/cuda/simulation.py        builds build/simt and prints where the module lies
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from tinygpt_kernels import autograd, dispatch
from tinygpt_kernels.dispatch import all_ops
from tinygpt_kernels.native.cuda import common

ROOT = Path(__file__).parents[2]
FLAGS = os.environ.get("TINYGPT_SIMT_FLAGS", "")  # for the compiler, of another build than the usual one
FOLDER = ROOT / "build" / ("simt" + "".join(c if c.isalnum() else "-" for c in FLAGS))
# What a kernel waits with or counts on; each is a place that can be switched off.
WAITS = re.compile(r"(__syncthreads|__syncwarp|cp_async_wait<[^>]*>|atomicAdd)\s*\(")


def build():
    """Build the module, and import it. Kept in build/simt: the next time, only what changed is compiled."""
    import pybind11

    configure = [
        "cmake", "-G", "Ninja", "-S", str(ROOT / "csrc"), "-B", str(FOLDER),
        f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DTINYGPT_OUTPUT_DIRECTORY={FOLDER}",
        "-DTINYGPT_MODULE=OFF", "-DTINYGPT_SIMT=ON", "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_CXX_FLAGS={FLAGS}",
    ]  # fmt: skip
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:  # several processes may test at once (pytest -n)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (
            FOLDER / "build.ninja"
        ).exists():  # asked under the lock: it would delete what another process has just built
            configure.insert(1, "--fresh")
        for command in (configure, ["cmake", "--build", str(FOLDER), "--target", "_simt"]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    path = FOLDER / f"_simt{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("_simt", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def waits():
    """Every barrier, wait and atomic of the kernels, as `file.cu:line`: read from the source, so that none can be forgotten."""
    for path in sorted((ROOT / "csrc/cuda").glob("*.cu*")):
        if path.name != "simt.cuh":
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if WAITS.search(line.partition("//")[0]):
                    yield f"{path.name}:{number}"


class Simulation:
    """Stands in for the compiled module and for the GPU's memory: every launch is told what it may read and write.

    Attributes:
        short: which tensor lacks its last element: (the launch's place in `taken`, the tensor's among its arguments).
        unwritten: which tensor counts as never written.
        launches: names of the functions that were called.
        taken: for each launch, which of its tensors are read (of those that hold anything).
    """

    def __init__(self, simt):
        self._simt = simt
        self._views = []
        self.short = self.unwritten = None
        self.launches, self.taken = [], []

    def read(self, x):
        return self._given(x, True, False)

    def written(self, x):
        return self._given(x, False, True)

    def updated(self, x):
        return self._given(x, True, True)

    def _given(self, x, reads, writes):
        if x is not None:
            self._views.append((x.detach(), reads, writes))
        return 0 if x is None else x.data_ptr()

    def fresh(self, *shape, dtype, device):
        return torch.full(shape, torch.nan if dtype.is_floating_point else -1, dtype=dtype, device=device)

    def __getattr__(self, name):
        function = getattr(self._simt, name)
        if "stream: " not in (function.__doc__ or ""):  # its arguments, as pybind11 lists them: it launches nothing
            return function

        def launch(*args):
            self._simt.watch_nothing()
            views, self._views = self._views, []
            short, unwritten = (where[1] if where and where[0] == len(self.taken) else None
                                for where in (self.short, self.unwritten))  # fmt: skip
            views = [view for view in views if view[0].numel()]
            self.taken.append([reads for _, reads, _ in views])
            for i, (x, reads, writes) in enumerate(views):
                flat = [list(x.shape), list(x.stride())]
                if i == short:
                    flat = [[x.numel() - 1], [1]] if x.is_contiguous() else flat
                self._simt.watch(x.data_ptr(), *flat, x.element_size(), writes, reads and i != unwritten,
                                 f"tensor {i}")  # fmt: skip
            self.launches.append(name)
            return function(*args)

        return launch


@contextmanager
def simulated(simt, mode, seed=0):
    """Launchers of backend `cuda` take CPU tensors and run in this mode; yields the Simulation."""
    simulation = Simulation(simt)
    names = ("module", "read", "written", "updated", "fresh", "stream", "on_device")
    before = {name: getattr(common, name) for name in names}
    common.module, common.fresh, common.stream = simulation, simulation.fresh, lambda x: 0
    common.read, common.written, common.updated = simulation.read, simulation.written, simulation.updated
    common.on_device = lambda x: nullcontext()
    simt.mode(mode, seed)
    try:
        yield simulation
    finally:
        for name, value in before.items():
            setattr(common, name, value)
        simt.mode("fast")
        simt.switch_off([])


@contextmanager
def serving_the_cpu():
    """Backend `cuda` is there and takes CPU tensors, as a spec names it: for whole models, inside `simulated`."""
    dispatch.load_backend("cuda")
    impls, backend = dict(dispatch.impls), dispatch.backends["cuda"]
    for key, impl in impls.items():
        if impl.backend == "cuda":
            dispatch.impls[key] = replace(impl, devices=("cpu",))
    dispatch.backends["cuda"] = replace(backend, unavailable=lambda device_type: None)
    try:
        yield
    finally:
        dispatch.impls.update(impls)
        dispatch.backends["cuda"] = backend


def run_on(name):
    """The op `name` as the kernels of backend `cuda` serve it, under autograd if differentiable, with the op's own signature."""
    op, impl = all_ops()[name], dispatch.impls[name, "cuda"]
    function = autograd.eager(op, impl, impl.bwd is not None)
    return lambda *args, **kwargs: function(*op.flatten(*args, **kwargs))


if __name__ == "__main__":
    print(build().__file__)
