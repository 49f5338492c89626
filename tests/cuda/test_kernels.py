"""Backend `cuda`'s kernels, executed on the CPU from the source that nvcc compiles: parity, races, and that the checker bites.

Nothing here names a kernel but the cases that are added: what backend `cuda` registers and has cases for is tested.
"""

import os
from dataclasses import replace

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
DIFFERENTIABLE = [op for op in OPS if dispatch.impls[op, "cuda"].bwd]


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


def decode(S, H, K, D, lengths, view=None, **options):
    """View "layer": of a cache of all layers, whose rows lie apart; "misaligned": no row begins at a multiple of 16 bytes."""

    def build(draw):
        B = len(lengths)
        if view == "layer":
            k, v = draw.normal(B, S, 3, 2, K, D)[:, :, 1].unbind(2)
        elif view == "misaligned":
            k, v = (draw.normal(B, S, K, D + 1)[..., 1:] for _ in range(2))
        elif view == "heads first":
            k, v = (draw.normal(B, K, S, D).transpose(1, 2) for _ in range(2))
        else:
            k, v = draw.normal(B, S, K, D), draw.normal(B, S, K, D)
        return (draw.normal(B, H, D), k, v, draw.tensor(lengths)), options

    return build


def tensors(sizes, offset=0):
    """What makes a list of tensors, `offset` elements behind the beginning of their memory."""
    return lambda draw, **options: [draw.normal(n + offset, **options)[offset:] for n in sizes]


def adamw(make):
    def build(draw):
        lists = (make(draw), make(draw), make(draw, scale=0.1), [t.abs() + 1e-3 for t in make(draw)])
        return lists, {"step": 3, "lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "grad_scale": 0.5}

    return build


# Around a vector, a piece and a block's share; more tensors than the small table holds, than the large one, and than it holds of
# gradients alone; as the last, one that begins beside a multiple of 16 bytes.
SIZES = {
    "cuda vectors and tails": tensors([1, 7, 0, 8, 9, 64, 1023]),
    "cuda pieces": tensors([2047, 2048, 2049, 4100]),
    "cuda misaligned": tensors([8, 100, 2049], offset=1),
    "cuda one large among small": tensors([3, 20000, 5]),
    "cuda nothing": tensors([0, 0]),
    "cuda 100 tensors": tensors(range(100)),
    "cuda 200 tensors": tensors([5] * 200),
    "cuda 600 tensors": tensors([3] * 600),
    "cuda 1200 tensors": tensors([2] * 1200),
}

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
    # Around a slot's, a step's and a split's share of the keys; every width of a row; a whole group of heads, a part, more than one.
    *(Case("decode_attention", f"cuda S{S} H{H} K{K} D{D}", decode(S, H, K, D, lengths), False) for S, H, K, D, lengths in (
        (129, 2, 2, 16, [129, 0, 1]), (300, 2, 2, 32, [1, 300, 299]), (300, 2, 1, 64, [300, 17, 64]), (200, 8, 2, 64, [200, 65]),
        (150, 6, 1, 96, [129, 150]), (129, 1, 1, 128, [129]), (129, 5, 1, 128, [100]), (40, 3, 1, 80, [40, 900, -3]))),
    Case("decode_attention", "cuda one split", decode(20, 4, 4, 32, [20, 17, 0, 1] * 17), False),
    Case("decode_attention", "cuda no room", decode(0, 2, 2, 32, [0]), False),
    Case("decode_attention", "cuda no rows", decode(9, 2, 2, 32, []), False),
    Case("decode_attention", "cuda D20", decode(70, 4, 2, 20, [70, 33]), False),
    Case("decode_attention", "cuda D7, scaled", decode(70, 2, 2, 7, [70, 33], scale=-0.3), False),
    *(Case("decode_attention", f"cuda {view or '17x65'}", decode(65, 4, 2, 64, [17, 65], view), False)
      for view in (None, "layer", "misaligned", "heads first")),
    *(Case("adamw_", name, adamw(make), False) for name, make in SIZES.items() if "1200" not in name),
    *(Case("clip_grad_norm_", name, lambda draw, make=make: ((make(draw), 0.5), {}), False) for name, make in SIZES.items()),
]  # fmt: skip


def served():
    for case in (*CASES, *EXTRA):
        if case.op not in OPS:
            continue
        for dtype in DTYPES:
            call = replace(parity.call_of(all_ops()[case.op], case, dtype), device="cuda:0", sm=80)
            if dispatch.reason("cuda", call, anywhere=True) is None:
                yield pytest.param(case, dtype, id=f"{case.op}-{case.name}-{str(dtype)[6:]}")


def runs():
    """Every case in every mode; of grids (attention's sizes, long lists) bfloat16 under the checker, and the rest among the slow tests.

    Of the three seeds a case of a grid takes one, in turn; all with TINYGPT_EVERY_SEED=1 in the environment.
    """
    for i, p in enumerate(served()):
        case, dtype = p.values
        for mode, seed in MODES:
            grid = case.name.startswith("cuda T") or case.name.endswith("tensors")
            if grid and mode == "seeded" and seed != 1 + i % 3 and not os.environ.get("TINYGPT_EVERY_SEED"):
                continue
            slow = grid and (mode != "check" or dtype != torch.bfloat16)
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
            cases = [p.values for p in served() if p.values[0].op == op and p.values[1] == dtype]
            yield pytest.param(*next((c for c in cases if "17" in c[0].name), cases[0]), id=f"{op}-{str(dtype)[6:]}")


@pytest.mark.parametrize(("case", "dtype"), list(launches()))
def test_a_tensor_one_element_short_and_an_input_never_written_are_told(simt, case, dtype):
    run, op = simulation.run_on(case.op), all_ops()[case.op]

    def attempt(which, number, *, backward):
        """(what was told, for each of the launch's tensors whether it is read)"""
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
                setattr(simulated, which, number)
                if backward:
                    leaves = [t for t in flat if torch.is_tensor(t) and t.requires_grad]
                    torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
                else:
                    run(**named)
            except RuntimeError as error:
                return str(error), simulated.views()
            return None, simulated.views()

    for backward in (False, True) if case.op in DIFFERENTIABLE else (False,):
        _, read = attempt("short", None, backward=backward)
        assert len(read) > 2
        for number, is_read in enumerate(read):
            told, _ = attempt("short", number, backward=backward)
            assert told, f"tensor {number} one element short: nobody noticed"
            assert any(words in told for words in ("no tensor of the call lies", "past the end", "beside"))
            told, _ = attempt("unwritten", number, backward=backward)
            if is_read:
                assert told, f"tensor {number} never written: nobody noticed"
                assert f"reads what nobody has written, in tensor {number}" in told
