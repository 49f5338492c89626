"""Backend `cuda`'s kernels, executed on the CPU from the source that nvcc compiles: parity, races, and that the checker bites.

Nothing here names a kernel but the cases that are added: what backend `cuda` registers and has cases for is tested.
"""

import os
from dataclasses import replace
from functools import cache

import pytest
import simulation
import torch
from edge_cases import EXTRA

from tinygpt_kernels import dispatch, parity
from tinygpt_kernels.cases import CASES
from tinygpt_kernels.dispatch import all_ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODES = (("fast", 0), ("seeded", 1), ("seeded", 2), ("seeded", 3), ("check", 4))
dispatch.load_backend("cuda")
OPS = [name for name, backend in dispatch.impls if backend == "cuda"]
DIFFERENTIABLE = [op for op in OPS if dispatch.impls[op, "cuda"].bwd]


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
    """Every case under the checker, which runs in a random order and compares results too; of grids (attention's sizes, long lists)
    only bfloat16 by default. In order, mode fast, among the slow tests; with three more seeds where TINYGPT_EVERY_SEED=1 is set.
    """
    for p in served():
        case, dtype = p.values
        for mode, seed in MODES:
            if mode == "seeded" and not os.environ.get("TINYGPT_EVERY_SEED"):
                continue
            grid = case.name.startswith("cuda T") or case.name.endswith("tensors")
            slow = mode != "check" or (grid and dtype != torch.bfloat16)
            yield pytest.param(case, dtype, mode, seed, id=f"{p.id}-{mode}-{seed}", marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(("case", "dtype", "mode", "seed"), list(runs()))
def test_parity(simt, case, dtype, mode, seed):
    with simulation.simulated(simt, mode, seed) as simulated:
        parity.check(case, simulation.run_on(case.op), dtype)
    assert simulated.launches


SEVERAL_BLOCKS = ("129", "17x65", "2304", "pieces", "one large")


@pytest.mark.parametrize(("case", "dtype"), [p for p in served() if any(words in p.id for words in SEVERAL_BLOCKS)])
def test_the_same_bits_whoever_comes_first(simt, case, dtype):
    found = []
    for seed in (1, 2):
        with simulation.simulated(simt, "seeded", seed):
            found.append(parity.results(case, simulation.run_on(case.op), dtype))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("op", DIFFERENTIABLE)
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
    "rows.cuh": [p for p in served() if p.id == "gelu-cuda 129x16-float32"],
    "cross_entropy.cu": [p for p in served() if p.id == "cross_entropy-cuda 3x2051 smoothed-float32"],
    "attention.cuh": TILES,
    "attention_fwd.cu": TILES,
    "attention_bwd.cu": TILES,
    "decode_attention.cu": [p for p in served() if p.id == "decode_attention-cuda S300 H2 K2 D32-bfloat16"],
    "optimizer.cu": [p for p in served() if p.id == "clip_grad_norm_-cuda pieces-float32"],
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
            named = {"embedding": "cuda 2x17 V5 C8 None"}.get(
                op, "17"
            )  # of embedding's, one that reads the tables' last rows
            cases = [p.values for p in served() if p.values[0].op == op and p.values[1] == dtype]
            yield pytest.param(*next((c for c in cases if named in c[0].name), cases[0]), id=f"{op}-{str(dtype)[6:]}")


@pytest.mark.parametrize(("case", "dtype"), list(launches()))
def test_a_tensor_one_element_short_and_an_input_never_written_are_told(simt, case, dtype):
    run, op = simulation.run_on(case.op), all_ops()[case.op]

    def attempt(which, where, *, backward):
        """(what was told, which of the tensors are read: for each launch)"""
        args, kwargs = case.build(dtype, "cpu")
        flat = [
            t.requires_grad_() if torch.is_tensor(t) and t.is_floating_point() else t
            for t in op.flatten(*args, **kwargs)
        ]
        named = dict(zip(op.order, flat, strict=True))
        with simulation.simulated(simt, "check", 1) as simulated:
            try:
                if backward:
                    outputs = run(**named)
                    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                simulated.taken.clear()
                setattr(simulated, which, where)
                if backward:
                    leaves = [t for t in flat if torch.is_tensor(t) and t.requires_grad]
                    torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
                else:
                    run(**named)
            except RuntimeError as error:
                return str(error), simulated.taken
            return None, simulated.taken

    for backward in (False, True) if case.op in DIFFERENTIABLE else (False,):
        _, launches = attempt("short", None, backward=backward)
        assert launches
        for where in ((i, number) for i, read in enumerate(launches) for number in range(len(read))):
            told, _ = attempt("short", where, backward=backward)
            assert told, f"tensor {where[1]} of launch {where[0]} one element short: nobody noticed"
            # The last two where another tensor of the launch lies in the same memory: that one is not written, or only read.
            assert any(words in told for words in ("no tensor of the call lies", "past the end", "beside",
                                                   "nobody has written", "which is only read"))  # fmt: skip
            told, _ = attempt("unwritten", where, backward=backward)
            if launches[where[0]][where[1]]:
                assert told, f"tensor {where[1]} of launch {where[0]} never written: nobody noticed"
                assert f"reads what nobody has written, in tensor {where[1]}" in told
