"""Kernels as nvcc emits them, inline assembly included, run by the interpreter of PTX: against the oracle and the host's execution.

Launchers, tensors and cases are those of the simulation; only the launches run elsewhere (ptx/device.py).
"""

import re
from collections import Counter
from functools import cache

import pytest
import simulation
import test_simt
import torch
from edge_cases import adamw, attention, decode, gelu, losses, tensors
from ptx import device, parse
from test_kernels import OPS, served
from test_simt import (  # noqa: F401 (they run here too, with the fixtures below)
    test_atomics_of_many_blocks_add_up,
    test_copies_arrive_group_by_group_and_zeros_where_not_valid,
    test_ldmatrix_hands_out_matrices_as_the_manual_draws_them,
    test_mma_multiplies_fragments_as_the_manual_lays_them_out,
    test_numbers_are_rounded_as_pytorch_rounds_them,
    test_powers_of_two,
    test_shuffles,
    test_threads_and_blocks_have_their_coordinates,
    test_vectors_are_stored_whole,
    test_what_is_right_passes,
)

from tinygpt_kernels import parity
from tinygpt_kernels.cases import Case
from tinygpt_kernels.dispatch import all_ops

pytestmark = pytest.mark.skipif(not device.nvcc(), reason="there is no nvcc")
# What nvcc emits for the two differs in little: the older one is among the slow tests.
ARCHITECTURES = pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=[pytest.mark.slow] * (a != 90)) for a in device.ARCHITECTURES]
)
# What the host's execution may differ by, in the 2-norm: sums in another order, exp2 rounded otherwise, one cast at the end.
CLOSE = {torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}


@pytest.fixture(scope="module")
def module():
    return simulation.build()


@pytest.fixture(
    params=[pytest.param(a, marks=[pytest.mark.slow] * (a != 90), id=f"compute_{a}") for a in device.ARCHITECTURES]
)
def simt(module, request):
    """In place of the simulation, for the tests of the wrappers."""
    with device.interpreted(module, device.library(request.param)) as found:
        yield found


@pytest.fixture
def mode(simt):
    return "ptx"


# ------------------------------------------------------------------------------------------------------------- kernels


def dropped(T, D, causal):
    def build(draw):
        args, options = attention(T, D, causal)(draw)
        return args, options | {"dropout_p": 0.3, "seed": draw.tensor([0x1234_5678_9ABC])}

    return build


HALVES = torch.float16, torch.bfloat16
FLOATS = torch.float32, *HALVES


def grid():
    """Every kernel with inline assembly, at two sizes: a part of a tile, and several tiles of which the last is a part."""
    yield "attention", HALVES, (
        (f"T{T} D{D}{' dropout' * (build is dropped)}", build(T, D, T == 65))
        for T in (17, 65) for D in (32, 64, 96, 128) for build in (attention, dropped))  # fmt: skip
    yield (
        "gelu",
        FLOATS,
        ((f"{r}x{c} {a}", gelu(r, c, a)) for r, c in ((3, 24), (5, 40), (3, 7), (5, 9)) for a in ("none", "tanh")),
    )
    # One warp, four, sixteen; the gradient in vectors, and one by one.
    yield "cross_entropy", FLOATS, (
        (f"{r}x{c} apart {a}", losses(r, c, a)) for r, c, a in
        ((3, 9, 0), (2, 65, 1), (2, 1025, 0), (2, 1100, 1), (1, 8200, 0), (2, 8201, 0)))  # fmt: skip
    yield "decode_attention", HALVES, (
        (f"S{S} H{H} D{D} {view}", decode(S, H, 2, D, [S, S // 2], view))
        for S in (17, 40) for D in (32, 64, 128) for H, view in ((4, None), (2, None), (2, "misaligned")))  # fmt: skip
    lists = [
        ("few", tensors([8, 3, 2100])),
        ("few more", tensors([64, 1])),
        ("many", tensors([5, 8] * 100)),
        ("many more", tensors([4] * 220)),
    ]
    yield "adamw_", (torch.float32,), ((name, adamw(make)) for name, make in lists)
    yield (
        "clip_grad_norm_",
        (torch.float32,),
        ((name, lambda draw, make=make: ((make(draw), 0.1), {})) for name, make in lists),
    )


GRID = [
    pytest.param(Case(op, f"ptx {name}", build, op not in ("decode_attention", "adamw_", "clip_grad_norm_")), dtype,
                 id=f"{op} {name}-{str(dtype)[6:]}", marks=[pytest.mark.slow] * (dtype == torch.float16))
    for op, dtypes, cases in grid() for name, build in cases for dtype in dtypes
]  # fmt: skip


@cache
def elements(case):
    args, _ = case.build()
    return sum(t.numel() for a in args for t in (a if isinstance(a, list) else [a]) if torch.is_tensor(t))


def others():
    """Every op in every dtype, with assembly or without, at its smallest; more of its small cases are slow."""
    found = list(served())
    # dict and not set: of cases of one size, the same come first in every process.
    cases = {op: sorted(dict.fromkeys(p.values[0] for p in found if p.values[0].op == op), key=elements) for op in OPS}
    cases = {op: [case for case in some if elements(case)][:8] for op, some in cases.items()}
    for p in found:
        case, dtype = p.values
        if case in cases[case.op]:
            yield pytest.param(case, dtype, id=p.id, marks=[pytest.mark.slow] * (case is not cases[case.op][0]))


def run(module, case, dtype, kernels):
    """The results of a case on the interpreter, and the kernels that were launched."""
    with device.interpreted(module, kernels) as interpreted, simulation.simulated(interpreted, "fast"):
        return parity.results(case, simulation.run_on(case.op), dtype), interpreted.launched


def wrong(case, dtype, results):
    return [str(error) for error in parity.compare(case, results, dtype) if not error.ok]


def insist(module, case, dtype, architecture):
    ours, launched = run(module, case, dtype, device.library(architecture))
    assert launched
    assert not wrong(case, dtype, ours)
    with simulation.simulated(module, "fast"):
        theirs = parity.results(case, simulation.run_on(case.op), dtype)
    if all_ops()[case.op].in_place:  # of three numbers one that is rounded the other way is half of all there is
        ours, theirs = ({"all": torch.cat([x.flatten() for x in found.values()])} for found in (ours, theirs))
    for name, x in ours.items():
        distance = (x - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-30)
        assert distance <= CLOSE[dtype], f"{name}: {distance} from the host's execution"


@ARCHITECTURES
@pytest.mark.parametrize(("case", "dtype"), GRID)
def test_kernels_with_inline_assembly_as_nvcc_emits_them(module, case, dtype, architecture):
    insist(module, case, dtype, architecture)


@ARCHITECTURES
@pytest.mark.parametrize(("case", "dtype"), list(others()))
def test_every_op_as_nvcc_emits_it(module, case, dtype, architecture):
    insist(module, case, dtype, architecture)


def assembly():
    """The opcodes of simt.cuh's inline assembly."""
    text = (device.ROOT / "csrc/cuda/simt.cuh").read_text()
    found = set(re.findall(r'\basm\s*(?:volatile\s*)?\(\s*"([\w.:]+)', text))
    assert len(found) >= 8
    return found


def holds(kernel):
    """The opcodes of a kernel's inline assembly, as far as it is written without braces: not that of NVIDIA's headers."""
    return set(re.findall(r"// begin inline asm\n\s*([\w.:]+)", kernel.body))


@ARCHITECTURES
def test_every_kernel_with_inline_assembly_ran_at_two_sizes(module, architecture):
    """The launches of GRID are listed here without running them."""
    kernels, ran = device.library(architecture), Counter()
    for p in GRID:
        case, dtype = p.values
        with (
            device.interpreted(module, kernels, only_names=True) as interpreted,
            simulation.simulated(interpreted, "fast"),
        ):
            parity.results(case, simulation.run_on(case.op), dtype)
        ran.update(set(interpreted.launched))
    with_assembly = {name for name, kernel in kernels.items() if "tinygpt" in name and holds(kernel) & assembly()}
    assert len(with_assembly) >= 48
    assert {name for name in with_assembly if ran[name] < 2} == set()


def test_the_kernels_of_the_wrappers_hold_all_assembly_there_is():
    kernels = device.library(80)
    found = set().union(*(holds(kernel) for name, kernel in kernels.items() if "tinygpt" not in name))
    assert assembly() - found == set()


# ----------------------------------------------------------------------------------------------------- what must not pass

REFUSED = {
    "divergent": "thread 0: .*shfl.*lanes of the mask are elsewhere",
    "exited": "shfl.*lanes of the mask are elsewhere, or have exited",
    "not_in_mask": "thread 16: .*its lane is not in the mask",
    "barrier_and_shuffle": "thread 32: .*lanes of the mask are elsewhere",
    "too_much_shared": "writes 4 bytes outside of every array and tensor",
    "misaligned_copy": "thread 0: .*cp.async reads at an address that is no multiple of 16",
    "misaligned_matrix": "ldmatrix.*reads 16 bytes at an address that is no multiple of 16",
    "writes_input": "thread 0: .*writes to what is only read",
    "past_the_end": "thread 63: .*reads 4 bytes outside",
    "past_shared": "thread 63: .*writes 4 bytes outside",
    "between_elements": "thread 0: .*writes 4 bytes outside",
    "never_waits": "ends with a cp.async that it never waited for",
}


@pytest.mark.parametrize("kernel", REFUSED)
def test_what_no_gpu_could_do_is_told_with_its_thread_and_line(simt, mode, kernel):
    with pytest.raises(parse.PtxError, match=REFUSED[kernel]) as told:
        test_simt.attempt(simt, kernel)
    assert re.match(
        rf"{kernel}: .*{kernel}\(.*\): block \(0, 0, 0\), thread \d+: line \d+ of the PTX: `", str(told.value)
    )


def test_a_copy_has_not_arrived_before_the_wait(simt, mode):
    assert test_simt.attempt(simt, "before_the_wait")[1][:64].isnan().all()
