"""Linear layers in C++ beside torch.mm(out=): a training step's products, at the rows and widths of two configurations.

    pytest benchmarks/bench_linear.py --benchmark-only -s

Prints GFLOP/s, the ratio to PyTorch's product into a buffer (above 1 is faster) and the share of what this machine reaches
in one large product. `gelu`, `residual` and `slope` do more than the plain product and are compared with PyTorch doing as much.
"""

import pytest
import torch
import torch.nn.functional as F

from tinygpt_kernels import measure
from tinygpt_kernels.native import linear
from tinygpt_kernels.timing import interleaved, median, ratio

# rows, width, vocabulary: 12 x 64 tokens and 8 x 256 tokens of characters
CONFIGURATIONS = {"A": (768, 128, 65), "B": (2048, 384, 65)}
LAYERS = {"qkv": (3, 1), "projection": (1, 1), "up": (4, 1), "down": (1, 4), "head": (0, 1)}  # out, in, in widths


@pytest.fixture(scope="module")
def ceiling():
    """FLOP/s of one large product, by whoever does it faster."""
    return measure.matmul_rate("cpu", torch.float32)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_linear(configuration, layer, ceiling, benchmark):
    R, C, V = CONFIGURATIONS[configuration]
    out_widths, in_widths = LAYERS[layer]
    N, K = out_widths * C or V, in_widths * C
    x, weight, dy, slope = torch.randn(R, K), torch.randn(N, K) * K**-0.5, torch.randn(R, N), torch.rand(R, K)
    y, dx, dweight, gelu = torch.empty(R, N), torch.empty(R, K), torch.empty(N, K), torch.empty(R, N)
    y2, dx2, dweight2 = torch.empty(R, N), torch.empty(R, K), torch.empty(N, K)

    candidates = {
        "forward": (lambda: linear.linear_fwd(x, weight, out=y), lambda: torch.mm(x, weight.T, out=y2)),
        "dx": (lambda: linear.linear_bwd_input(dy, weight, out=dx), lambda: torch.mm(dy, weight, out=dx2)),
        "dweight": (lambda: linear.linear_bwd_weight(dy, x, out=dweight), lambda: torch.mm(dy.T, x, out=dweight2)),
    }
    for ours, theirs in candidates.values():  # no figure of a kernel that is wrong
        torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-4)
    candidates |= {
        "gelu": (
            lambda: linear.linear_gelu_fwd(x, weight, out=(gelu, y)),
            lambda: F.gelu(torch.mm(x, weight.T, out=y2)),  # without the slope
        ),
        "residual": (
            lambda: linear.linear_fwd(x, weight, None, dy, out=y),
            lambda: torch.addmm(dy, x, weight.T, out=y2),
        ),
        "slope": (
            lambda: linear.linear_bwd_input(dy, weight, slope, out=dx),
            lambda: torch.mm(dy, weight, out=dx2).mul_(slope),
        ),
    }
    times = interleaved(
        {
            f"{who} {name}": run
            for name, pair in candidates.items()
            for who, run in zip(("own", "torch"), pair, strict=True)
        }
    )
    flop = 2 * R * N * K
    print(f"\n{configuration} {layer} {R}x{N}x{K}:")
    for name in candidates:
        own, theirs = times[f"own {name}"], times[f"torch {name}"]
        rate = flop / median(own)
        faster = ratio(theirs, own)
        print(
            f"  {name:9} {rate / 1e9:4.0f} GFLOP/s, torch {flop / median(theirs) / 1e9:4.0f}: "
            f"x{faster:.2f}, {rate / ceiling:.0%} of {ceiling / 1e9:.0f}"
        )
        benchmark.extra_info[name] = faster
    benchmark(candidates["forward"][0])
