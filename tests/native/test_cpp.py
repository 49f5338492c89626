"""The compiled kernels: every instruction set, threads, forks, buffers, pointers."""

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tinygpt_kernels import _C, native, ops, parity
from tinygpt_kernels.cases import Case, Draw, cases
from tinygpt_kernels.native import layer_norm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def isa():
    """Serve from one instruction set for one test."""
    before = _C.isa()
    yield _C.set_isa
    _C.set_isa(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", _C.supported_isas())
def test_every_instruction_set_passes_every_case(isa, name, dtype):
    isa(name)
    assert _C.isa() == name == native.isa()
    for case in cases("layer_norm"):
        parity.check(case, "cpp", dtype)


@pytest.mark.parametrize("name", _C.supported_isas())
@pytest.mark.parametrize("C", [*range(1, 36), 63, 64, 65, 127, 255, 256, 257, 513])
def test_every_width_around_a_vector(isa, name, C):
    isa(name)

    def make(draw: Draw):
        return (draw.normal(7, C), draw.normal(C, mean=1.0), draw.normal(C)), {}

    # C = 1 has no variance and C = 2 none but its sign: their input gradients are what rounding leaves
    for dtype in DTYPES if C > 2 else ():
        parity.check(Case("layer_norm", f"7x{C}", make), "cpp", dtype)
    x = torch.randn(7, C)
    y, mean, _ = layer_norm.layer_norm_fwd(x, torch.ones(C), None, 1e-5)
    torch.testing.assert_close(mean, x.mean(-1))
    torch.testing.assert_close(y, F.layer_norm(x, (C,)))


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="'avx1024' is not supported here"):
        _C.set_isa("avx1024")


@pytest.mark.parametrize("name", _C.supported_isas())
def test_half_precision_conversions_are_torchs_bit_for_bit(isa, name):
    isa(name)
    # One row of every value there is: y = (x - 0) * 1 * w with w = 1 would still be normalised, so the weight carries them.
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
        every = every[torch.isfinite(every)]
        C = len(every)
        x = torch.zeros(1, C, dtype=dtype)  # xhat = 0 everywhere: y is the bias, widened and narrowed
        y, _, _ = layer_norm.layer_norm_fwd(x, torch.ones(C, dtype=dtype), every, 1e-5)
        assert torch.equal(y[0].view(torch.int16) & 0x7FFF, every.view(torch.int16) & 0x7FFF)
        # float32 -> 16 bit, ties and limits included
        values = torch.cat(
            [torch.randn(5000) * 10 ** torch.randint(-8, 5, (5000,)).float(), every.float() * 1.0009765625]
        )
        values = values[torch.isfinite(values.to(dtype))]
        x = torch.zeros(1, len(values), dtype=dtype)
        y, _, _ = layer_norm.layer_norm_fwd(x, torch.ones(len(values)), values, 1e-5)
        assert torch.equal(y[0] + 0, values.to(dtype) + 0)


def test_results_do_not_depend_on_the_number_of_threads():
    x, weight, bias, dy = torch.randn(999, 257), torch.randn(257), torch.randn(257), torch.randn(999, 257)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            y, mean, rstd = layer_norm.layer_norm_fwd(x, weight, bias, 1e-5)
            found.append((y, mean, rstd, *layer_norm.layer_norm_bwd(dy, x, weight, bias, mean, rstd, 1e-5)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torchs_openmp_is_the_only_one_in_the_process():
    code = (
        "import torch; from tinygpt_kernels import _C; from tinygpt_kernels.native import layer_norm; x = torch.randn(4096, 64);"
        "layer_norm.layer_norm_fwd(x, torch.ones(64), None, 1e-5);"
        "print(*sorted({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}), sep='\\n')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert len(found) == 1, found
    assert "torch" in found[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes_and_does_not_hang():
    # compared by NumPy: torch's own parallel operations would hang in the child
    code = (
        "import os, sys, torch; from tinygpt_kernels.native import layer_norm\n"
        "x, w = torch.randn(4096, 256), torch.ones(256)\n"
        "y = layer_norm.layer_norm_fwd(x, w, None, 1e-5)[0]\n"  # the parent's threads are running
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    os._exit(0 if (layer_norm.layer_norm_fwd(x, w, None, 1e-5)[0].numpy() == y.numpy()).all() else 3)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


def test_other_python_threads_run_meanwhile():
    import threading

    x, w = torch.randn(20000, 512), torch.ones(512)
    results, alone = [None] * 4, layer_norm.layer_norm_fwd(x, w, None, 1e-5)[0]

    def work(i):
        results[i] = layer_norm.layer_norm_fwd(x, w, None, 1e-5)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(r, alone) for r in results)


@pytest.mark.parametrize("R", [0, 1, 17, 129])
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, True), (False, False, True)])
def test_buffers_are_filled_whole_and_nothing_unwanted_is_made(R, needs):
    nan = float("nan")
    x, weight, bias, dy = torch.randn(R, 65), torch.randn(65), torch.randn(65), torch.randn(R, 65)
    out = (torch.full_like(x, nan), torch.full((R,), nan), torch.full((R,), nan))
    y, mean, rstd = layer_norm.layer_norm_fwd(x, weight, bias, 1e-5, out=out)
    assert y is out[0]
    grads = tuple(torch.full_like(t, nan) if need else None for t, need in zip((x, weight, bias), needs, strict=True))
    found = layer_norm.layer_norm_bwd(dy, x, weight, bias, mean, rstd, 1e-5, needs=needs, out=grads)
    fresh = layer_norm.layer_norm_bwd(dy, x, weight, bias, mean, rstd, 1e-5, needs=needs)
    for mine, made, need in zip(found, fresh, needs, strict=True):
        assert (mine is None) == (made is None) == (not need)
        assert mine is None or (torch.isfinite(mine).all() and torch.equal(mine, made))


def test_gradients_of_any_strides_are_read_in_place_or_copied():
    x, weight, bias = torch.randn(5, 33), torch.randn(33), torch.randn(33)
    _, mean, rstd = layer_norm.layer_norm_fwd(x, weight, bias, 1e-5)
    dense = torch.randn(5, 33)
    strided = torch.empty(5, 99)[:, 7:40].copy_(dense)
    transposed = dense.T.contiguous().T
    expected = layer_norm.layer_norm_bwd(dense, x, weight, bias, mean, rstd, 1e-5)
    for dy in (strided, transposed):
        found = layer_norm.layer_norm_bwd(dy, x, weight, bias, mean, rstd, 1e-5)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    one = torch.tensor(2.0).expand(5, 33)
    torch.testing.assert_close(
        layer_norm.layer_norm_bwd(one, x, weight, bias, mean, rstd, 1e-5)[2], torch.full((33,), 10.0)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": (torch.empty(3, 9), torch.empty(3), torch.empty(3))}, "an out buffer must be"),
        ({"out": (torch.empty(8, 3).T, torch.empty(3), torch.empty(3))}, "contiguous"),
        ({"out": (torch.empty(3, 8), torch.empty(2), torch.empty(3))}, "an out buffer must be"),
        ({"out": (torch.empty(3, 8), torch.empty(3, dtype=torch.float64), torch.empty(3))}, "an out buffer must be"),
    ],
)
def test_buffers_that_do_not_fit_are_refused_before_anything_is_written(change, message):
    with pytest.raises(ValueError, match=message):
        layer_norm.layer_norm_fwd(torch.randn(3, 8), torch.ones(8), None, 1e-5, **change)


def test_statistics_of_another_call_are_refused():
    x, w = torch.randn(3, 8), torch.ones(8)
    with pytest.raises(ValueError, match="do not belong to x"):
        layer_norm.layer_norm_bwd(x, x, w, None, torch.ones(2), torch.ones(3), 1e-5, needs=(True, True, False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": 0}, "x is null"),
        ({"rows": -1}, "rows must be at least 0"),
        ({"cols": 0}, "cols at least 1"),
        ({"dtype": 7}, "a dtype code is"),
        ({"weight": 0}, "weight is null"),
        ({"mean": 0}, "mean or rstd is null"),
        ({"x_stride": -4}, "may not run backwards"),
    ],
)
def test_the_module_refuses_what_would_write_out_of_bounds(arguments, message):
    x, w, m = torch.randn(3, 4), torch.ones(4), torch.empty(3)
    right = {"x": x.data_ptr(), "x_stride": 4, "dtype": 0, "weight": w.data_ptr(), "weight_dtype": 0, "bias": 0, "bias_dtype": 0,
             "y": x.clone().data_ptr(), "mean": m.data_ptr(), "rstd": m.data_ptr(), "rows": 3, "cols": 4, "eps": 1e-5}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        _C.layer_norm_fwd(**right | arguments)


def test_a_large_mean_costs_no_digits():
    x = torch.randn(64, 1023) + 1000
    y, _, _ = layer_norm.layer_norm_fwd(x, torch.ones(1023), None, 1e-5)
    exact = F.layer_norm(x.double(), (1023,))
    plain = F.layer_norm(x, (1023,))
    assert (y - exact).norm() <= 2 * (plain - exact).norm() + 2e-6 * exact.norm()


def test_the_stub_says_what_the_module_has():
    stub = ast.parse(Path(inspect.getfile(ops)).with_name("_C.pyi").read_text())
    described = {f.name: [a.arg for a in f.args.args] for f in stub.body if isinstance(f, ast.FunctionDef)}
    public = [name for name in dir(_C) if callable(getattr(_C, name)) and not name.startswith("_")]
    if not hasattr(_C, "cuda_architectures"):  # built without nvcc
        described = {name: arguments for name, arguments in described.items() if not name.startswith("cuda_")}
    assert sorted(described) == sorted(public)
    for name, arguments in described.items():
        signature = getattr(_C, name).__doc__.splitlines()[0]
        found = re.findall(r"(\w+): ", signature[signature.index("(") : signature.rindex(")")])
        assert found == arguments, name


def test_a_missing_extension_is_a_reason_with_the_remedy():
    code = (
        "import sys; sys.modules['tinygpt_kernels._C'] = None\n"
        "import torch; from tinygpt_kernels import ops\n"
        "try: ops.layer_norm.on('cpp')(torch.ones(2, 4), torch.ones(4))\n"
        "except Exception as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "install a C++ compiler (g++ or clang++), then run `pip install -e .` again" in found.stdout, found.stderr
