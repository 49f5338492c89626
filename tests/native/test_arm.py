"""The NEON kernels: cross-compiled, and run by QEMU, since no 64-bit Arm with a PyTorch is at hand."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARIES = Path("/usr/aarch64-linux-gnu")  # where Debian's cross compiler keeps them
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
MISSING = [
    package
    for package, there in (
        ("g++-aarch64-linux-gnu", shutil.which("aarch64-linux-gnu-g++")),
        ("qemu-user", EMULATOR),
        ("cmake", shutil.which("cmake")),
        ("ninja-build", shutil.which("ninja")),
    )
    if not there
]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"apt-get install {' '.join(MISSING)}")
def test_the_neon_kernels_pass_the_selftest(tmp_path):
    configure = [
        "cmake", "-G", "Ninja", "-S", str(ROOT / "csrc"), "-B", str(tmp_path),
        f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'csrc/toolchains/aarch64-linux-gnu.cmake'}",
        "-DTINYGPT_MODULE=OFF", "-DTINYGPT_SELFTEST=ON", "-DCMAKE_BUILD_TYPE=Release",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", str(tmp_path)]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
        assert "warning:" not in done.stdout + done.stderr, done.stdout[-5000:]
    found = subprocess.run(
        [str(EMULATOR), "-L", str(LIBRARIES), str(tmp_path / "selftest")], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr
    assert found.stdout.startswith("neon: ")
    assert int(found.stdout.split()[1]) > 1000
