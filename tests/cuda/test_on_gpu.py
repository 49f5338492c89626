"""The CUDA kernels on a GPU: on PyTorch's current stream, captured into a graph, on the tensor's own device.

Parity there is tests/kernels/test_gpu.py's, which takes every backend.
"""

import pytest
import torch

from tinygpt_kernels import ops
from tinygpt_kernels.native.cuda import layer_norm

pytestmark = pytest.mark.gpu


def norm_inputs():
    x, weight, bias = (
        torch.randn(4096, 1024, device="cuda"),
        torch.randn(1024, device="cuda"),
        torch.randn(1024, device="cuda"),
    )
    return x, weight, bias, torch.nn.functional.layer_norm(x, (1024,), weight, bias)


def test_it_runs_on_the_current_stream():
    x, weight, bias, expected = norm_inputs()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # on another stream the copy below would come too late
        late = torch.empty_like(x)
        late.copy_(x)
        y = ops.layer_norm.on("cuda")(late, weight, bias)
    side.synchronize()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_a_graph_captures_it():
    x, weight, bias, expected = norm_inputs()
    out = torch.empty_like(x), torch.empty(4096, device="cuda"), torch.empty(4096, device="cuda")
    gradients = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)

    def step():
        y, mean, rstd = layer_norm.layer_norm_fwd(x, weight, bias, 1e-5, out=out)
        layer_norm.layer_norm_bwd(x, x, weight, bias, mean, rstd, 1e-5, out=gradients)
        return y

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    out[0].fill_(torch.nan)
    before = [g.clone() for g in gradients]
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(out[0], expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients, strict=True))


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(8, 64, device="cuda:1")
    y = ops.layer_norm.on("cuda")(x, torch.ones(64, device="cuda:1"))
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (64,)), rtol=1e-5, atol=1e-5)
