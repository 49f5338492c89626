"""adamw_ and clip_grad_norm_ on CUDA kernels, executed on the CPU: tables of tensors, dtypes, strides, what is not finite."""

import itertools
import math

import pytest
import simulation
import torch

from tinygpt_kernels import dispatch, ops, parity

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPTIONS = {"step": 3, "lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "grad_scale": 0.5}
dispatch.load_backend("cuda")
adamw_, clip_grad_norm_ = (simulation.run_on(op) for op in ("adamw_", "clip_grad_norm_"))


@pytest.fixture
def check(simt):
    with simulation.simulated(simt, "check", 1):
        yield simt


def lists(sizes, param=torch.float32, grad=torch.float32, moment=torch.float32):
    g = torch.Generator().manual_seed(0)
    draws = [[torch.randn(n, generator=g) for n in sizes] for _ in range(4)]
    return [[t.to(param) for t in draws[0]], [t.to(grad) for t in draws[1]],
            [(t * 0.1).to(moment) for t in draws[2]], [(t.abs() * 0.1 + 1e-3).to(moment) for t in draws[3]]]  # fmt: skip


def launched(simt, run):
    before = simt.launches()
    run()
    return simt.launches() - before


@pytest.mark.parametrize(("count", "adamw", "clip"), [(1, 1, 2), (148, 1, 2), (500, 1, 2), (600, 2, 2), (1200, 3, 4)])
def test_a_step_is_three_launches_whatever_the_number_of_tensors(simt, count, adamw, clip):
    given = lists([3] * count)
    with simulation.simulated(simt, "fast"):
        assert launched(simt, lambda: adamw_(*given, **OPTIONS)) == adamw
        assert launched(simt, lambda: clip_grad_norm_(given[1], 1.0)) == clip


@pytest.mark.parametrize(
    "dtypes", list(itertools.product(DTYPES, repeat=3)), ids=lambda d: "-".join(str(t)[6:] for t in d)
)
def test_dtypes_may_differ_between_parameters_gradients_and_moments(check, dtypes):
    ours = lists([1, 17, 300], *dtypes)
    truth = [[t.double() for t in tensors] for tensors in ours]
    adamw_(*ours, **OPTIONS)
    ops.adamw_.on("reference")(*truth, **OPTIONS)
    for mine, exact in zip(ours, truth, strict=True):
        for a, b in zip(mine, exact, strict=True):
            assert (a.double() - b).norm() <= parity.FLOORS[a.dtype] * b.norm()


def test_dtypes_may_differ_between_tensors(check):
    ours = [a + b for a, b in zip(lists([70, 9]), lists([33, 5], torch.bfloat16, torch.float16), strict=True)]
    alone = [[[t.clone()] for t in column] for column in zip(*ours, strict=True)]
    exact = torch.cat([g.double() for g in ours[1]]).norm()
    adamw_(*ours, **OPTIONS)
    assert abs(clip_grad_norm_(ours[1], 1e6).double() - exact) <= 3e-7 * exact
    for i, one in enumerate(alone):
        adamw_(*one, **OPTIONS)
        assert all(torch.equal(one[k][0], ours[k][i]) for k in range(4))


def test_one_flat_tensor_gives_the_bits_of_its_parts(check):
    parts = lists([4096, 2048, 5000, 13])
    flat = [[torch.cat(tensors)] for tensors in parts]
    for group in (parts, flat):
        adamw_(*group, **OPTIONS)
    for tensors, (whole,) in zip(parts, flat, strict=True):
        assert torch.equal(torch.cat(tensors), whole)


def test_any_strides(check):
    shaped = [[tensors[0].view(5, 7), tensors[1].view(3, 5)] for tensors in lists([35, 15])]
    strided = [[torch.full((5, 20), 3.0)[:, 2:9].copy_(a), b.T.contiguous().T] for a, b in shaped]
    strided[1][1] = torch.tensor(0.25).expand(3, 5)  # read, never written
    shaped[1][1].fill_(0.25)
    gap = strided[0][0]._base
    adamw_(*strided, **OPTIONS)
    adamw_(*shaped, **OPTIONS)
    for k in (0, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(strided[k], shaped[k], strict=True))
    assert (gap[:, :2] == 3).all()
    assert (gap[:, 9:] == 3).all()
    grads = [torch.randn(6, 4).T, torch.randn(3)]
    same = [g.clone().contiguous() for g in grads]
    assert torch.equal(clip_grad_norm_(grads, 0.1), clip_grad_norm_(same, 0.1))
    assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 2100])
def test_a_norm_that_is_not_finite_is_returned_and_spreads(check, bad, at, dtype):
    grads, reference = ([torch.ones(3, dtype=dtype), torch.ones(2101, dtype=dtype)] for _ in range(2))
    grads[1][at] = reference[1][at] = bad
    torch.testing.assert_close(
        clip_grad_norm_(grads, 1.0), ops.clip_grad_norm_.on("reference")(reference, 1.0), equal_nan=True
    )
    for a, b in zip(grads, reference, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_gradients_within_the_limit_are_not_written(check):
    grads = [torch.full((10,), 1e10), torch.zeros(0)]
    norm = clip_grad_norm_(grads, math.inf)
    assert math.isclose(norm.item(), 1e10 * math.sqrt(10), rel_tol=1e-6)
    assert (grads[0] == 1e10).all()


@pytest.mark.parametrize(("change", "message"), [
    (lambda x: x[1].pop(), "alike in length and shapes"),
    (lambda x: x[2].__setitem__(0, torch.zeros(4)), "alike in length and shapes"),
    (lambda x: x[3].__setitem__(0, x[3][0].bfloat16()), "in dtypes"),
    (lambda x: x[1].__setitem__(0, x[1][0].double()), "adamw_ on cuda takes float32, float16 and bfloat16, not torch.float64"),
    (lambda x: x[0].__setitem__(1, x[0][1].to("meta")), "a tensor is on meta, not on cpu"),
])  # fmt: skip
def test_lists_that_do_not_fit_are_refused(check, change, message):
    given = lists([5, 6])
    change(given)
    before = given[0][0].clone()
    with pytest.raises(ValueError, match=message):
        adamw_(*given, **OPTIONS)
    assert torch.equal(given[0][0], before)


def test_the_module_refuses_what_would_write_out_of_bounds(simt):
    a, n = torch.zeros(4).data_ptr(), torch.zeros(()).data_ptr()
    rest = ([0], [0], [0], 1, 0.1, 0.9, 0.9, 1e-8, 0.0, 1.0, 0)
    with pytest.raises(ValueError, match="not alike in length"):
        simt.cuda_adamw_([a], [a], [a], [], [4], *rest)
    with pytest.raises(ValueError, match="a tensor is null"):
        simt.cuda_adamw_([a], [0], [a], [a], [4], *rest)
    with pytest.raises(ValueError, match="norm is null"):
        simt.cuda_clip_grad_norm_([a], [4], [0], 1.0, 0, n, 0)
    with pytest.raises(ValueError, match="workspace is null"):
        simt.cuda_clip_grad_norm_([a], [4], [0], 1.0, n, 0, 0)
