"""Linear layers in C++ against float64: every instruction set, sizes around tiles, what follows the product, threads."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tinygpt_kernels import _C
from tinygpt_kernels.native import linear
from tinygpt_kernels.parity import FLOORS

NAN = float("nan")
ISAS = _C.supported_isas()
# Around tiles of 4, 6, 8 or 12 rows and panels of 8, 16 or 32 columns, every fifth combination.
SIZES = list(itertools.product((1, 5, 6, 7, 13, 25), (1, 7, 8, 15, 16, 17, 33, 65), (1, 6, 129, 257)))[::5]
# Several blocks of K, several stretches of packed B in N and in K, no balance between threads.
LARGE = [(768, 65, 128), (63, 128, 2100), (3, 30000, 40), (20, 600, 2100), (1, 1, 5000)]


@pytest.fixture(params=ISAS)
def isa(request):
    """Serve from each instruction set in turn."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def close(found, exact, peer):
    """The rule of parity.py: within twice PyTorch's own error, and the floor."""
    assert torch.isfinite(found).all()
    size, largest = exact.norm(), exact.abs().max()
    bound = 2 * (peer - exact).norm() / size + FLOORS[torch.float32] if size else FLOORS[torch.float32]
    assert (found - exact).norm() <= bound * size
    assert (found - exact).abs().max() <= 10 * bound * largest


def empty(*shape):
    return torch.full(shape, NAN)


def inputs(R, N, K):
    torch.manual_seed(R + 1000 * N + K)
    return torch.randn(R, K), torch.randn(N, K), torch.randn(N), torch.randn(R, N), torch.randn(R, N), torch.randn(R, K)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_forward(isa, bias, residual):
    for R, N, K in SIZES + LARGE:
        x, w, b, r, _, _ = inputs(R, N, K)
        b, r = b if bias else None, r if residual else None

        def layer(x, w, b=b, r=r):
            y = x @ w.T
            y = y if b is None else y + b.to(y)
            return y if r is None else y + r.to(y)

        out = empty(R, N)
        assert linear.linear_fwd(x, w, b, r, out=out) is out
        close(out, layer(x.double(), w.double()), layer(x, w))
        if residual:  # in place
            again = r.clone()
            linear.linear_fwd(x, w, b, again, out=again)
            assert torch.equal(again, out)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_forward_with_gelu_and_its_slope(isa, bias, approximate):
    for R, N, K in SIZES + LARGE:
        x, w, b, _, _, _ = inputs(R, N, K)
        w /= max(K, 1) ** 0.5
        b = b if bias else None

        def layer(x, w, b=b):
            z = F.linear(x, w, None if b is None else b.to(x)).requires_grad_()
            y = F.gelu(z, approximate=approximate)
            return y.detach(), torch.autograd.grad(y.sum(), z)[0]

        out = (empty(R, N), empty(R, N))
        assert linear.linear_gelu_fwd(x, w, b, approximate, out=out) is out
        for found, exact, peer in zip(out, layer(x.double(), w.double()), layer(x, w), strict=True):
            close(found, exact, peer)


@pytest.mark.parametrize("slope", [False, True])
def test_gradient_of_the_input(isa, slope):
    for R, K, N in SIZES + LARGE:
        _, w, _, _, dy, s = inputs(R, N, K)
        s = s if slope else torch.ones(R, K)
        out = linear.linear_bwd_input(dy, w, s if slope else None, out=empty(R, K))
        close(out, (dy.double() @ w.double()) * s, (dy @ w) * s)


@pytest.mark.parametrize("accumulate", [False, True])
def test_gradient_of_the_weight(isa, accumulate):
    for N, K, R in SIZES + LARGE:
        x, w, _, _, dy, _ = inputs(R, N, K)
        start = w if accumulate else torch.zeros(N, K)
        out = linear.linear_bwd_weight(dy, x, out=w.clone() if accumulate else empty(N, K), accumulate=accumulate)
        close(out, start.double() + dy.double().T @ x.double(), start + dy.T @ x)


@pytest.mark.parametrize(("R", "N", "K"), [(0, 8, 8), (8, 8, 0), (8, 0, 8), (0, 0, 0)])
def test_empty_sizes(isa, R, N, K):
    x, w, b, r, dy, s = inputs(R, N, K)
    assert torch.equal(linear.linear_fwd(x, w, b, r, out=empty(R, N)), b + r)
    assert torch.equal(linear.linear_bwd_input(dy, w, s, out=empty(R, K)), (dy @ w) * s)
    assert torch.equal(linear.linear_bwd_weight(dy, x, out=empty(N, K)), dy.T @ x)
    assert torch.equal(linear.linear_bwd_weight(dy, x, out=w.clone(), accumulate=True), w + dy.T @ x)
    y, slope = linear.linear_gelu_fwd(x, w, None, out=(empty(R, N), empty(R, N)))
    if K == 0:
        assert torch.equal(y, torch.zeros(R, N))
        assert torch.equal(slope, torch.full((R, N), 0.5))


def test_results_do_not_depend_on_the_number_of_threads(isa, threads):
    for R, N, K in [(768, 384, 128), (768, 65, 512), (100, 48, 300), (16, 1000, 700), (200, 1000, 1500)]:
        x, w, b, r, dy, s = inputs(R, N, K)
        found = []
        for n in (1, 2, 3, 4):
            threads(n)
            found.append((
                linear.linear_fwd(x, w, b, r, out=empty(R, N)),
                *linear.linear_gelu_fwd(x, w, b, out=(empty(R, N), empty(R, N))),
                linear.linear_bwd_input(dy, w, s, out=empty(R, K)),
                linear.linear_bwd_weight(dy, x, out=w.clone(), accumulate=True),
            ))  # fmt: skip
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def strided(*tensors):
    """The same numbers as columns of one wider buffer, NaN between and around them."""
    rows = tensors[0].shape[0]
    wide = torch.full((rows, sum(t.shape[1] + 3 for t in tensors) + 2), NAN)
    views, at = [], 2
    for t in tensors:
        views.append(wide[:, at : at + t.shape[1]])
        views[-1].copy_(t)
        at += t.shape[1] + 3
    return wide, views


@pytest.mark.parametrize(("R", "N", "K"), [(37, 29, 300), (64, 128, 33), (7, 16, 8)])
def test_operands_and_results_inside_larger_buffers(isa, R, N, K):
    x, w, b, r, dy, s = inputs(R, N, K)
    expected = (
        linear.linear_fwd(x, w, b, r, out=empty(R, N)),
        *linear.linear_gelu_fwd(x, w, b, out=(empty(R, N), empty(R, N))),
        linear.linear_bwd_input(dy, w, s, out=empty(R, K)),
        linear.linear_bwd_weight(dy, x, out=w.clone(), accumulate=True),
    )
    wide, (xs, rs, dys, ss, y, gelu, slope, dx) = strided(x, r, dy, s, r * NAN, r * NAN, r * NAN, s * NAN)
    weights, (ws, dw) = strided(w, w)
    outside = torch.ones_like(wide, dtype=torch.bool)
    for view in (y, gelu, slope, dx):
        start = view.storage_offset()
        outside[:, start : start + view.shape[1]] = False
    before = wide.clone()
    linear.linear_fwd(xs, ws, b, rs, out=y)
    linear.linear_gelu_fwd(xs, ws, b, out=(gelu, slope))
    linear.linear_bwd_input(dys, ws, ss, out=dx)
    linear.linear_bwd_weight(dys, xs, out=dw, accumulate=True)
    for found, exact in zip((y, gelu, slope, dx, dw), expected, strict=True):
        assert torch.equal(found, exact)
    assert torch.equal(wide[outside].nan_to_num(0.5), before[outside].nan_to_num(0.5))
    assert weights[:, :2].isnan().all()
    assert weights[:, -3:].isnan().all()


def test_operands_of_any_strides(isa):
    R, N, K = 37, 29, 300
    x, w, _, _, dy, _ = inputs(R, N, K)
    turned = [t.T.contiguous().T for t in (x, w, dy)]
    every_other = [torch.stack((t, t * NAN), -1).flatten(1)[:, ::2] for t in (x, w, dy)]
    y, dx = linear.linear_fwd(x, w, out=empty(R, N)), linear.linear_bwd_input(dy, w, out=empty(R, K))
    dw = linear.linear_bwd_weight(dy, x, out=empty(N, K))
    for x2, w2, dy2 in (turned, every_other):
        assert torch.equal(linear.linear_fwd(x2, w2, out=empty(R, N)), y)
        assert torch.equal(linear.linear_bwd_input(dy2, w2, out=empty(R, K)), dx)
        assert torch.equal(linear.linear_bwd_weight(dy2, x2, out=empty(N, K)), dw)
    one = x[:1].expand(R, K)
    assert torch.equal(linear.linear_fwd(one, w, out=empty(R, N)), y[:1].expand(R, N))


def test_numbers_that_are_none_stay_in_their_row(isa):
    x, w, b, r, _, _ = inputs(20, 33, 70)
    x[3, 5], x[11, 0], x[19, 69] = NAN, float("inf"), -float("inf")
    out = linear.linear_fwd(x, w, b, r, out=empty(20, 33))
    bad = ~torch.isfinite(out)
    assert torch.equal(bad.any(1), ~torch.isfinite(x).all(1))
    assert bad[[3, 11, 19]].all()


def good():
    x, w, b, r, _, _ = inputs(6, 4, 8)
    return {"x_RK": x, "weight_NK": w, "bias_N": b, "residual_RN": r, "out": empty(6, 4)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_RK": torch.randn(6, 8).double()}, r"x must be a matrix of float32.*torch.float64.*use torch.mm"),
        ({"x_RK": torch.randn(6, 8, 1)}, "x must be a matrix"),
        ({"x_RK": torch.randn(6, 8, device="meta")}, "x must be a matrix"),
        ({"weight_NK": torch.randn(4, 9)}, r"weight must be \(4, 8\)"),
        ({"bias_N": torch.randn(5)}, r"bias must be \(4,\)"),
        ({"bias_N": torch.randn(8)[::2]}, r"bias must be \(4,\)"),
        ({"residual_RN": torch.randn(6, 5)}, r"residual must be \(6, 4\)"),
        ({"residual_RN": torch.randn(4, 6).T}, "contiguous rows"),
        ({"out": torch.empty(6, 4, dtype=torch.bfloat16)}, r"out must be \(6, 4\)"),
        ({"out": torch.empty(5, 4)}, r"out must be \(6, 4\)"),
        ({"out": torch.empty(4, 6).T}, "contiguous rows"),
        ({"out": torch.empty(4).expand(6, 4)}, "out must be"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        linear.linear_fwd(**good() | change)
    y, slope = empty(6, 4), empty(6, 5)
    with pytest.raises(ValueError, match="slope must be"):
        linear.linear_gelu_fwd(torch.randn(6, 8), torch.randn(4, 8), out=(y, slope))
    with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh', got 'erf'"):
        linear.linear_gelu_fwd(torch.randn(6, 8), torch.randn(4, 8), None, "erf", out=(y, y.clone()))


def test_buffers_that_overlap_are_refused():
    buffer = torch.randn(12, 16)
    x, w = buffer[:6, :8], torch.randn(8, 8)
    for out in (x, buffer[:6, 4:12], buffer[5:11, :8], buffer.view(-1)[4:52].view(6, 8)):
        with pytest.raises(ValueError, match="an output overlaps an input"):
            linear.linear_fwd(x, w, out=out)
    with pytest.raises(ValueError, match="add overlaps c and is not c"):
        linear.linear_fwd(torch.randn(6, 8), w, None, buffer[:6, :8], out=buffer[1:7, :8])
    y = torch.empty(6, 8)
    with pytest.raises(ValueError, match="slope overlaps c or add"):
        linear.linear_gelu_fwd(x, w, out=(y, y))
    with pytest.raises(ValueError, match="an output overlaps an input"):
        linear.linear_bwd_input(torch.randn(6, 8), w, y, out=y)
    with pytest.raises(ValueError, match="an output overlaps an input"):
        linear.linear_bwd_weight(w, w, out=w, accumulate=True)
    linear.linear_fwd(x, w, out=buffer[:6, 8:])  # side by side in one buffer
    assert torch.equal(buffer[:6, 8:], linear.linear_fwd(x, w, out=y))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"a": 0}, "a, b or c is null"),
        ({"m": -1}, "must be at least 0"),
        ({"a_row": -8}, "a stride is negative"),
        ({"c_row": 3}, "rows of c or slope overlap"),
        ({"activation": 3}, "an activation is"),
        ({"activation": 1}, "slope belongs to an activation"),
        ({"activation": 1, "slope": "b", "factor": "b"}, "exclude each other"),
    ],
)
def test_the_module_refuses_what_would_write_out_of_bounds(arguments, message):
    a, b, c = torch.randn(6, 8), torch.randn(8, 6), torch.empty(6, 6)
    right = dict.fromkeys(("bias", "add", "add_row", "factor", "factor_row", "activation", "slope", "slope_row"), 0)
    right |= {"a": a.data_ptr(), "a_row": 8, "a_col": 1, "b": b.data_ptr(), "b_row": 6, "b_col": 1,
              "c": c.data_ptr(), "c_row": 6, "m": 6, "n": 6, "k": 8}  # fmt: skip
    _C.gemm(**right)
    torch.testing.assert_close(c, a @ b)
    with pytest.raises(ValueError, match=message):
        _C.gemm(**right | {name: right[v] if isinstance(v, str) else v for name, v in arguments.items()})
