"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: no test finds anything, and a fault put in is found."""

import subprocess
import sys

import pytest
import sanitized

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sanitized.missing() is not None, reason=str(sanitized.missing())),
]


@pytest.fixture(scope="module")
def environment():
    """What makes Python load the instrumented build."""
    return sanitized.build()


def run(environment, *command):
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=sanitized.ROOT, capture_output=True, text=True
    )


# Of x or y, which hold 15 numbers, the last is missing: the kernel reads or writes 4 bytes that are not there.
FAULT = """
import torch
from tinygpt_kernels import _C
_C.set_isa({level!r})
matrices = {{name: torch.zeros(15 - (name == {short!r})) for name in ("x", "y")}}
w, m = torch.ones(5), torch.empty(6)
_C.layer_norm_fwd(x_stride=5, dtype=0, weight=w.data_ptr(), weight_dtype=0, bias=0, bias_dtype=0,
                  mean=m.data_ptr() + {shift}, rstd=m.data_ptr() + 12, rows=3, cols=5, eps=1e-5,
                  **{{name: matrix.data_ptr() for name, matrix in matrices.items()}})
print("nothing found")
"""


@pytest.mark.parametrize(
    ("short", "shift", "report"),
    [
        ("y", 0, "AddressSanitizer: heap-buffer-overflow"),
        ("x", 0, "AddressSanitizer: heap-buffer-overflow"),
        ("", 2, "runtime error: store to misaligned address"),
    ],
)
def test_a_fault_at_any_level_is_found(environment, short, shift, report):
    levels = run(environment, "-c", "import torch; from tinygpt_kernels import _C; print(*_C.supported_isas())")
    assert levels.returncode == 0, levels.stderr
    for level in levels.stdout.split():
        found = run(environment, "-c", FAULT.format(level=level, short=short, shift=shift))
        assert found.returncode != 0, f"{level}: {found.stdout}"
        assert report in found.stderr, f"{level}: {found.stderr[-3000:]}"
        assert "layer_norm" in found.stderr
    assert run(environment, "-c", FAULT.format(level=level, short="", shift=0)).stdout == "nothing found\n"


def test_the_selftest_of_every_level_passes(environment):
    found = subprocess.run([str(sanitized.SELFTEST)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]


def test_every_case_at_every_level_passes(environment):
    # In float32 alone: all of tests/native takes too long like this; `python tests/native/sanitized.py` runs it.
    found = run(
        environment,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/native/test_levels.py",
        "-k",
        "every_level and float32",
    )
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-5000:]
