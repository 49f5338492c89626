"""Build the extension with AddressSanitizer and UndefinedBehaviorSanitizer, and run tests on it.

    python tests/native/sanitized.py                    tests/native and the parity tests of backend cpp
    python tests/native/sanitized.py -k layer_norm      the same with pytest's own options
    python tests/native/sanitized.py --python FILE      a script of yours instead of pytest

Nothing installed is touched: the build lies in build/sanitized (kept, so that the next one is short), next to a copy of
tinygpt_kernels that finds it. Needs GCC on Linux.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build/sanitized"
SELFTEST = FOLDER / "objects/selftest"  # selftest.cpp, with the same kernels
PYTEST = (
    "-m",
    "pytest",
    "-q",
    "-p",
    "no:cacheprovider",
    "tests/native",
    "tests/kernels/test_parity.py",
    "-k",
    "native or cpp",
)


def missing() -> str | None:
    """Why it cannot be done here; None when it can."""
    if sys.platform != "linux":
        return "the sanitizers are preloaded into Python, which this does on Linux only"
    if not shutil.which("g++"):
        return "needs g++ and its libasan"
    if not Path(_library("libasan.so")).is_absolute():
        return "g++ has no libasan; install it (Debian: libgcc-NN-dev, Fedora: libasan)"
    return None


def build() -> dict[str, str]:
    """Build; returns the environment in which Python loads the result."""
    import pybind11

    package = FOLDER / "package/tinygpt_kernels"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(
        ROOT / "kernels/tinygpt_kernels", package, ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    )
    configure = [
        "cmake", "--fresh", "-G", "Ninja", "-S", str(ROOT / "csrc"), "-B", str(FOLDER / "objects"),
        f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DTINYGPT_OUTPUT_DIRECTORY={package}",
        "-DTINYGPT_SANITIZE=address,undefined",
        "-DTINYGPT_SELFTEST=ON",
        "-DTINYGPT_CUDA=OFF",
        f"-DTINYGPT_AVX512={'ON' if 'avx512dq' in Path('/proc/cpuinfo').read_text() else 'OFF'}",  # what cannot run here
        "-DCMAKE_CXX_COMPILER=g++",
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",  # Release would strip the names that a report needs
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", str(FOLDER / "objects")]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert (package / name).exists(), f"the build left no {name}"
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(package.parent), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        # libstdc++ too: what AddressSanitizer wants of it must be there when it starts, and Python does not link it
        "LD_PRELOAD": f"{_library('libasan.so')} {_library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:strict_init_order=1",  # Python keeps to the end what it allocates once
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _library(name: str) -> str:
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def main() -> int:
    """Build, then run pytest, or a script, on what was built."""
    if why := missing():
        print(f"sanitized: {why}", file=sys.stderr)
        return 2
    environment = build()
    if sys.argv[1:2] == ["--python"]:
        command = [sys.executable, *sys.argv[2:]]
    else:
        command = [sys.executable, *PYTEST, *sys.argv[1:]]
    return subprocess.run(command, env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
