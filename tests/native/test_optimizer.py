"""adamw_ and clip_grad_norm_ in C++: instruction sets, threads, tables of tensors of every size, strides and dtypes."""

import itertools
import math

import pytest
import torch

from tinygpt_kernels import _C, ops, parity
from tinygpt_kernels.cases import cases

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = [1, 7, 0, 8, 65, 2047, 2048, 2049, 70001, 3, 4096]
OPTIONS = {"step": 3, "lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "grad_scale": 0.5}


@pytest.fixture(params=_C.supported_isas())
def isa(request):
    """Serve from one instruction set for one test."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def lists(sizes, param=torch.float32, grad=torch.float32, moment=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    draws = [[torch.randn(n, generator=g) for n in sizes] for _ in range(4)]
    return [[t.to(param) for t in draws[0]], [t.to(grad) for t in draws[1]],
            [(t * 0.1).to(moment) for t in draws[2]], [(t.abs() * 0.1 + 1e-3).to(moment) for t in draws[3]]]  # fmt: skip


def copied(found):
    return [[t.clone() for t in tensors] for tensors in found]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["adamw_", "clip_grad_norm_"])
def test_every_instruction_set_passes_every_case(isa, op, dtype):
    for case in cases(op):
        parity.check(case, "cpp", dtype)


@pytest.mark.parametrize(
    "dtypes", list(itertools.product(DTYPES, repeat=3)), ids=lambda d: "-".join(str(t)[6:] for t in d)
)
def test_dtypes_may_differ_between_parameters_gradients_and_moments(isa, dtypes):
    ours = lists([1, 17, 300], *dtypes)
    truth = [[t.double() for t in tensors] for tensors in ours]
    ops.adamw_.on("cpp")(*ours, **OPTIONS)
    ops.adamw_.on("reference")(*truth, **OPTIONS)
    for mine, exact in zip(ours, truth, strict=True):
        for a, b in zip(mine, exact, strict=True):
            assert (a.double() - b).norm() <= parity.FLOORS[a.dtype] * b.norm()


def test_dtypes_may_differ_between_tensors(isa):
    ours = [a + b for a, b in zip(lists([70, 9]), lists([33, 5], torch.bfloat16, torch.float16), strict=True)]
    alone = copied(ours)
    ops.adamw_.on("cpp")(*ours, **OPTIONS)
    for i in range(4):
        one = [[tensors[i]] for tensors in alone]
        ops.adamw_.on("cpp")(*one, **OPTIONS)
        for (a,), mine in zip(one, ours, strict=True):
            assert torch.equal(a, mine[i])


def test_results_do_not_depend_on_the_number_of_threads(isa):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            ours = lists(SIZES)
            norm = ops.clip_grad_norm_.on("cpp")(ours[1], 0.3)
            ops.adamw_.on("cpp")(*ours, **OPTIONS)
            found.append([norm, *itertools.chain(*ours)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_one_flat_tensor_gives_the_bits_of_its_parts(isa):
    # 2048 elements are a unit of work: these parts begin where one does, so that their vectors are the flat tensor's
    parts = lists([4096, 2048, 70000, 13])
    flat = [[torch.cat(tensors)] for tensors in parts]
    for group in (parts, flat):
        ops.adamw_.on("cpp")(*group, **OPTIONS)
    for tensors, (whole,) in zip(parts, flat, strict=True):
        assert torch.equal(torch.cat(tensors), whole)


def test_any_strides(isa):
    plain = lists([35, 15])
    shaped = [[tensors[0].view(5, 7), tensors[1].view(3, 5)] for tensors in plain]
    strided = [[t.T.contiguous().T if k % 2 else torch.zeros(2, *t.shape)[1].copy_(t) for t in tensors]
               for k, tensors in enumerate(shaped)]  # fmt: skip
    strided[0][0] = torch.full((5, 20), 3.0)[:, 2:9].copy_(shaped[0][0])
    gap = strided[0][0]._base
    strided[1][1] = torch.tensor(0.25).expand(3, 5)  # read, never written
    shaped[1][1].fill_(0.25)
    ops.adamw_.on("cpp")(*strided, **OPTIONS)
    ops.adamw_.on("cpp")(*shaped, **OPTIONS)
    for k in (0, 2, 3):
        for a, b in zip(strided[k], shaped[k], strict=True):
            assert torch.equal(a, b)
    assert (gap[:, :2] == 3).all()
    assert (gap[:, 9:] == 3).all()
    grads, same = [torch.randn(6, 4).T, torch.randn(3)], None
    same = [g.clone().contiguous() for g in grads]
    assert torch.equal(ops.clip_grad_norm_.on("cpp")(grads, 0.1), ops.clip_grad_norm_.on("cpp")(same, 0.1))
    assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))


def test_many_steps_follow_the_reference(isa):
    ours = lists([129, 2049])
    ours[2:] = [[torch.zeros_like(t) for t in tensors] for tensors in ours[2:]]
    truth = [[t.double() for t in tensors] for tensors in ours]
    start = [t.clone() for t in ours[0]]
    for step in range(1, 101):
        for group, name in ((ours, "cpp"), (truth, "reference")):
            for p, g in zip(group[0], group[1], strict=True):
                g.copy_(p.sin())
            ops.clip_grad_norm_.on(name)(group[1], 1.0)
            ops.adamw_.on(name)(*group, **OPTIONS | {"step": step})
    for a, b, c in zip(ours[0], truth[0], start, strict=True):
        assert (a - b).norm() < 1e-4 * (c - b).norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_is_exact_however_many_there_are(isa, dtype):
    grads = [torch.randn(n).to(dtype) for n in SIZES]
    exact = torch.cat(grads).double().norm()
    before = [g.clone() for g in grads]
    norm = ops.clip_grad_norm_.on("cpp")(grads, 1e6)
    assert abs(norm.double() - exact) <= 3e-7 * exact
    assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))
    ops.clip_grad_norm_.on("cpp")(grads, 2.0)
    torch.testing.assert_close(torch.cat(grads).double().norm(), torch.tensor(2.0).double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_squares_beyond_float32_still_give_the_norm(isa, size):
    grads = [torch.full((3000,), size), torch.full((4,), size)]
    exact = size * math.sqrt(3004)
    norm = ops.clip_grad_norm_.on("cpp")(grads, size)
    assert abs(norm.item() - exact) <= 1e-6 * exact


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 2100])
def test_a_norm_that_is_not_finite_is_returned_and_spreads(isa, bad, at):
    grads = [torch.ones(3), torch.ones(2101)]
    grads[1][at] = bad
    norm = ops.clip_grad_norm_.on("cpp")(grads, 1.0)
    reference = [torch.ones(3), torch.ones(2101)]
    reference[1][at] = bad
    expected = ops.clip_grad_norm_.on("reference")(reference, 1.0)
    torch.testing.assert_close(norm, expected, equal_nan=True)
    for a, b in zip(grads, reference, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_no_limit_means_no_scaling(isa):
    grads = [torch.full((10,), 1e10)]
    norm = ops.clip_grad_norm_.on("cpp")(grads, math.inf)
    assert math.isclose(norm.item(), 1e10 * math.sqrt(10), rel_tol=1e-6)
    assert (grads[0] == 1e10).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[1].pop(), "alike in length and shapes"),
        (lambda x: x[2].__setitem__(0, torch.zeros(4)), "alike in length and shapes"),
        (lambda x: x[3].__setitem__(0, x[3][0].bfloat16()), "in dtypes"),
        (lambda x: x[1].__setitem__(0, x[1][0].double()), "not torch.float64"),
        (lambda x: x[0].__setitem__(1, x[0][1].to("meta")), "is on meta"),
    ],
)
def test_lists_that_do_not_fit_are_refused(change, message):
    given = lists([5, 6])
    change(given)
    before = given[0][0].clone()
    with pytest.raises(ValueError, match=message):
        ops.adamw_.on("cpp")(*given, **OPTIONS)
    assert torch.equal(given[0][0], before)


def test_the_module_refuses_what_would_write_out_of_bounds():
    a, n = torch.zeros(4).data_ptr(), torch.zeros(()).data_ptr()
    rest = ([0], [0], [0], 1, 0.1, 0.9, 0.9, 1e-8, 0.0, 1.0)
    with pytest.raises(ValueError, match="not alike in length"):
        _C.adamw_([a], [a], [a], [], [4], *rest)
    with pytest.raises(ValueError, match="a tensor is null"):
        _C.adamw_([a], [0], [a], [a], [4], *rest)
    with pytest.raises(ValueError, match="a dtype code is"):
        _C.adamw_([a], [a], [a], [a], [4], [5], *rest[1:])
    with pytest.raises(ValueError, match="norm is null"):
        _C.clip_grad_norm_([a], [4], [0], 1.0, 0)
    with pytest.raises(ValueError, match="a tensor is null"):
        _C.clip_grad_norm_([a], [-4], [0], 1.0, n)
