"""gelu, embedding and the losses in CUDA beyond the shared cases, simulated: bad indices, outputs over inputs, extremes, refusals."""

import math

import pytest
import simulation
import torch
import torch.nn.functional as F

from tinygpt_kernels import ops
from tinygpt_kernels.native.cuda import common, cross_entropy, embedding, gelu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAN = math.nan


@pytest.fixture
def checked(simt):
    """Launchers run on the CPU, every access checked."""
    with simulation.simulated(simt, "check", 1) as simulated:
        yield simulated


def forward(logits, targets, **options):
    return cross_entropy.cross_entropy_fwd(*ops.cross_entropy.flatten(logits, targets, **options))


def backward(logits, targets, lse, out=None, **options):
    flat = ops.cross_entropy.flatten(logits, targets, **options)
    return cross_entropy.cross_entropy_bwd(torch.tensor(1.0), *flat[:3], lse, *flat[3:], out=out)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [5, -1, 1 << 40, -(1 << 62)])
def test_an_index_that_is_no_row_gives_nan_and_reads_nothing(checked, bad, dtype):
    table, position = torch.randn(5, 16, dtype=dtype), torch.randn(3, 16, dtype=dtype)
    tokens, places = torch.tensor([[1, bad, 2]]), torch.tensor([[0, bad, 2]])
    good = torch.tensor([[1, 0, 2]])
    for x in (embedding.embedding_fwd(tokens, table, None, None, 1.0)[0],
              embedding.embedding_fwd(good, table, position, places, 1.0)[0]):  # fmt: skip
        assert torch.isnan(x[0, 1]).all()
        assert torch.isfinite(x[0, [0, 2]]).all()
    dy = torch.ones(1, 3, 16, dtype=dtype)
    _, dtable, dposition, _ = embedding.embedding_bwd(dy, tokens, table, position, places, 1.0)
    assert dtable[:, 0].tolist() == [0.0, 1.0, 1.0, 0.0, 0.0]
    assert dposition[:, 15].tolist() == [1.0, 0.0, 1.0]


def test_bad_indices_over_many_chunks_add_to_no_row(checked):
    tokens = torch.tensor([-7] * 70 + [1] * 70 + [9] * 70)[torch.randperm(210)].view(2, 105)
    _, dtable, _, _ = embedding.embedding_bwd(torch.ones(2, 105, 4), tokens, torch.randn(3, 4), None, None, 1.0)
    assert dtable[:, 0].tolist() == [0.0, 70.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [5, 64])
def test_tables_of_any_use_have_exact_gradients(checked, C, dtype):
    # small integers: every order of additions gives the same sum, so anything but equality is a place lost or doubled
    tokens = torch.cat([torch.zeros(300, dtype=torch.int64), torch.randint(0, 97, (400,)), torch.full((100,), 96)])
    tokens = tokens[torch.randperm(800)].view(8, 100)
    positions = torch.randint(0, 300, (8, 100), dtype=torch.int32)
    dy = torch.randint(-1, 2, (8, 100, C)).to(dtype)
    token, position = torch.randn(101, C, dtype=dtype), torch.randn(300, C, dtype=dtype)
    for given in (positions, None):
        out = (None, torch.full_like(token, NAN), torch.full_like(position, NAN), None)
        found = embedding.embedding_bwd(dy, tokens, token, position, given, 2.0, out=out)
        rows = torch.arange(100).expand(8, 100) if given is None else given.long()
        flat = dy.double().view(-1, C)
        assert found[1] is out[1]
        assert torch.equal(
            found[1].double(), torch.zeros(101, C).double().index_add_(0, tokens.view(-1), flat * 2).to(dtype).double()
        )
        assert torch.equal(
            found[2].double(),
            torch.zeros(300, C).double().index_add_(0, rows.reshape(-1), flat).to(dtype).double(),
        )


@pytest.mark.parametrize("target", [65, 79, 1000, -1, -(1 << 40), 1 << 40])
def test_a_target_that_is_no_class_makes_the_loss_nan_and_reads_nothing(checked, target):
    logits, targets = torch.randn(5, 80), torch.tensor([1, 2, target, -100, 3])
    loss, lse = forward(logits, targets, vocab=65)
    assert math.isnan(loss)
    torch.testing.assert_close(lse, torch.logsumexp(logits[:, :65], 1))
    gradient = backward(logits, targets, lse, vocab=65)
    # of that row: the softmax, without a target; the others do not notice
    torch.testing.assert_close(gradient[2, :65], torch.softmax(logits[2, :65], 0) / 4)
    assert not gradient[:, 65:].any()
    right = torch.where(targets == target, 0, targets)
    assert torch.equal(backward(logits, right, lse, vocab=65)[[0, 1, 3, 4]], gradient[[0, 1, 3, 4]])
    flat = ops.linear_cross_entropy.flatten(torch.randn(5, 8), torch.randn(80, 8), targets, vocab=65)
    assert math.isnan(cross_entropy.linear_cross_entropy_fwd(*flat)[0])


def test_an_ignored_row_has_no_gradient_whatever_its_logits_and_padding_is_not_looked_at(checked):
    logits, targets = torch.randn(4, 40), torch.tensor([3, -100, -100, 5])
    logits[1, 7], logits[2] = NAN, -math.inf
    logits[:, 33:] = NAN
    loss, lse = forward(logits, targets, vocab=33)
    torch.testing.assert_close(loss, F.cross_entropy(logits[[0, 3], :33], targets[[0, 3]]))
    gradient = backward(logits, targets, lse, vocab=33)
    assert gradient.isfinite().all()
    assert not gradient[1:3].any()
    assert not gradient[:, 33:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [9, 129, 1100])
def test_the_gradient_may_take_the_place_of_the_logits(checked, V, dtype):
    logits, targets = torch.randn(5, V).to(dtype), torch.randint(V, (5,))
    _, lse = forward(logits, targets, label_smoothing=0.1)
    fresh = backward(logits, targets, lse, label_smoothing=0.1)
    assert backward(logits, targets, lse, out=(logits,), label_smoothing=0.1) is logits
    assert torch.equal(logits, fresh)


def test_rows_apart_and_overlapping_are_read_in_place(checked):
    dense, targets = torch.randn(17, 129), torch.randint(129, (17,))
    loss, lse = forward(dense, targets)
    gradient = backward(dense, targets, lse)
    # The second's rows are as far from each other as the gradient's, in vectors, but begin elsewhere between two boundaries.
    apart, askew = (torch.full((17, width), NAN)[:, 7:136].copy_(dense) for width in (140, 137))
    for logits in (apart, askew, dense.T.contiguous().T):
        found, found_lse = forward(logits, targets)
        torch.testing.assert_close(found, loss)
        torch.testing.assert_close(found_lse, lse)
        torch.testing.assert_close(backward(logits, targets, lse), gradient)
    same = torch.randn(129).expand(17, 129)
    torch.testing.assert_close(forward(same, targets)[0], F.cross_entropy(same, targets))


def test_logits_far_apart_cost_no_digits(checked):
    logits = torch.randn(16, 700) * 3
    logits[:, ::50] += 90 * torch.rand(16, 14)
    logits += torch.linspace(-3e4, 3e4, 16)[:, None]
    targets = torch.randint(700, (16,))
    loss, lse = forward(logits, targets)
    exact = torch.logsumexp(logits.double(), 1)
    assert ((lse - exact).abs() <= 2 * (torch.logsumexp(logits, 1) - exact).abs().max() + 1e-6).all()
    truth = F.cross_entropy(logits.double(), targets)
    assert abs(loss - truth) <= 2 * abs(F.cross_entropy(logits, targets) - truth) + 2e-6 * truth


@pytest.mark.parametrize("R", [0, 5, 200])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_gradients_of_linear_cross_entropy_fill_their_buffers(checked, R, needs):
    hidden, weight, targets = torch.randn(R, 16), torch.randn(97, 16), torch.randint(90, (R,))
    flat = ops.linear_cross_entropy.flatten(hidden, weight, targets, vocab=90)
    loss, lse = cross_entropy.linear_cross_entropy_fwd(*flat, out=(torch.tensor(NAN), torch.full((R,), NAN)))
    assert loss.isfinite()
    arguments = (torch.tensor(1.0), *flat[:4], lse, *flat[4:])
    out = tuple(torch.full_like(t, NAN) if need else None for t, need in zip((hidden, weight), needs, strict=True))
    fresh = cross_entropy.linear_cross_entropy_bwd(*arguments, needs=(*needs, False, False))
    found = cross_entropy.linear_cross_entropy_bwd(*arguments, out=(*out, None, None))
    for mine, made, need in zip(found, fresh, needs, strict=False):
        assert (mine is None) == (made is None) == (not need)
        assert mine is None or (mine.isfinite().all() and torch.equal(mine, made))
    assert not needs[1] or not found[1][90:].any()


def test_of_nothing_the_loss_is_0_and_no_row_gets_a_gradient(checked):
    loss, lse = forward(torch.randn(0, 7), torch.zeros(0, dtype=torch.int64))
    assert loss == 0
    assert backward(torch.randn(0, 7), torch.zeros(0, dtype=torch.int64), lse).shape == (0, 7)
    tokens, table = torch.zeros(0, 5, dtype=torch.int64), torch.randn(6, 8)
    (x,) = embedding.embedding_fwd(tokens, table, table, None, 1.0)
    assert x.shape == (0, 5, 8)
    for positions in (None, tokens):
        for gradient in embedding.embedding_bwd(x, tokens, table, table, positions, 1.0)[1:3]:
            assert torch.equal(gradient, torch.zeros(6, 8))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_right_from_one_end_of_float32_to_the_other(checked, approximate):
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([-3e38, -1e5, -1e-30, 0.0, 1e-30, 1e5, 3e38])])
    (y,) = gelu.gelu_fwd(x, None, approximate)
    truth = F.gelu(x.double(), approximate=approximate)
    assert ((y - truth).abs() <= 3e-7 * x.double().abs()).all()
    (slope, _) = gelu.gelu_bwd(torch.ones_like(x), x, None, approximate)
    leaf = x[:-1].double().requires_grad_()  # the cube of the last is no float32
    (exact,) = torch.autograd.grad(F.gelu(leaf, approximate=approximate).sum(), leaf)
    wrong = (slope[:-1] - exact).abs()[(x[:-1].abs() < 1e6)]
    assert (wrong <= 5e-7).all()
    nan = torch.tensor([NAN, 1.0])
    assert gelu.gelu_fwd(nan, None, approximate)[0].isnan().tolist() == [True, False]


def test_gelu_may_write_over_its_inputs(checked):
    x, dy, bias = torch.randn(6, 40), torch.randn(6, 40), torch.randn(40)
    (fresh,) = gelu.gelu_fwd(x, bias, "none")
    gradients = gelu.gelu_bwd(dy, x, bias, "none")
    for target in (dy.clone(), x.clone()):
        arguments = (target, x) if torch.equal(target, dy) else (dy, target)
        found = gelu.gelu_bwd(*arguments, bias, "none", out=(target, torch.full_like(bias, NAN)))
        assert found[0] is target
        assert torch.equal(target, gradients[0])
        assert torch.equal(found[1], gradients[1])
    only = gelu.gelu_bwd(dy, x, bias, "none", needs=(False, True))
    assert only[0] is None
    assert torch.equal(only[1], gradients[1])
    assert gelu.gelu_fwd(x, bias, "none", out=(x,))[0] is x
    assert torch.equal(x, fresh)


def test_what_does_not_fit_is_refused(checked):
    logits, targets = torch.randn(3, 8), torch.tensor([1, 2, 3])
    flat = ops.cross_entropy.flatten(logits, targets)
    with pytest.raises(ValueError, match="cross_entropy on cuda: an out buffer must be"):
        cross_entropy.cross_entropy_fwd(*flat, out=(torch.empty(()), torch.empty(2)))
    with pytest.raises(ValueError, match="does not belong to 3 rows"):
        backward(logits, targets, torch.zeros(2))
    with pytest.raises(ValueError, match="an out buffer must be"):
        backward(logits, targets, torch.zeros(3), out=(torch.empty(8, 3).T,))
    with pytest.raises(ValueError, match="cross_entropy on cuda: targets must be integers on the CPU"):
        forward(logits, targets.float())
    with pytest.raises(ValueError, match="denominator must hold one element"):
        forward(logits, targets, denominator=torch.ones(2))
    with pytest.raises(ValueError, match=r"gelu on cuda: dy .* does not belong to x"):
        gelu.gelu_bwd(torch.randn(4, 8), logits, None, "none")
    with pytest.raises(ValueError, match=r"embedding on cuda: dy .* does not belong to tokens"):
        embedding.embedding_bwd(torch.randn(1, 3, 7), targets[None], logits, None, None, 1.0)
    torch.testing.assert_close(forward(logits, targets.int())[0], F.cross_entropy(logits, targets))


def test_the_module_refuses_null_pointers(checked):
    z = torch.randn(3, 4)
    with pytest.raises(ValueError, match="logits is null"):
        common.module.cuda_cross_entropy_fwd(0, 4, 0, 1, -100, 3, 4, 0.0, 1, 1, 0)
    with pytest.raises(ValueError, match="partial is null"):
        common.module.cuda_gelu_bwd(z.data_ptr(), 4, z.data_ptr(), 4, 0, 0, 0, 0, 1, False, 3, 4, 0, 0)
    with pytest.raises(ValueError, match="order is null"):
        common.module.cuda_embedding_bwd(z.data_ptr(), 4, 1, 0, 3, 3, z.data_ptr(), 3, 0, 4, 1.0, 0, 0)
