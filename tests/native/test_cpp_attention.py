"""Attention in C++: every instruction set around the sizes of its tiles, buffers, strides, threads, memory."""

import subprocess
import sys

import pytest
import torch

from tinygpt_kernels import _C, ops, parity
from tinygpt_kernels.autograd import reference_pair
from tinygpt_kernels.cases import Case, Draw, cases
from tinygpt_kernels.native import attention as native
from tinygpt_kernels.philox import keep_mask

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAN = float("nan")


@pytest.fixture
def isa():
    """Serve from one instruction set for one test."""
    before = _C.isa()
    yield _C.set_isa
    _C.set_isa(before)


@pytest.fixture
def threads():
    """Compute on some number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def drawn(B=2, T=65, S=65, H=4, K=2, D=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(B * T + S * H + D)
    shapes = ((B, T, H, D), (B, S, K, D), (B, S, K, D), (B, T, H, D))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def both(q, k, v, dy, lengths=None, seed=None, causal=True, scale=None, p=0.0, **needs):
    y, lse = native.attention_fwd(q, k, v, lengths, seed, causal, scale, p)
    return y, lse, *native.attention_bwd(dy, q, k, v, lengths, seed, y, lse, causal, scale, p, **needs)[:3]


def same_bits(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def make(B, T, S, H, K, D, **options):
    def build(draw: Draw):
        return (draw.normal(B, T, H, D), draw.normal(B, S, K, D), draw.normal(B, S, K, D)), options

    return build


# Tiles have 4, 6 or 12 rows and 8, 16 or 32 columns; blocks of queries 48 or 96 rows, of keys 64 to 384.
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("name", _C.supported_isas())
def test_every_length_around_a_tile_and_a_block(isa, name, causal):
    isa(name)
    lengths = (*range(1, 19), 23, 24, 25, 31, 32, 33, 47, 48, 49, 95, 96, 97, 98, 129, 191, 193, 255, 256, 257, 385)
    for i, T in enumerate(lengths):
        D = (8, 40, 32, 13)[i % 4]
        parity.check(Case("attention", f"T{T}", make(1, T, T, 2, 1, D, causal=causal)), "cpp", torch.float32)
        S = lengths[-1 - i]
        parity.check(Case("attention", f"{T}x{S}", make(1, T, S, 1, 1, D, causal=causal)), "cpp", torch.float32)


@pytest.mark.parametrize("name", _C.supported_isas())
def test_every_head_dim_around_a_vector(isa, name):
    isa(name)
    for D in (*range(1, 35), 47, 48, 49, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256):
        parity.check(Case("attention", f"D{D}", make(1, 19, 23, 2, 1, D, causal=True)), "cpp", torch.float32)
    for D in (1, 7, 31, 33, 256):
        for dtype in DTYPES[1:]:
            parity.check(Case("attention", f"D{D}", make(1, 70, 130, 2, 2, D, causal=True)), "cpp", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_blocks_of_keys_of_a_group(dtype):
    for D, T, S in ((128, 130, 230), (64, 97, 401), (256, 60, 200)):
        for options in (
            {"causal": True},
            {"causal": False},
            {"causal": True, "kv_lengths": torch.tensor([S - 40, 70])},
        ):
            parity.check(Case("attention", f"blocks {D} {options}", make(2, T, S, 4, 2, D, **options)), "cpp", dtype)


def test_a_head_dim_beyond_256_is_refused_with_the_reason():
    q = torch.randn(1, 3, 1, 257)
    with pytest.raises(RuntimeError, match="D=257 is not within 1 to 256"):
        ops.attention.on("cpp")(q, q, q, causal=True)


@pytest.mark.parametrize("name", _C.supported_isas())
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999999, 1 - 2.0**-40])
@pytest.mark.parametrize("T", [1, 5, 66, 300])
def test_the_dropout_mask_is_philoxs(isa, name, p, T):
    isa(name)
    B, H, S = 2, 3, 301
    seed = torch.tensor([-(2**62) + 12345])
    q = torch.zeros(B, T, H, S - 45)  # all weights equal: what v picks out of y is the mask
    k, v = torch.zeros(B, S, H, S - 45), torch.zeros(B, S, H, S - 45)
    for first in (0, 45):
        v.zero_()
        v[:, first : first + S - 45].diagonal(dim1=1, dim2=3).fill_(1.0)
        y, lse = native.attention_fwd(q, k, v, None, seed, False, None, p)
        kept = keep_mask(seed, p, (B, H, T, S))[..., first : first + S - 45].transpose(1, 2)
        torch.testing.assert_close(y, kept / (1 - p) / S)
        # and the backward's: with dy = 1 in one column of y, dv's column is the sum of that mask over queries
        dy = torch.ones_like(y)
        dv = native.attention_bwd(dy, q, k, v, None, seed, y, lse, False, None, p, needs=(False, False, True))[2]
        all_kept = keep_mask(seed, p, (B, H, T, S)).sum(2).transpose(1, 2)
        torch.testing.assert_close(dv, (all_kept / (1 - p) / S)[..., None].expand_as(dv))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "S"), [(1, 1), (17, 130), (130, 17), (5, 0), (0, 5)])
@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_buffers_are_filled_whole_and_nothing_unwanted_is_made(dtype, T, S, needs):
    q, k, v, dy = drawn(T=T, S=S, D=33, dtype=dtype)
    lengths = torch.tensor([S, S // 2])
    out = torch.full_like(q, NAN), torch.full((2, 4, T), NAN)
    y, lse = native.attention_fwd(q, k, v, lengths, None, True, None, 0.0, out=out)
    assert y is out[0]
    assert lse is out[1]
    grads = tuple(torch.full_like(t, NAN) if need else None for t, need in zip((q, k, v), needs, strict=True))
    options = (lengths, None, y, lse, True, None, 0.0)
    found = native.attention_bwd(dy, q, k, v, *options, needs=(*needs, False, False), out=(*grads, None, None))
    fresh = native.attention_bwd(dy, q, k, v, *options, needs=(*needs, False, False))
    for mine, made, need in zip(found[:3], fresh[:3], needs, strict=True):
        assert (mine is None) == (made is None) == (not need)
        assert mine is None or (torch.isfinite(mine).all() and torch.equal(mine, made))
    assert torch.isfinite(y).all()
    sees_nothing = torch.arange(T) + (lengths[:, None] - T) < 0
    assert torch.equal(torch.isneginf(lse), sees_nothing[:, None].expand(2, 4, T))
    assert not y.transpose(1, 2)[torch.isneginf(lse)].any()
    if needs[0]:
        assert not found[0].transpose(1, 2)[torch.isneginf(lse)].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_and_gradients_of_any_strides(dtype):
    q, k, v, dy = drawn(T=50, S=130, D=20, dtype=dtype)
    expected = both(q, k, v, dy)

    def within(x, order):  # NaN around it, in every dimension
        whole = torch.full([x.shape[i] + 3 for i in order], NAN, dtype=x.dtype)
        view = whole.permute([order.index(i) for i in range(4)])[1:-2, 2:-1, 1:-2, 3:]
        return view.copy_(x), whole

    for order in ((0, 1, 2, 3), (1, 2, 0, 3), (0, 2, 1, 3)):
        views = [within(x, order)[0] for x in (q, k, v, dy)]
        assert same_bits(both(*views), expected)
        y, lse = expected[:2]
        targets = [within(torch.full_like(x, NAN), order) for x in (q, k, v)]
        out = (*(view for view, _ in targets), None, None)
        native.attention_bwd(views[3], *views[:3], None, None, within(y, order)[0], lse, True, None, 0.0, out=out)
        assert same_bits(out[:3], expected[2:])
        for view, whole in targets:  # nothing beside it was written
            view.fill_(NAN)
            assert torch.isnan(whole).all()
    transposed = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v, dy)]
    assert same_bits(both(*transposed), expected)
    one = torch.ones((), dtype=dtype).expand_as(dy)
    assert same_bits(both(q, k, v, one), both(q, k, v, one.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_lies_beyond_the_valid_keys_is_not_read(dtype):
    q, k, v, dy = drawn(T=70, S=70, D=24, dtype=dtype)
    lengths = torch.tensor([33, 0])
    clean = both(q, k, v, dy, lengths)
    for b, n in enumerate(lengths):
        k[b, n:], v[b, n:] = NAN, NAN
    found = both(q, k, v, dy, lengths)
    assert same_bits(found, clean)
    assert all(torch.isfinite(x).all() for x in found[2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_packed_form_is_the_same_computation_in_place(dtype):
    B, T, H, K, D = 2, 77, 6, 2, 24
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(B, T, H + 2 * K + 1, D + 4, generator=generator).to(dtype)
    qkv = whole[:, :, 1:, 2:-2]
    q, k, v = qkv.split((H, K, K), dim=2)
    dy = torch.randn(B, T, H, D, generator=generator).to(dtype)
    seed, lengths = torch.tensor([99]), torch.tensor([77, 30])
    y, lse, *grads = both(q, k, v, dy, lengths, seed, p=0.2)
    packed = native.attention_qkv_fwd(qkv, lengths, seed, H, K, True, None, 0.2)
    assert same_bits(packed, (y, lse))
    target = torch.full_like(whole, NAN)
    for out in (None, (target[:, :, 1:, 2:-2], None, None)):
        dqkv, *nothing = native.attention_qkv_bwd(dy, qkv, lengths, seed, y, lse, H, K, True, None, 0.2, out=out)
        assert nothing == [None, None]
        assert same_bits(dqkv.split((H, K, K), dim=2), grads)
    target[:, :, 1:, 2:-2] = NAN
    assert torch.isnan(target).all()


@pytest.mark.parametrize("shape", [(2, 65, 65, 4, 2, 32), (1, 500, 300, 3, 1, 64), (3, 33, 700, 1, 1, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(threads, shape, dtype):
    q, k, v, dy = drawn(*shape, dtype=dtype)
    found = []
    for count in (1, 2, 3, 7):
        threads(count)
        found.append(both(q, k, v, dy, seed=torch.tensor([5]), p=0.1))
    assert all(same_bits(other, found[0]) for other in found[1:])


def test_a_backward_takes_what_the_reference_saved():
    case = next(c for c in cases("attention") if c.name == "causal 65x17, rows that see nothing")
    flat = ops.attention.flatten(*case.build()[0], **case.build()[1])
    fwd, bwd = reference_pair(ops.attention)
    y, lse = fwd(*flat)
    dy, needs = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)), (True, True, True, False, False)
    mine = native.attention_bwd(dy, *flat[:5], y, lse, *flat[5:], needs=needs)
    for a, b in zip(mine[:3], bwd(dy, *flat[:5], y, lse, *flat[5:], needs=needs)[:3], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [6.0, 30.0])
def test_scores_far_apart_neither_overflow_nor_vanish(size):
    def build(draw: Draw):  # scores to hundreds and thousands, the largest in any block of keys
        q, k = (draw.normal(1, n, 1, 16, scale=size) for n in (40, 600))
        return (q, k, draw.normal(1, 600, 1, 16)), {"causal": False}

    parity.check(Case("attention", f"scores of {size}", build), "cpp", torch.float32)


def test_nan_in_a_query_stays_in_its_row():
    q, k, v, _ = drawn(B=1, T=40, S=40, H=1, K=1)
    clean = native.attention_fwd(q, k, v, None, None, True, None, 0.0)[0]
    q[0, 17, 0, 3] = NAN
    y = native.attention_fwd(q, k, v, None, None, True, None, 0.0)[0]
    assert torch.isnan(y[0, 17]).all()
    y[0, 17] = clean[0, 17]
    assert torch.equal(y, clean)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_memory_is_linear_in_the_number_of_tokens():
    # T x T floats would be 1 GB; inputs, outputs, gradients and workspaces are some 30 MB
    code = (
        "import resource, torch; from tinygpt_kernels.native import attention as a; torch.set_num_threads(2)\n"
        "def step(T):\n"
        "    x = torch.randn(1, T, 3, 16)\n"
        "    y, lse = a.attention_qkv_fwd(x, None, None, 1, 1, True, None, 0.0)\n"
        "    a.attention_qkv_bwd(y, x, None, None, y, lse, 1, 1, True, None, 0.0)\n"
        "step(64); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "step(16384); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(found) < 40_000, f"{found} KB"


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ((torch.empty(2, 9, 4, 32), torch.empty(2, 4, 65)), "an out buffer must be"),
        ((torch.empty(2, 65, 4, 32), torch.empty(2, 65, 4)), "an out buffer must be"),
        ((torch.empty(2, 4, 65, 32).transpose(1, 2), torch.empty(2, 4, 65)), "contiguous"),
        ((torch.empty(2, 65, 4, 32, dtype=torch.float16), torch.empty(2, 4, 65)), "an out buffer must be"),
    ],
)
def test_buffers_that_do_not_fit_are_refused(out, message):
    q, k, v, _ = drawn()
    with pytest.raises(ValueError, match=message):
        native.attention_fwd(q, k, v, None, None, True, None, 0.0, out=out)


def test_gradients_that_do_not_fit_are_refused():
    q, k, v, dy = drawn()
    y, lse = native.attention_fwd(q, k, v, None, None, True, None, 0.0)
    arguments = (q, k, v, None, None, y, lse, True, None, 0.0)
    for wrong in (torch.empty(2, 65, 2, 32), q.half(), torch.empty(2, 65, 32, 4).transpose(2, 3)):
        with pytest.raises(ValueError, match="a buffer for a gradient must be"):
            native.attention_bwd(dy, *arguments, out=(wrong, None, None, None, None))
    with pytest.raises(ValueError, match="do not belong to q"):
        native.attention_bwd(dy[:, :-1], *arguments)
    with pytest.raises(ValueError, match="do not belong to q"):
        native.attention_bwd(dy, q, k, v, None, None, y, lse[..., :-1], True, None, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": 0}, "q is null"),
        ({"k": 0}, "k is null"),
        ({"v": 0}, "v is null"),
        ({"y": 0}, "y or lse is null"),
        ({"lse": 0}, "y or lse is null"),
        ({"dtype": 5}, "a dtype code is"),
        ({"k_strides": (0, -1, 0, 1)}, "may not be negative"),
        ({"sizes": (1, 3, 3, 2, 2, 257)}, "D must be 1 to 256"),
        ({"sizes": (1, 3, 3, 2, 0, 4)}, "K must divide H"),
        ({"sizes": (1, 3, 3, 3, 2, 4)}, "K must divide H"),
        ({"sizes": (1, -3, 3, 2, 2, 4)}, "K must divide H"),
        ({"sizes": (1, 3, 3, 2, 2)}, "too short"),
        ({"dropout_p": 0.5}, "a seed"),
        ({"dropout_p": 1.0}, "0 <= p < 1"),
    ],
)
def test_the_module_refuses_what_would_write_out_of_bounds(arguments, message):
    x, lse = torch.randn(1, 3, 2, 4), torch.empty(1, 2, 3)
    at, strides = x.data_ptr(), x.stride()
    right = {"q": at, "q_strides": strides, "k": at, "k_strides": strides, "v": at, "v_strides": strides, "dtype": 0,
             "kv_lengths": 0, "seed": 0, "y": x.clone().data_ptr(), "lse": lse.data_ptr(), "causal": True, "scale": 1.0,
             "dropout_p": 0.0, "sizes": (1, 3, 3, 2, 2, 4)}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        _C.attention_fwd(**(right | arguments))
