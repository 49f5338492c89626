"""Builds `tinygpt_kernels._C` with CMake and Ninja; everything else about the package stands in pyproject.toml.

The extension links nothing of torch: kernels see raw pointers, so one build serves every torch version and needs no torch
to build. Without a C++ compiler the package installs all the same, and backend `cpp` says what is missing.

Where nvcc is found, the CUDA kernels are built too, and lie in the same file.

Environment: CXX chooses the compiler and CUDACXX the nvcc; TINYGPT_CUDA=OFF leaves the CUDA kernels out, ON insists on them;
TINYGPT_CUDA_ARCHITECTURES=80;90 says what to build them for, in place of the GPU that is here or else sm_80, 90 and 100;
CMAKE_ARGS is passed to CMake.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_compiler():
    """The C++ compiler's command, or None. One that exists but cannot compile is an error, not an absence."""
    named = os.environ.get("CXX")
    for command in [named] if named else ["c++", "g++", "clang++"]:
        words = shlex.split(command)
        if shutil.which(words[0]) is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("#include <cstdint>\nint main() { return sizeof(std::int64_t) - 8; }\n")
            probe = subprocess.run(
                [*words, str(source), "-o", str(Path(folder, "probe"))], capture_output=True, text=True
            )
        if probe.returncode:
            lines = (probe.stderr or probe.stdout).strip().splitlines() or ["it printed nothing"]
            sys.exit(
                f"tinygpt: the C++ compiler {command!r} cannot compile an empty program: {lines[-1]}\n"
                "tinygpt: mend it, or name another one with CXX=...; `CXX=none pip install -e .` installs without C++ kernels"
            )
        return command
    return None


class CMakeBuild(build_ext):
    """Configure and build csrc with CMake, into the place where setuptools expects the extension."""

    def build_extension(self, ext):
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{self.plat_name}"
        ninja, cmake = shutil.which("ninja"), shutil.which("cmake")
        if not (ninja and cmake):
            sys.exit("tinygpt: building needs cmake and ninja; pip provides both unless --no-build-isolation is given")
        # --fresh: pip builds in an environment that is gone afterwards, and a cache would remember its ninja and pybind11.
        # Object files stay, so a second build still compiles only what changed.
        configure = [
            cmake, "--fresh", "-G", "Ninja", "-S", str(ROOT / "csrc"), "-B", str(folder),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTINYGPT_OUTPUT_DIRECTORY={target.parent}",
            "-DCMAKE_BUILD_TYPE=Release",
            *(f"-D{name}={os.environ[name]}" for name in ("TINYGPT_CUDA", "TINYGPT_CUDA_ARCHITECTURES") if name in os.environ),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(folder)], check=True)


compiler = find_compiler()
if compiler is None:
    print("tinygpt: no C++ compiler found; installing without the C++ kernels (backend `cpp`)", file=sys.stderr)
else:
    os.environ["CXX"] = compiler

setup(
    ext_modules=[Extension("tinygpt_kernels._C", sources=[])] if compiler else [],
    cmdclass={"build_ext": CMakeBuild},
)
