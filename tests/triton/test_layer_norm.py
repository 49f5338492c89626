"""layer_norm in Triton beyond the shared cases: that the kernels themselves run, tiles, buffers, edges."""

import pytest
import torch
import torch.nn.functional as F

from tinygpt_kernels import BackendError, ops
from tinygpt_kernels.triton_ops import common
from tinygpt_kernels.triton_ops import layer_norm as module


class Counting:
    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.fixture
def counted(monkeypatch):
    kernels = {}
    for home, name in (
        (module, "_layer_norm_fwd_kernel"),
        (module, "_layer_norm_bwd_kernel"),
        (common, "_sum_parts_kernel"),
    ):
        kernels[name] = Counting(getattr(home, name))
        monkeypatch.setattr(home, name, kernels[name])
    return lambda: [k.launches for k in kernels.values()]


def arguments(R=17, C=65, dtype=torch.float32, device="cpu"):
    x, weight, bias = torch.randn(R, C), torch.randn(C), torch.randn(C)
    return [t.to(device, dtype).requires_grad_() for t in (x, weight, bias)]


def test_the_kernels_themselves_run(counted):
    x, weight, bias = arguments()
    ops.layer_norm.on("triton")(x, weight, bias).sum().backward()
    assert counted() == [1, 1, 2]


def test_frozen_parameters_cost_no_work(counted):
    x, weight, bias = arguments()
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    ops.layer_norm.on("triton")(x, weight, bias).sum().backward()
    assert counted() == [1, 1, 0]
    assert weight.grad is None
    own = x.grad.clone()
    x.grad = None
    F.layer_norm(x, (65,), weight, bias).sum().backward()
    torch.testing.assert_close(own, x.grad, rtol=1e-4, atol=1e-6)


def test_every_tile_a_gpu_would_get_runs_and_agrees(monkeypatch):
    # The interpreter's own tiles are larger; here the shipped ones, tails included, on small inputs.
    shipped = module.tile
    seen = set()

    def as_on_a_gpu(R, C, *, backward=False, interpreting=False):
        found = shipped(R, C, backward=backward, interpreting=False)
        seen.add(tuple(found.values()))
        return found

    monkeypatch.setattr(module, "tile", as_on_a_gpu)
    for C in (2, 17, 64, 128, 300, 384, 768, 1023, 1536, 4096):
        x, weight, bias = arguments(5, C)
        own, plain = ops.layer_norm.on("triton")(x, weight, bias), F.layer_norm(x, (C,), weight, bias)
        torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-5)
        upstream = torch.randn_like(own)
        for mine, theirs in zip(torch.autograd.grad(own, (x, weight, bias), upstream),
                                torch.autograd.grad(plain, (x, weight, bias), upstream), strict=True):  # fmt: skip
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert len(seen) >= 6


def test_programs_share_the_rows(monkeypatch):
    monkeypatch.setattr(module, "processors", lambda device: 2)
    monkeypatch.setattr(module, "tile", lambda R, C, **_: {"ROWS": 4, "BLOCK_A": 64, "BLOCK_B": 0})
    x, weight, bias = arguments(77, 33)
    own, plain = ops.layer_norm.on("triton")(x, weight, bias), F.layer_norm(x, (33,), weight, bias)
    upstream = torch.randn_like(own)
    for mine, theirs in zip(torch.autograd.grad(own, (x, weight, bias), upstream),
                            torch.autograd.grad(plain, (x, weight, bias), upstream), strict=True):  # fmt: skip
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("R", [0, 1, 17])
def test_buffers_are_filled_whole(R):
    x, weight, bias = (t.detach() for t in arguments(R))
    nan = float("nan")
    out = (torch.full_like(x, nan), torch.full((R,), nan), torch.full((R,), nan))
    y, mean, rstd = module.layer_norm_fwd(x, weight, bias, 1e-5, out=out)
    assert all(a is b for a, b in zip((y, mean, rstd), out, strict=True))
    grads = tuple(torch.full_like(t, nan) for t in (x, weight, bias))
    module.layer_norm_bwd(torch.ones_like(x), x, weight, bias, mean, rstd, 1e-5, out=grads)
    for t in (*out, *grads):
        assert torch.isfinite(t).all()


def test_an_expanded_gradient_is_read_by_its_strides():
    x, weight, bias = arguments()
    y = ops.layer_norm.on("triton")(x, weight, bias)
    y.sum().backward()  # the gradient of a sum is one number, expanded
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 17.0))


def test_a_row_too_wide_is_refused_with_the_limit():
    x = torch.empty(1, 65537)
    with pytest.raises(BackendError, match="C=65537 is not within 1 to 65536"):
        ops.layer_norm.on("triton")(x, torch.empty(65537))


def test_there_is_no_silent_second_derivative():
    x, weight, bias = arguments()
    y = ops.layer_norm.on("triton")(x, weight, bias)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("C", [65, 768])
def test_the_norm_of_a_sum_sees_the_sum_as_it_is_stored(C):
    x, weight, bias = arguments(17, C, torch.bfloat16)
    y, h = ops.add_layer_norm.on("triton")(x, torch.randn(17, C).bfloat16(), weight, bias)
    assert torch.equal(y, ops.layer_norm.on("triton")(h, weight, bias))
