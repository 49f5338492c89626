"""gelu, embedding and add_layer_norm in C++: every instruction set, widths, strides, buffers, threads, extreme values."""

import math

import pytest
import torch
import torch.nn.functional as F

from tinygpt_kernels import _C, ops, parity
from tinygpt_kernels.cases import Case, Draw, cases
from tinygpt_kernels.native.embedding import embedding_bwd, embedding_fwd
from tinygpt_kernels.native.gelu import gelu_bwd, gelu_fwd
from tinygpt_kernels.native.layer_norm import add_layer_norm_bwd, add_layer_norm_fwd

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = ("gelu", "embedding", "add_layer_norm")
FORMS = ("none", "tanh")
NAN = float("nan")
each_isa = pytest.mark.parametrize("isa", _C.supported_isas(), indirect=True)


@pytest.fixture
def isa(request):
    """Serve from one instruction set for one test."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def with_threads():
    """Run with some number of threads."""
    before = torch.get_num_threads()

    def run(threads, function):
        torch.set_num_threads(threads)
        return function()

    yield run
    torch.set_num_threads(before)


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_instruction_set_passes_every_case(isa, op, dtype):
    for case in cases(op):
        parity.check(case, "cpp", dtype)


@each_isa
@pytest.mark.parametrize("C", [*range(1, 20), 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 4097])
def test_every_width_around_a_vector(isa, C):
    def gelu(draw: Draw):
        return (draw.normal(5, C, scale=2.0), draw.normal(C) if C % 2 else None), {"approximate": FORMS[C % 2]}

    def embedding(draw: Draw):
        return (draw.integers(4, 2, 3), draw.normal(4, C), draw.normal(5, C)), {"scale": 3.0}

    def add_layer_norm(draw: Draw):
        return (draw.normal(5, C), draw.normal(5, C), draw.normal(C, mean=1.0), draw.normal(C)), {}

    for dtype in DTYPES:
        parity.check(Case("gelu", f"5x{C}", gelu), "cpp", dtype)
        parity.check(Case("embedding", f"2x3x{C}", embedding), "cpp", dtype)
        if C > 2:  # of 1 or 2 columns rounding alone is left
            parity.check(Case("add_layer_norm", f"5x{C}", add_layer_norm), "cpp", dtype)


# ------------------------------------------------------------------------------------------------------------------ gelu


def exact_gelu(z, approximate):
    """gelu and its derivative in float64, the small tails without cancellation."""
    z = z.double().requires_grad_()
    if approximate == "none":
        y = z * torch.special.erfc(-z / math.sqrt(2)) / 2
    else:
        y = z * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
    return y.detach(), torch.autograd.grad(y.sum(), z)[0]


@each_isa
@pytest.mark.parametrize("approximate", FORMS)
def test_erf_and_tanh_are_float32_accurate_over_a_dense_grid(isa, approximate):
    z = torch.cat([torch.linspace(-12, 12, 1 << 20), torch.logspace(-30, 1, 1 << 16), -torch.logspace(-30, 1, 1 << 16)])
    exact, slope = exact_gelu(z, approximate)
    (y,) = gelu_fwd(z, None, approximate)
    dx, _ = gelu_bwd(torch.ones_like(z), z, None, approximate, needs=(True, False))
    # the distribution function and the derivative to 2.5e-7, four units in the last place of numbers just below 1
    assert ((y - exact) / z.double()).abs().max() < 2.5e-7
    assert (dx - slope).abs().max() < 2.7e-7


@each_isa
@pytest.mark.parametrize("approximate", FORMS)
def test_gelu_at_the_ends_of_float32(isa, approximate):
    large = torch.tensor([7.0, 30.0, 1e4, 1e19, 1e30, 3.4e38])
    tiny = torch.tensor([1e-45, 1e-42, 1.1754944e-38, 1e-30, 0.0])
    x = torch.cat([large, -large, tiny, -tiny, torch.tensor([math.inf, -math.inf, NAN])]).repeat(3)[:50]
    (y,) = gelu_fwd(x, None, approximate)
    dx, _ = gelu_bwd(torch.ones_like(x), x, None, approximate, needs=(True, False))
    # Finite ones only: PyTorch's own vector code makes NaN of inf on AVX-512. What infinity and NaN give stands below.
    finite = x.isfinite()
    exact = F.gelu(x[finite].double(), approximate=approximate).float()
    torch.testing.assert_close(y[finite], exact, rtol=1e-6, atol=1e-9)
    n, m = len(large), len(tiny)
    assert torch.equal(y[:n], large)
    assert torch.equal(y[n : 2 * n], torch.zeros(n))
    assert dx[: 2 * n].tolist() == [1.0] * n + [0.0] * n
    assert torch.equal(dx[2 * n : 2 * n + 2 * m], torch.full((2 * m,), 0.5))
    assert y[2 * n + 2 * m].item() == math.inf
    assert torch.isnan(y[2 * n + 2 * m + 1 : 2 * n + 2 * m + 3]).all()  # -inf * 0, as in PyTorch
    assert dx[2 * n + 2 * m : 2 * n + 2 * m + 2].tolist() == [1.0, 0.0]
    assert torch.isnan(dx[2 * n + 2 * m + 2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_gelu_reads_any_strides_and_fills_every_buffer(bias, approximate, dtype):
    dense, b, upstream = (
        torch.randn(67, 129, dtype=dtype),
        torch.randn(129, dtype=dtype) if bias else None,
        torch.randn(67, 129, dtype=dtype),
    )
    y = F.gelu(dense if b is None else (dense.float() + b.float()), approximate=approximate).to(dtype)
    expected = (y, *gelu_bwd(upstream, dense, b, approximate))
    for apart in (
        lambda t: t,
        lambda t: torch.empty(67, 300, dtype=dtype)[:, 7:136].copy_(t),
        lambda t: t.T.contiguous().T,
    ):
        out = torch.full_like(dense, NAN)
        (found,) = gelu_fwd(apart(dense), b, approximate, out=(out,))
        assert found is out
        torch.testing.assert_close(found, expected[0])
        grads = (torch.full_like(dense, NAN), None if b is None else torch.full_like(b, NAN))
        gelu_bwd(apart(upstream), apart(dense), b, approximate, out=grads)
        assert torch.equal(grads[0], expected[1])
        assert b is None or torch.equal(grads[1], expected[2])
    only = gelu_bwd(upstream, dense, b, approximate, needs=(False, True))
    assert only[0] is None
    assert b is None or torch.equal(only[1], expected[2])
    # in place, which a step over preallocated memory may want
    x, dy = dense.clone(), upstream.clone()
    gelu_bwd(dy, x, b, approximate, out=(dy, None))
    assert torch.equal(dy, expected[1])
    gelu_fwd(x, b, approximate, out=(x,))
    torch.testing.assert_close(x, expected[0])


def test_the_gradient_of_a_bias_without_rows_is_zero():
    empty, bias = torch.empty(0, 8), torch.randn(8)
    _, dbias = gelu_bwd(empty, empty, bias, "none", out=(torch.empty(0, 8), torch.full((8,), NAN)))
    assert torch.equal(dbias, torch.zeros(8))


def test_gelu_refuses_what_does_not_fit():
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match="an out buffer must be"):
        gelu_fwd(x, None, "none", out=(torch.empty(3, 9),))
    with pytest.raises(ValueError, match="an out buffer must be"):
        gelu_bwd(x, x, torch.ones(8), "none", out=(None, torch.empty(9)))
    with pytest.raises(ValueError, match="does not belong to x"):
        gelu_bwd(torch.randn(4, 8), x, None, "none")


# ------------------------------------------------------------------------------------------------------------- embedding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [5, -1, 1 << 40, -(1 << 62)])
def test_an_index_that_is_no_row_gives_nan_and_reads_nothing(bad, dtype):
    table, position = torch.randn(5, 19, dtype=dtype), torch.randn(3, 19, dtype=dtype)
    tokens, places = torch.tensor([[1, bad, 2]]), torch.tensor([[0, bad, 2]])
    good = torch.tensor([[1, 0, 2]])
    for x in (ops.embedding.on("cpp")(tokens, table), ops.embedding.on("cpp")(good, table, position, places)):
        assert torch.isnan(x[0, 1]).all()
        assert torch.isfinite(x[0, [0, 2]]).all()
    _, dtable, dposition, _ = embedding_bwd(torch.ones(1, 3, 19, dtype=dtype), tokens, table, position, places, 1.0)
    assert dtable[:, 0].tolist() == [0.0, 1.0, 1.0, 0.0, 0.0]
    assert dposition[:, 18].tolist() == [1.0, 0.0, 1.0]


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [5, 64, 131, 200])
def test_tables_of_any_use_have_exact_gradients(isa, C, dtype):
    # small integers: every order of additions gives the same sum, so anything but equality is a place lost or doubled
    tokens = torch.cat([torch.zeros(700, dtype=torch.int64), torch.randint(0, 97, (900,)), torch.full((400,), 96)])
    tokens = tokens[torch.randperm(2000)].view(20, 100)
    positions = torch.randint(0, 300, (20, 100), dtype=torch.int32)
    dy = torch.randint(-1, 2, (20, 100, C)).to(dtype)
    token, position = torch.randn(101, C, dtype=dtype), torch.randn(300, C, dtype=dtype)
    for given in (positions, None):
        out = (None, torch.full_like(token, NAN), torch.full_like(position, NAN), None)
        found = embedding_bwd(dy, tokens, token, position, given, 2.0, out=out)
        rows = torch.arange(100).expand(20, 100) if given is None else given.long()
        dtoken = torch.zeros(101, C).index_add_(0, tokens.view(-1), dy.view(-1, C).float()) * 2
        dposition = torch.zeros(300, C).index_add_(0, rows.reshape(-1), dy.view(-1, C).float())
        assert found[1] is out[1]
        assert torch.equal(out[1], dtoken.to(dtype))
        assert torch.equal(out[2], dposition.to(dtype))


def test_embedding_reads_any_strides_and_fills_its_buffer():
    tokens, positions = torch.randint(0, 9, (6, 4)), torch.randint(0, 7, (6, 4))
    token, position, dy = torch.randn(9, 33), torch.randn(7, 33), torch.randn(6, 4, 33)
    expected = token[tokens] * 3 + position[positions]
    gradients = embedding_bwd(dy, tokens, token, position, positions, 3.0)
    transposed = [t.T.contiguous().T for t in (tokens, token, position, positions.int())]
    out = torch.full((6, 4, 33), NAN)
    (x,) = embedding_fwd(*transposed, 3.0, out=(out,))
    assert x is out
    torch.testing.assert_close(x, expected)
    for strided in (torch.empty(6, 4, 50)[..., 3:36].copy_(dy), dy.transpose(0, 2).contiguous().transpose(0, 2)):
        found = embedding_bwd(strided, *transposed, 3.0)
        assert all(torch.equal(a, b) for a, b in zip(found[1:3], gradients[1:3], strict=True))
    alone = embedding_bwd(dy, tokens, token, position, positions, 3.0, needs=(False, False, True, False))
    assert alone[1] is None
    assert torch.equal(alone[2], gradients[2])


def test_embedding_refuses_what_does_not_fit():
    tokens, token = torch.zeros(2, 3, dtype=torch.int64), torch.randn(5, 8)
    with pytest.raises(ValueError, match="an out buffer must be"):
        embedding_fwd(tokens, token, None, None, 1.0, out=(torch.empty(2, 3, 9),))
    with pytest.raises(ValueError, match="does not belong to tokens"):
        embedding_bwd(torch.randn(2, 4, 8), tokens, token, None, None, 1.0)
    with pytest.raises(ValueError, match="an out buffer must be"):
        embedding_bwd(torch.randn(2, 3, 8), tokens, token, None, None, 1.0, out=(None, torch.empty(4, 8), None, None))


def test_no_tokens_give_zero_gradients():
    tokens, token = torch.zeros(2, 0, dtype=torch.int64), torch.randn(5, 8)
    assert embedding_fwd(tokens, token, None, None, 1.0)[0].shape == (2, 0, 8)
    out = (None, torch.full((5, 8), NAN), None, None)
    embedding_bwd(torch.empty(2, 0, 8), tokens, token, None, None, 1.0, out=out)
    assert torch.equal(out[1], torch.zeros(5, 8))


# -------------------------------------------------------------------------------------------------------- add_layer_norm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [65, 128, 384])
def test_the_norm_sees_the_sum_as_it_is_stored(C, dtype):
    x, residual, weight = torch.randn(13, C, dtype=dtype), torch.randn(13, C, dtype=dtype), torch.randn(C, dtype=dtype)
    y, h, mean, _ = add_layer_norm_fwd(x, residual, weight, None, 1e-5)
    assert torch.equal(h, x + residual)
    again = ops.layer_norm.on("cpp")(h, weight)
    assert torch.equal(y, again)
    torch.testing.assert_close(mean, h.float().mean(-1))


@pytest.mark.parametrize("needs", [(True, True, True, True), (False, True, False, False), (True, False, False, True)])
@pytest.mark.parametrize("R", [0, 1, 129])
def test_add_layer_norm_fills_every_buffer_and_makes_nothing_unwanted(R, needs):
    x, residual, dy, dh = (torch.randn(R, 65) for _ in range(4))
    weight, bias = torch.randn(65), torch.randn(65)
    nan = [torch.full_like(t, NAN) for t in (x, x, torch.empty(R), torch.empty(R))]
    saved = add_layer_norm_fwd(x, residual, weight, bias, 1e-5, out=tuple(nan))
    assert all(a is b for a, b in zip(saved, nan, strict=True))
    assert all(torch.isfinite(t).all() for t in saved)
    arguments = (dy, dh, x, residual, weight, bias, *saved, 1e-5)
    fresh = add_layer_norm_bwd(*arguments, needs=needs)
    likes = (x, residual, weight, bias)
    out = tuple(torch.full_like(t, NAN) if need else None for t, need in zip(likes, needs, strict=True))
    given = add_layer_norm_bwd(*arguments, needs=needs, out=out)
    for mine, made, need in zip(given, fresh, needs, strict=True):
        assert (mine is None) == (made is None) == (not need)
        assert mine is None or (torch.isfinite(mine).all() and torch.equal(mine, made))
    without = add_layer_norm_bwd(dy, None, *arguments[2:], needs=(True, True, False, False))
    zero = add_layer_norm_bwd(dy, torch.zeros_like(dh), *arguments[2:], needs=(True, True, False, False))
    assert torch.equal(without[0], zero[0])


def test_add_layer_norm_in_place_and_of_any_strides():
    x, residual, dy, dh = (torch.randn(9, 70) for _ in range(4))
    weight, bias = torch.randn(70), torch.randn(70)
    saved = add_layer_norm_fwd(x, residual, weight, bias, 1e-5)
    expected = add_layer_norm_bwd(dy, dh, x, residual, weight, bias, *saved, 1e-5)
    for apart in (lambda t: torch.empty(9, 99)[:, 7:77].copy_(t), lambda t: t.T.contiguous().T):
        found = add_layer_norm_fwd(apart(x), apart(residual), weight, bias, 1e-5)
        assert all(torch.equal(a, b) for a, b in zip(found, saved, strict=True))
        found = add_layer_norm_bwd(apart(dy), apart(dh), x, residual, weight, bias, *saved, 1e-5)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for target in (dy.clone(), dh.clone()):
        ours = (target, dh) if torch.equal(target, dy) else (dy, target)
        out = (target, target, torch.empty(70), torch.empty(70))
        add_layer_norm_bwd(*ours, x, residual, weight, bias, *saved, 1e-5, out=out)
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    for target in (x.clone(), residual.clone()):
        ours = (target, residual) if torch.equal(target, x) else (x, target)
        y = torch.empty_like(x)
        add_layer_norm_fwd(*ours, weight, bias, 1e-5, out=(y, target, torch.empty(9), torch.empty(9)))
        assert torch.equal(target, saved[1])
        assert torch.equal(y, saved[0])


# --------------------------------------------------------------------------------------------------------------- threads


def test_results_do_not_depend_on_the_number_of_threads(with_threads):
    x, residual, dy, dh, weight, bias = (*(torch.randn(999, 257) for _ in range(4)), torch.randn(257), torch.randn(257))
    tokens, token, position = torch.randint(0, 65, (9, 111)), torch.randn(65, 257), torch.randn(111, 257)
    upstream = dy.view(9, 111, 257)

    def everything():
        saved = add_layer_norm_fwd(x, residual, weight, bias, 1e-5)
        return (
            *gelu_fwd(x, bias, "none"), *gelu_fwd(x, None, "tanh"), *gelu_bwd(dy, x, bias, "tanh"),
            gelu_bwd(dy, x, None, "none")[0], *embedding_fwd(tokens, token, position, None, 1.0),
            *embedding_bwd(upstream, tokens, token, position, None, 1.0)[1:3],
            *saved, *add_layer_norm_bwd(dy, dh, x, residual, weight, bias, *saved, 1e-5),
        )  # fmt: skip

    alone = with_threads(1, everything)
    for threads in (1, 2, 3, 7):
        found = with_threads(threads, everything)
        assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True)), threads


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("gelu_fwd", {"x": 0}, "x is null"),
        ("gelu_fwd", {"y": 0}, "y is null"),
        ("gelu_bwd", {"dy": 0}, "dy is null"),
        ("gelu_bwd", {"cols": 0}, "cols at least 1"),
        ("embedding_fwd", {"tokens": 0}, "tokens is null"),
        ("embedding_fwd", {"token": 0}, "token is null"),
        ("embedding_fwd", {"length": 0}, "length must be at least 1"),
        ("embedding_bwd", {"dtable": 0}, "dtable is null"),
        ("embedding_bwd", {"table_rows": -1}, "rows must be at least 0"),
        ("add_layer_norm_fwd", {"residual": 0}, "residual is null"),
        ("add_layer_norm_fwd", {"h": 0}, "h is null"),
        ("add_layer_norm_bwd", {"dy": 0}, "dy is null"),
    ],
)
def test_the_module_refuses_what_would_write_out_of_bounds(function, arguments, message):
    a, indices = torch.zeros(16, 16), torch.zeros(16, dtype=torch.int64)
    signature = getattr(_C, function).__doc__.splitlines()[0]
    special = {
        "tokens": indices.data_ptr(),
        "indices": indices.data_ptr(),
        "positions": 0,
        "tanh": False,
        "eps": 1e-5,
        "scale": 1.0,
    }
    right = {}
    for name in (
        part.split(":")[0] for part in signature[signature.index("(") + 1 : signature.rindex(")")].split(", ")
    ):
        small = (
            0
            if name.endswith("dtype")
            else 4
            if name.endswith(("rows", "cols", "stride", "places", "length"))
            else None
        )
        right[name] = special.get(name, a.data_ptr() if small is None else small)
    with pytest.raises(ValueError, match=message):
        getattr(_C, function)(**right | arguments)
