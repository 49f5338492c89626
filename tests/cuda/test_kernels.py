"""Backend `cuda`'s kernels, executed on the CPU from the source that nvcc compiles: parity, races, and that the checker bites.

Nothing here names a kernel but the cases that are added: what backend `cuda` registers and has cases for is tested.
"""

import os
from dataclasses import replace
from functools import cache

import pytest
import simulation
import torch

from tinygpt_kernels import dispatch, parity
from tinygpt_kernels.cases import CASES, Case
from tinygpt_kernels.dispatch import all_ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODES = (("fast", 0), ("seeded", 1), ("seeded", 2), ("seeded", 3), ("check", 4))
dispatch.load_backend("cuda")
OPS = [name for name, backend in dispatch.impls if backend == "cuda"]


def norm(rows, cols, view=None):
    def build(draw):
        x = draw.normal(rows, cols) if view is None else draw.normal(rows, 2 * cols)[:, cols:]
        return (x, draw.normal(cols) + 1, draw.normal(cols)), {}

    return build


def add_norm(rows, cols):
    return lambda draw: (
        (draw.normal(rows, cols), draw.normal(rows, cols), draw.normal(cols) + 1, draw.normal(cols)),
        {},
    )


def attention(T, D, causal):
    """Grouped heads, as views of packed tensors: no two strides alike.

    One query sees 17 keys: of one key it would have no gradient, and what rounding leaves of that is measured against nothing.
    """

    def build(draw):
        q = draw.normal(1, T, 3, D)[:, :, :2]
        k, v = draw.normal(1, 17 if T == 1 else T, 2, D).split(1, dim=2)
        return (q, k, v), {"causal": causal}

    return build


def attention_qkv(T, D, causal):
    return lambda draw: ((draw.normal(1, T, 4, D), 2, 1), {"causal": causal})


# Around a thread's, a warp's and a block's share of a row, beyond what registers hold, more rows than blocks, rows apart.
EXTRA = [
    *(Case("layer_norm", f"cuda {r}x{c}", norm(r, c)) for r, c in
      ((3, 7), (5, 32), (4, 255), (2, 1024), (3, 1032), (2, 2056), (1, 4100), (600, 48), (2, 20000))),
    Case("layer_norm", "cuda 17x64 rows apart", norm(17, 64, "rows apart")),
    *(Case("add_layer_norm", f"cuda {r}x{c}", add_norm(r, c)) for r, c in ((5, 96), (2, 1500), (2, 2304))),
    Case("attention", "cuda D64 negative scale", lambda draw: (attention(65, 64, True)(draw)[0], {"causal": True, "scale": -0.2})),
    # Around a tile's edges, one tile and several, every head dimension that is compiled.
    *(Case(op, f"cuda T{T} D{D} {'causal' if causal else 'full'}", build(T, D, causal))
      for op, build in (("attention", attention), ("attention_qkv", attention_qkv))
      for T in (1, 17, 63, 64, 65, 129, 200) for D in (32, 64, 96, 128) for causal in (True, False)),
]  # fmt: skip


@cache
def served():
    """Every case that backend `cuda` serves, in every dtype. (Asking takes a build of the case each time: once is enough.)"""
    return list(_served())


def _served():
    for case in (*CASES, *EXTRA):
        if case.op not in OPS:
            continue
        for dtype in DTYPES:
            call = replace(parity.call_of(all_ops()[case.op], case, dtype), device="cuda:0", sm=80)
            if dispatch.reason("cuda", call, anywhere=True) is None:
                yield pytest.param(case, dtype, id=f"{case.op}-{case.name}-{str(dtype)[6:]}")


def runs():
    """Every case in every mode; of the grid of attention's sizes bfloat16 under the checker, and the rest among the slow tests.

    Of the three seeds a case of the grid takes one, in turn; all with TINYGPT_EVERY_SEED=1 in the environment.
    """
    for i, p in enumerate(served()):
        case, dtype = p.values
        for mode, seed in MODES:
            grid = case.name.startswith("cuda T")
            if grid and mode == "seeded" and seed != 1 + i % 3 and not os.environ.get("TINYGPT_EVERY_SEED"):
                continue
            slow = grid and (mode != "check" or dtype != torch.bfloat16)
            yield pytest.param(case, dtype, mode, seed, id=f"{p.id}-{mode}-{seed}", marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(("case", "dtype", "mode", "seed"), list(runs()))
def test_parity(simt, case, dtype, mode, seed):
    with simulation.simulated(simt, mode, seed) as simulated:
        parity.check(case, simulation.run_on(case.op), dtype)
    assert simulated.launches


@pytest.mark.parametrize(("case", "dtype"), [p for p in served() if "129" in p.id or "17x65" in p.id or "2304" in p.id])
def test_the_same_bits_whoever_comes_first(simt, case, dtype):
    found = []
    for seed in (1, 2):
        with simulation.simulated(simt, "seeded", seed):
            found.append(parity.results(case, simulation.run_on(case.op), dtype))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("op", OPS)
def test_a_backward_takes_what_another_backends_forward_saved(simt, op):
    case = next(p.values[0] for p in served() if p.values[0].op == op and "17" in p.id)
    flat = all_ops()[op].flatten(*(built := case.build(torch.float32))[0], **built[1])
    tensors, outputs = all_ops()[op].tensors, all_ops()[op].outputs
    needs = tuple(torch.is_tensor(t) and t.is_floating_point() for t in flat[:tensors])
    found = {}
    for forward in ("cpp", "cuda"):
        with simulation.simulated(simt, "fast"):
            results = dispatch.impls[op, forward].fwd(*flat)
            kept = results if all_ops()[op].saves_outputs else results[outputs:]
            upstream = [torch.ones_like(r) for r in results[:outputs]]
            found[forward] = dispatch.impls[op, "cuda"].bwd(
                *upstream, *flat[:tensors], *kept, *flat[tensors:], needs=needs
            )
    for ours, theirs in zip(found["cuda"], found["cpp"], strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- that the checker bites

# For each file with barriers, cases that pass every one of them.
TILES = [
    p
    for p in served()
    if p.id
    in (
        "attention-cuda T200 D64 causal-bfloat16",
        "attention-cuda T200 D64 full-float32",
        "attention-cuda D64 negative scale-bfloat16",
    )
]
EXPOSING = {
    "layer_norm.cu": [
        p for p in served() if p.id in ("layer_norm-cuda 600x48-float32", "layer_norm-cuda 1x4100-float32")
    ],
    "attention.cuh": TILES,
    "attention_fwd.cu": TILES,
    "attention_bwd.cu": TILES,
}


def wrong(simt, mode, seed, cases, off=()):
    """What goes wrong with the first of these cases that does not pass; None when all do."""
    for case, dtype in cases:
        with simulation.simulated(simt, mode, seed):
            simt.switch_off(list(off))
            try:
                parity.check(case, simulation.run_on(case.op), dtype)
            except (RuntimeError, AssertionError) as error:
                return str(error)
    return None


@pytest.mark.parametrize(
    "place", [pytest.param(p, marks=[pytest.mark.slow] * p.startswith("attention")) for p in simulation.waits()]
)
def test_every_barrier_wait_and_atomic_is_needed_and_missed(simt, place):
    cases = [p.values for p in EXPOSING[place.split(":")[0]]]
    assert wrong(simt, "check", 1, cases) is None
    assert wrong(simt, "check", 1, cases, [place]), f"{place} switched off changes nothing: it is redundant"


def launches():
    """One small case for each op, in two dtypes: attention has kernels of their own for each."""
    for op in OPS:
        for dtype in (torch.float32, torch.bfloat16):
            case = next(p.values for p in served() if p.values[0].op == op and p.values[1] == dtype and "17" in p.id)
            yield pytest.param(*case, id=f"{op}-{str(dtype)[6:]}")


@pytest.mark.parametrize(("case", "dtype"), list(launches()))
def test_a_tensor_one_element_short_and_an_input_never_written_are_told(simt, case, dtype):
    run, op = simulation.run_on(case.op), all_ops()[case.op]
    args, kwargs = case.build(dtype, "cpu")
    flat = [
        t.requires_grad_() if torch.is_tensor(t) and t.is_floating_point() else t for t in op.flatten(*args, **kwargs)
    ]
    named, leaves = dict(zip(op.order, flat, strict=True)), [t for t in flat if torch.is_tensor(t) and t.requires_grad]

    def attempt(which, number, *, backward):
        """(what was told, which of the launch's tensors are written)"""
        with simulation.simulated(simt, "check", 1) as simulated:
            try:
                if backward:
                    outputs = run(**named)
                    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                setattr(simulated, which, number)
                if backward:
                    torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
                else:
                    run(**named)
            except RuntimeError as error:
                return str(error), simulated.views()
            return None, simulated.views()

    for backward in (False, True):
        _, written = attempt("short", None, backward=backward)
        assert len(written) > 2
        for number, is_written in enumerate(written):
            told, _ = attempt("short", number, backward=backward)
            assert told, f"tensor {number} one element short: nobody noticed"
            assert any(words in told for words in ("no tensor of the call lies", "past the end", "beside"))
            told, _ = attempt("unwritten", number, backward=backward)
            if not is_written:
                assert told, f"tensor {number} never written: nobody noticed"
                assert f"reads what nobody has written, in tensor {number}" in told
