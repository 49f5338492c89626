"""layer_norm: every CPU backend against PyTorch's own op, forward, backward and both, behind the parity gate.

    pytest benchmarks/bench_layer_norm.py --benchmark-only -s

Prints the ratio to PyTorch's op (above 1 is faster), and the rate at which the kernel moves its tensors beside the rate of a
copy of the same size. `kernel` calls the pure functions, `op` the op with autograd, as a model does.
"""

import pytest
import torch
import torch.nn.functional as F
from timing import copy_bandwidth, interleaved, keep_freed_memory, median, ratio

from tinygpt_kernels import dispatch, ops, parity
from tinygpt_kernels.cases import cases


@pytest.fixture(scope="module", autouse=True)
def gate():
    """No figure of a kernel that is wrong."""
    keep_freed_memory()
    for case in cases("layer_norm"):
        for dtype in (torch.float32, torch.bfloat16):
            parity.check(case, "cpp", dtype)


@pytest.mark.parametrize("threads", [2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("C", [128, 384, 768])
@pytest.mark.parametrize("R", [768, 2048, 4096])
def test_layer_norm(R, C, dtype, threads, benchmark):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        measure(R, C, dtype, threads, benchmark)
    finally:
        torch.set_num_threads(before)


def measure(R, C, dtype, threads, benchmark):
    impl = dispatch.impls["layer_norm", "cpp"]
    x, weight, bias = torch.randn(R, C, dtype=dtype), torch.ones(C, dtype=dtype), torch.zeros(C, dtype=dtype)
    dy = torch.randn(R, C, dtype=dtype)
    _, mean, rstd = impl.fwd(x, weight, bias, 1e-5)
    _, mean_t, rstd_t = torch.native_layer_norm(x, (C,), weight, bias, 1e-5)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    bound = ops.layer_norm.on("cpp")

    def torch_bwd():
        return torch.ops.aten.native_layer_norm_backward(dy, x, (C,), mean_t, rstd_t, weight, bias, [True] * 3)

    def torch_fwd():
        return torch.native_layer_norm(x, (C,), weight, bias, 1e-5)

    times = interleaved({
        "fwd": lambda: impl.fwd(x, weight, bias, 1e-5),
        "torch fwd": torch_fwd,
        "bwd": lambda: impl.bwd(dy, x, weight, bias, mean, rstd, 1e-5),
        "torch bwd": torch_bwd,
        "both": lambda: (impl.fwd(x, weight, bias, 1e-5), impl.bwd(dy, x, weight, bias, mean, rstd, 1e-5)),
        "torch both": lambda: (torch_fwd(), torch_bwd()),
        "op": lambda: torch.autograd.grad(bound(*leaves), leaves, dy),
        "torch op": lambda: torch.autograd.grad(F.layer_norm(leaves[0], (C,), *leaves[1:]), leaves, dy),
    })  # fmt: skip
    ratios = {k: ratio(times[f"torch {k}"], times[k]) for k in ("fwd", "bwd", "both", "op")}
    moved = 5 * x.numel() * x.element_size()  # forward: x, y; backward: dy, x, dx
    rate = moved / median(times["both"])
    print(f"\nlayer_norm {R}x{C} {str(dtype)[6:]} {threads} thread(s): "
          + ", ".join(f"{k} x{v:.2f}" for k, v in ratios.items())
          + f"; {rate / 1e9:.0f} GB/s, copy {copy_bandwidth(x.numel() * x.element_size()) / 1e9:.0f} GB/s")  # fmt: skip
    benchmark.extra_info.update(ratios)
    benchmark(lambda: impl.fwd(x, weight, bias, 1e-5))
