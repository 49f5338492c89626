"""Every op of backend `cpp`, at every instruction set this machine has: right, and the same bits for any number of threads.

Nothing here names an op: what `cpp` registers and has cases for is tested.
"""

import contextlib
import os
import subprocess
import sys

import pytest
import torch

from tinygpt_kernels import _C, dispatch, native, parity
from tinygpt_kernels.cases import CASES
from tinygpt_kernels.dispatch import all_ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
THREADS = (1, 2, 3, 3)
dispatch.load_backend("cpp")


def served(dtypes):
    for case in CASES:
        for dtype in dtypes:
            if dispatch.reason("cpp", parity.call_of(all_ops()[case.op], case, dtype), anywhere=True) is None:
                for level in _C.supported_isas():
                    yield pytest.param(case, dtype, level, id=f"{case.op}-{case.name}-{str(dtype)[6:]}-{level}")


@pytest.fixture
def threads():
    """Set the number of threads for one test, every case being worth sharing among them."""
    before, grain = torch.get_num_threads(), _C.set_grain(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)
    _C.set_grain(grain)


@contextlib.contextmanager
def serving(level):
    before = _C.isa()
    _C.set_isa(level)
    try:
        yield
    finally:
        _C.set_isa(before)


@contextlib.contextmanager
def poisoned_memory():
    """Fresh tensors hold NaN, so that what a kernel leaves unwritten cannot be what an earlier call wrote there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def everything(case, dtype):
    """Outputs, gradients and what the forward saves, by name, as bits."""
    op = all_ops()[case.op]
    found = parity.results(case, op.on("cpp"), dtype)
    if not op.in_place:
        args, kwargs = case.build(dtype)
        results = dispatch.impls[op.name, "cpp"].fwd(*op.flatten(*args, **kwargs))
        found |= {f"forward {i}": result.double() for i, result in enumerate(results)}
    return {name: value.contiguous().view(torch.int64) for name, value in found.items()}


@pytest.mark.parametrize(("case", "dtype", "level"), list(served(DTYPES)))
def test_every_level_passes_every_case(case, dtype, level):
    with serving(level), poisoned_memory():
        parity.check(case, "cpp", dtype)


@pytest.mark.parametrize(("case", "dtype", "level"), list(served((torch.float32, torch.bfloat16))))
def test_the_bits_are_the_same_for_any_number_of_threads_and_twice(case, dtype, level, threads):
    with serving(level), poisoned_memory():
        found = []
        for number in THREADS:
            threads(number)
            found.append(everything(case, dtype))
    for number, other in zip(THREADS[1:], found[1:], strict=True):
        for name, bits in found[0].items():
            assert torch.equal(bits, other[name]), f"{name} differs between 1 and {number} threads"


def test_what_is_tested_is_all_that_cpp_serves():
    ours = {op for op, backend in dispatch.impls if backend == "cpp"}
    assert ours == {p.values[0].op for p in served((torch.float32,))}
    assert "layer_norm" in ours
    assert _C.supported_isas()[0] == ("neon" if os.uname().machine in ("aarch64", "arm64") else "baseline")


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    ).stdout


@pytest.mark.parametrize("level", _C.supported_isas())
def test_the_environment_forces_a_level(level):
    code = "from tinygpt_kernels import native; print(native.isa(), native.isas())"
    assert python(code, TINYGPT_ISA=level).strip() == f"{level} {_C.supported_isas()}"


def test_without_a_wish_the_best_level_serves():
    code = "from tinygpt_kernels import native; print(native.isa())"
    assert python(code, TINYGPT_ISA="").strip() == _C.supported_isas()[-1]


def test_a_level_that_is_not_there_is_the_backends_reason_and_nothing_else_serves():
    code = (
        "import torch; from tinygpt_kernels import native, ops\n"
        "try: ops.layer_norm.on('cpp')(torch.ones(2, 4), torch.ones(4))\n"
        "except Exception as error: print(native.isa(), native.isas(), type(error).__name__, error)"
    )
    told = python(code, TINYGPT_ISA="avx1024")
    assert told.startswith("None [] BackendError layer_norm: backend 'cpp' cannot serve this call")
    assert f"TINYGPT_ISA='avx1024', but this build and this CPU have {', '.join(_C.supported_isas())}: name one" in told


def test_a_level_of_another_kind_of_cpu_is_refused_too(monkeypatch):
    for level in {"baseline", "avx2", "avx512", "neon"} - set(_C.supported_isas()):
        monkeypatch.setenv(native.VARIABLE, level)
        assert f"{level!r}, but this build and this CPU have" in native.common._forced()
        assert _C.isa() in _C.supported_isas()
