"""What choosing a backend costs: an op's call minus the bare kernel function's, against the bars the interface promises.

    pytest benchmarks/bench_overhead.py --benchmark-only

The kernel here does nothing, so that nothing but the interface is left. Bars: 10 µs without gradient, 30 µs with.
"""

import pytest
import torch

from tinygpt_kernels import dispatch, op, ops
from tinygpt_kernels.timing import interleaved, median

BARS_US = {"without gradient": 10.0, "with gradient": 30.0}


@pytest.fixture
def empty(monkeypatch):
    """layer_norm on a backend that computes nothing."""
    for name in dispatch.known_backends():
        dispatch.load_backend(name)
    monkeypatch.setattr(dispatch, "impls", dict(dispatch.impls))
    monkeypatch.setattr(dispatch, "backends", dict(dispatch.backends))
    monkeypatch.setitem(dispatch.BUILTIN, "empty", "empty")
    row = torch.zeros(4)

    def fwd(x, weight, bias, eps, *, out=None):
        return x.detach(), row, row

    def bwd(dy, x, weight, bias, mean, rstd, eps, *, needs, out=None):
        return dy, weight, bias

    dispatch.register_backend("empty")
    dispatch.register(dispatch.Impl("layer_norm", "empty", fwd=fwd, bwd=bwd))
    return fwd, op.BoundOp(ops.layer_norm, ("empty",))


@pytest.mark.parametrize("kind", list(BARS_US))
def test_overhead(empty, kind, benchmark):
    fwd, bound = empty
    x, weight, bias = torch.randn(4, 16), torch.ones(16), torch.zeros(16)
    for tensor in (x, weight, bias):
        tensor.requires_grad_(kind == "with gradient")
    times = interleaved({"raw": lambda: fwd(x, weight, bias, 1e-5), "op": lambda: bound(x, weight, bias)})
    raw, through = (1e6 * median(found) for found in times.values())
    benchmark(bound, x, weight, bias)
    benchmark.extra_info["overhead_us"] = through - raw
    print(f"\nlayer_norm {kind}: {through - raw:.1f} µs above the kernel function, of {BARS_US[kind]:.0f} allowed")
    assert through - raw <= BARS_US[kind]
