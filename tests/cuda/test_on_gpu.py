"""The CUDA kernels on a GPU: on PyTorch's current stream, captured into a graph, on the tensor's own device.

Parity there is tests/kernels/test_gpu.py's, which takes every backend.
"""

import pytest
import torch

from tinygpt_kernels import dispatch, ops
from tinygpt_kernels.cases import cases
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


@pytest.mark.parametrize(
    ("op", "name"),
    [("gelu", "17x129 bias"), ("embedding", "positions given"), ("cross_entropy", "17x1023 smoothed"),
     ("linear_cross_entropy", "129x64x97 ignored")],
)  # fmt: skip
def test_a_graph_captures_forward_and_backward_with_what_pytorch_does_between(op, name):
    declared, impl = dispatch.all_ops()[op], dispatch.impls[op, "cuda"]
    args, kwargs = next(case for case in cases(op) if case.name == name).build(torch.float32, "cuda")
    flat = declared.flatten(*args, **kwargs)
    tensors = flat[: declared.tensors]
    needs = tuple(t is not None and t.is_floating_point() for t in tensors)

    def step():
        y, *saved = impl.fwd(*flat)
        gradients = impl.bwd(torch.ones_like(y), *tensors, *saved, *flat[declared.tensors :], needs=needs)
        return y, *(g for g in gradients if g is not None)

    expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for tensor in found:
        tensor.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


NUMBERS = {"step": 5, "lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("count", [3, 150, 700])  # a small table, a large one, and several
def test_a_graph_captures_an_optimizer_step(count):
    shapes = [(300, 257), (1,), (0,), *[(48,)] * (count - 3)]
    generator = torch.Generator("cuda").manual_seed(0)
    ours = [[torch.randn(s, device="cuda", generator=generator) for s in shapes] for _ in range(3)]
    ours.append([m.square() for m in ours[2]])
    theirs, others = ([[t.clone() for t in tensors] for tensors in ours] for _ in range(2))

    def step(backend, lists):
        norm = ops.clip_grad_norm_.on(backend)(lists[1], 1.0)
        ops.adamw_.on(backend)(*lists, **NUMBERS)
        return norm

    step("cuda", others)  # loads the kernels, which a capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = step("cuda", ours)
    for scale in (1.0, 0.0, 3.0):
        for mine, other in zip(ours[1], theirs[1], strict=True):
            mine.copy_(other.normal_(generator=generator).mul_(scale))
        graph.replay()
        torch.testing.assert_close(norm, step("reference", theirs), rtol=1e-5, atol=0)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_a_graph_captures_decoding_and_replays_it_for_other_lengths():
    q, k, v = (
        torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((3, 8, 64), (3, 1000, 2, 64), (3, 1000, 2, 64))
    )
    lengths = torch.tensor([1000, 1, 0], device="cuda")
    decode = ops.decode_attention.on("cuda")
    decode(q, k, v, lengths)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = decode(q, k, v, lengths)
    for values in ([1000, 1, 0], [17, 1000, 64], [65, 2, 999]):
        lengths.copy_(torch.tensor(values))
        graph.replay()
        torch.testing.assert_close(y, ops.decode_attention.on("reference")(q, k, v, lengths), rtol=2e-2, atol=1e-2)


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(8, 64, device="cuda:1")
    y = ops.layer_norm.on("cuda")(x, torch.ones(64, device="cuda:1"))
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (64,)), rtol=1e-5, atol=1e-5)
