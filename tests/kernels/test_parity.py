"""Every op, on every backend that serves it here, in every dtype, for every case: as close to float64 as PyTorch's own op."""

import pytest
import torch

from tinygpt_kernels import dispatch, parity
from tinygpt_kernels.autograd import eager, reference_pair
from tinygpt_kernels.cases import CASES, cases
from tinygpt_kernels.dispatch import all_ops, known_backends
from tinygpt_kernels.op import BoundOp

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def served():
    for case in CASES:
        for backend in known_backends():
            for dtype in DTYPES:
                if dispatch.reason(backend, parity.call_of(all_ops()[case.op], case, dtype)) is None:
                    yield pytest.param(case, backend, dtype, id=f"{case.op}-{case.name}-{backend}-{str(dtype)[6:]}")


@pytest.mark.parametrize(("case", "backend", "dtype"), list(served()))
def test_parity(case, backend, dtype):
    parity.check(case, backend, dtype)


def test_every_op_has_cases_and_backends_to_run_them():
    assert {case.op for case in CASES} == set(all_ops())
    assert {"reference", "torch", "triton", "cpp"} <= {p.values[1] for p in served() if p.values[0].op == "layer_norm"}


@pytest.mark.parametrize("case", [c for c in CASES if c.op == "layer_norm"], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_backward_accepts_what_any_forward_saved(case, dtype):
    op = all_ops()["layer_norm"]
    args, kwargs = case.build(dtype)
    flat = op.flatten(*args, **kwargs)
    call = parity.call_of(op, case, dtype)
    here = [b for b in known_backends() if dispatch.reason(b, call) is None]
    pairs = {
        b: (dispatch.impls[op.name, b].fwd, dispatch.impls[op.name, b].bwd)
        for b in here
        if dispatch.impls[op.name, b].fwd
    }
    pairs["reference"] = reference_pair(op)
    assert {"cpp", "triton", "reference"} <= pairs.keys()
    dy = torch.randn(flat[0].shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    saved = {backend: fwd(*flat)[1:] for backend, (fwd, _) in pairs.items()}
    needs = (True, True, flat[2] is not None)
    truth = pairs["reference"][1](dy.double(), *(None if t is None else t.double() for t in flat[:3]),
                                  *(s.double() for s in saved["reference"]), flat[3], needs=needs)  # fmt: skip
    floor = parity.FLOORS[dtype]
    # A row of one has no gradient: what rounding leaves of it is measured by the terms that cancel.
    terms = (dy.double() * flat[1].double()).norm() * saved["reference"][1].double().max() if flat[0].numel() else 1.0
    for forward, (mean, rstd) in saved.items():
        for backward, (_, bwd) in pairs.items():
            for ours, exact in zip(bwd(dy, *flat[:3], mean, rstd, flat[3], needs=needs), truth, strict=True):
                if exact is not None and exact.numel():
                    distance = (ours.double() - exact).norm() / (exact.norm() if exact.any() else terms)
                    assert distance < 4 * floor, f"{forward} forward, {backward} backward: {distance:.2g}"


@pytest.mark.parametrize("op", [name for name, op in all_ops().items() if not op.in_place])
def test_the_reference_differentiates_as_finite_differences_do(op):
    # kink-free double-precision cases of this op; every option is small enough to be perturbed element by element
    case = min((c for c in cases(op) if c.differentiable and c.name not in ("1x1", "causal 1x1", "no rows")),
               key=lambda c: sum(a.numel() for a in c.build()[0] if isinstance(a, torch.Tensor)), default=None)  # fmt: skip
    if op == "decode_attention":
        case = cases(op)[0]
    args, kwargs = case.build(torch.float64)
    args = tuple(
        a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    )
    reference = all_ops()[op].on("reference")
    assert torch.autograd.gradcheck(lambda *a: reference(*a, **kwargs), args, fast_mode=True)


@pytest.mark.parametrize("backend", ["torch", "cpp", "triton", "reference"])
def test_the_same_call_gives_the_same_bits_twice(backend):
    for case in CASES:
        if dispatch.reason(backend, parity.call_of(all_ops()[case.op], case, torch.float32)) is None:
            once, again = (parity.results(case, all_ops()[case.op].on(backend), torch.float32) for _ in range(2))
            for name in once:
                assert torch.equal(once[name], again[name]), f"{case.op} {case}: {name}"


@pytest.mark.parametrize(("pair", "index", "factor"), [("bwd", 0, 1.001), ("bwd", 1, 1.001), ("fwd", 0, 1.0001)])
def test_the_rule_notices_a_wrong_number(pair, index, factor):
    op = all_ops()["layer_norm"]
    fwd, bwd = reference_pair(op)
    case = cases("layer_norm")[4]

    def off(results):
        return tuple(r * factor if i == index else r for i, r in enumerate(results))

    impl = dispatch.Impl("layer_norm", "wrong", fwd=(lambda *a: off(fwd(*a))) if pair == "fwd" else fwd,
                         bwd=(lambda *a, **k: off(bwd(*a, **k))) if pair == "bwd" else bwd)  # fmt: skip
    bound = BoundOp(op, ("wrong",))
    bound._resolve = lambda *a: eager(op, impl, True)
    with pytest.raises(AssertionError, match="allowed"):
        parity.check(case, bound, torch.float32)
