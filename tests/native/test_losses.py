"""cross_entropy and linear_cross_entropy in C++: instruction sets, threads, buffers, slices, targets that are no class, memory."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from tinygpt_kernels import _C, ops, parity
from tinygpt_kernels.cases import Case, Draw, cases
from tinygpt_kernels.native import cross_entropy as native

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAN = float("nan")


@pytest.fixture(params=_C.supported_isas())
def isa(request):
    """Serve from one instruction set for one test."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def small_blocks(monkeypatch):
    """Slices of the vocabulary and blocks of rows even for small shapes."""
    monkeypatch.setattr(native, "_BLOCK", 512)
    monkeypatch.setattr(native, "_ROWS", 50)
    monkeypatch.setattr(native, "_WIDTH", 24)


def forward(logits, targets, **options):
    flat = ops.cross_entropy.flatten(logits, targets, **options)
    return native.cross_entropy_fwd(*flat)


def backward(logits, targets, lse, *, out=None, dloss=1.0, **options):
    flat = ops.cross_entropy.flatten(logits, targets, **options)
    return native.cross_entropy_bwd(torch.tensor(dloss), *flat[:3], lse, *flat[3:], out=out)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_every_instruction_set_passes_every_case(isa, op, dtype):
    for case in cases(op):
        parity.check(case, "cpp", dtype)


@pytest.mark.parametrize("V", [*range(1, 36), 63, 65, 255, 257, 511, 512, 513, 520, 1023, 1025, 1040, 2049])
def test_every_width_around_a_vector_and_a_block(isa, V):
    for smoothing in (0.0, 0.2):

        def make(draw: Draw, smoothing=smoothing):
            return (draw.normal(7, V, scale=4.0), draw.integers(V, 7)), {"label_smoothing": smoothing}

        for dtype in DTYPES:
            parity.check(Case("cross_entropy", f"7x{V}", make), "cpp", dtype)


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_results_do_not_depend_on_the_number_of_threads(isa, small_blocks, op):
    x = (torch.randn(203, 300),) if op == "cross_entropy" else (torch.randn(203, 48), torch.randn(300, 48))
    targets = torch.randint(300, (203,))
    flat = getattr(ops, op).flatten(*x, targets, ignore_index=3)
    fwd, bwd = getattr(native, f"{op}_fwd"), getattr(native, f"{op}_bwd")
    before, found = torch.get_num_threads(), []
    # PyTorch's sgemm may divide the work among threads in its own way: its share is left to one thread throughout.
    product = torch.mm

    def alone(*args, **kwargs):
        now = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return product(*args, **kwargs)
        finally:
            torch.set_num_threads(now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", alone)
        patch.setattr(
            native,
            "_add_product",
            lambda target, a, b, fresh: target.copy_(b.sum() + a.sum() + (0 if fresh else target)),
        )
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                loss, lse = fwd(*flat)
                tensors = len(x) + 2
                found.append((loss, lse, bwd(torch.tensor(0.7), *flat[:tensors], lse, *flat[tensors:])[0]))
        finally:
            torch.set_num_threads(before)
    assert all(torch.isfinite(t).all() for t in found[0])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("R", "V", "vocab"), [(0, 65, None), (1, 1, None), (17, 5, 3), (65, 65, None), (33, 80, 65), (9, 1040, 999)]
)
def test_buffers_are_filled_whole_and_may_be_the_logits(isa, R, V, vocab, dtype):
    logits, targets = torch.randn(R, V).to(dtype), torch.randint(vocab or V, (R,))
    targets[::4] = -100
    out = torch.tensor(NAN), torch.full((R,), NAN)
    flat = ops.cross_entropy.flatten(logits, targets, vocab=vocab, label_smoothing=0.1)
    loss, lse = native.cross_entropy_fwd(*flat, out=out)
    assert loss is out[0]
    assert lse is out[1]
    assert torch.isfinite(loss)
    assert torch.isfinite(lse).all()
    options = {"vocab": vocab, "label_smoothing": 0.1}
    fresh = backward(logits, targets, lse, **options)
    filled = backward(logits, targets, lse, out=(torch.full_like(logits, NAN),), **options)
    assert torch.equal(fresh, filled)
    assert not filled[::4].any()
    assert vocab is None or not filled[:, vocab:].any()
    given = logits.clone()
    assert backward(given, targets, lse, out=(given,), **options) is given
    assert torch.equal(given, fresh)


def test_rows_apart_are_read_in_place_and_other_strides_copied(isa):
    dense, targets = torch.randn(17, 129), torch.randint(129, (17,))
    loss, lse = forward(dense, targets)
    gradient = backward(dense, targets, lse)
    apart = torch.full((17, 140), NAN)[:, 7:136].copy_(dense)
    for logits in (apart, dense.T.contiguous().T, dense.repeat_interleave(2, 1)[:, ::2]):
        found, found_lse = forward(logits, targets)
        assert torch.equal(found, loss)
        assert torch.equal(found_lse, lse)
        assert torch.equal(backward(logits, targets, lse), gradient)
    same = torch.randn(129).expand(17, 129)
    torch.testing.assert_close(forward(same, targets)[0], F.cross_entropy(same, targets))


@pytest.mark.parametrize("target", [65, 79, 1000, -1, -(1 << 40), 1 << 40])
def test_a_target_that_is_no_class_makes_the_loss_nan_and_reads_nothing(isa, small_blocks, target):
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
    assert math.isnan(ops.linear_cross_entropy.on("cpp")(torch.randn(5, 8), torch.randn(80, 8), targets, vocab=65))


def test_an_ignored_index_may_lie_among_the_classes(isa):
    logits, targets = torch.randn(9, 33), torch.arange(9) % 3
    truth = F.cross_entropy(logits, targets, ignore_index=2)
    torch.testing.assert_close(forward(logits, targets, ignore_index=2)[0], truth)


def test_infinite_and_missing_logits(isa):
    inf = math.inf
    for V in (5, 8, 21, 1100):
        logits, targets = torch.randn(4, V), torch.zeros(4, dtype=torch.int64)
        logits[0, 1:] = -inf  # one class left
        logits[1, V // 2] = NAN
        logits[2, :] = -inf
        logits[3, V - 1] = inf
        loss, lse = forward(logits[:1], targets[:1])
        assert loss == 0
        assert lse == logits[0, 0]
        gradient = backward(logits[:1], targets[:1], lse)
        assert torch.equal(gradient, torch.zeros(1, V))
        _, lse = forward(logits, targets)
        assert math.isnan(lse[1])
        assert lse[2:].tolist() == [-inf, inf]
        for row in (1, 2, 3):
            assert not torch.isfinite(forward(logits[row : row + 1], targets[:1])[0])


def test_logits_far_apart_cost_no_digits(isa):
    logits = torch.randn(64, 700) * 3
    logits[:, ::50] += 90 * torch.rand(64, 14)
    logits += torch.linspace(-3e4, 3e4, 64)[:, None]
    targets = torch.randint(700, (64,))
    _, lse = forward(logits, targets)
    exact = torch.logsumexp(logits.double(), 1)
    assert ((lse - exact).abs() <= 2 * (torch.logsumexp(logits, 1) - exact).abs().max() + 1e-6).all()
    leaf = logits.double().requires_grad_()
    (truth,) = torch.autograd.grad(F.cross_entropy(leaf, targets), leaf)
    plain = logits.clone().requires_grad_()
    (theirs,) = torch.autograd.grad(F.cross_entropy(plain, targets), plain)
    # from an lse saved in float32, so with its rounding
    ours, rounding = backward(logits, targets, lse), lse.abs().max().item() * 2**-24
    assert (ours - truth).norm() <= 2 * (theirs - truth).norm() + (2e-6 + rounding) * truth.norm()
    logits -= torch.linspace(-3e4, 3e4, 64)[:, None]
    assert (backward(logits, targets, forward(logits, targets)[1]) - truth).norm() <= 1e-3 * truth.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases("linear_cross_entropy"), ids=str)
def test_slices_of_the_vocabulary_and_blocks_of_rows_pass_every_case(isa, small_blocks, case, dtype):
    parity.check(case, "cpp", dtype)


@pytest.mark.parametrize(
    "needs", [(True, True, False, False), (True, False, False, False), (False, True, False, False)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R", [0, 129])
def test_gradients_of_linear_cross_entropy_fill_their_buffers(small_blocks, R, dtype, needs):
    hidden, weight, targets = torch.randn(R, 16).to(dtype), torch.randn(97, 16).to(dtype), torch.randint(90, (R,))
    flat = ops.linear_cross_entropy.flatten(hidden, weight, targets, vocab=90)
    loss, lse = native.linear_cross_entropy_fwd(*flat, out=(torch.tensor(NAN), torch.full((R,), NAN)))
    assert loss.isfinite()
    arguments = (torch.tensor(1.0), *flat[:4], lse, *flat[4:])
    out = tuple(torch.full_like(t, NAN) if need else None for t, need in zip((hidden, weight), needs, strict=False))
    fresh = native.linear_cross_entropy_bwd(*arguments, needs=needs)
    found = native.linear_cross_entropy_bwd(*arguments, needs=needs, out=(*out, None, None))
    for mine, made, need in zip(found, fresh, needs, strict=True):
        assert (mine is None) == (made is None) == (not need)
        assert mine is None or (mine.isfinite().all() and torch.equal(mine, made))
    if needs[1]:
        assert not found[1][90:].any()


def test_what_does_not_fit_is_refused_before_anything_is_written():
    logits, targets = torch.randn(3, 8), torch.tensor([1, 2, 3])
    flat = ops.cross_entropy.flatten(logits, targets)
    with pytest.raises(ValueError, match="an out buffer must be"):
        native.cross_entropy_fwd(*flat, out=(torch.empty(()), torch.empty(2)))
    with pytest.raises(ValueError, match="does not belong to 3 rows"):
        backward(logits, targets, torch.zeros(2))
    with pytest.raises(ValueError, match="an out buffer must be"):
        backward(logits, targets, torch.zeros(3), out=(torch.empty(8, 3).T,))
    with pytest.raises(ValueError, match="must be integers"):
        forward(logits, targets.float())
    with pytest.raises(ValueError, match="denominator must hold one element"):
        forward(logits, targets, denominator=torch.ones(2))
    torch.testing.assert_close(forward(logits, targets.int())[0], F.cross_entropy(logits, targets))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": 0}, "logits is null"),
        ({"targets": 0}, "targets or lse is null"),
        ({"lse": 0}, "targets or lse is null"),
        ({"first": 1}, "not among the classes"),
        ({"cols": 3}, "needs a state"),
        ({"dtype": 3}, "a dtype code is"),
        ({"rows": -1}, "rows must be at least 0"),
    ],
)
def test_the_module_refuses_what_would_write_out_of_bounds(change, message):
    z, t, lse, loss = torch.randn(3, 4), torch.zeros(3, dtype=torch.int64), torch.empty(3), torch.empty(())
    right = {"logits": z.data_ptr(), "stride": 4, "dtype": 0, "targets": t.data_ptr(), "ignore_index": -100, "rows": 3, "cols": 4,
             "first": 0, "classes": 4, "smoothing": 0.0, "state": 0, "denominator": 0, "lse": lse.data_ptr(),
             "loss": loss.data_ptr()}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        _C.cross_entropy_fwd(**right | change)


MEMORY = """
import resource, sys, torch
from tinygpt_kernels import ops
R, C, V = map(int, sys.argv[1:])
hidden, weight = torch.randn(R, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
targets = torch.randint(V, (R,))
gradients = torch.ones(R * C), torch.ones(V * C)  # as large as what the backward returns, and touched
run = ops.linear_cross_entropy.on("cpp")
small = run(hidden[:64, :8], weight[:640, :8], targets[:64] % 640)  # whatever libraries set up at their first call
torch.autograd.grad(small, (hidden, weight))
del gradients
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = torch.autograd.grad(run(hidden, weight, targets), (hidden, weight))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 * R * V))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes on Linux")
@pytest.mark.parametrize(("R", "C", "V"), [(4096, 32, 20000), pytest.param(8192, 128, 50304, marks=pytest.mark.slow)])
def test_the_logits_never_exist_whole(R, C, V):
    found = subprocess.run([sys.executable, "-c", MEMORY, str(R), str(C), str(V)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) < 0.1, f"peak temporaries are {float(found.stdout):.3f} of the logits"
