"""What the kernels ask of the memory, counted: no bank of shared memory is asked twice without need, and no sector moved for nothing.

budgets.json holds the counts (that are the same with every compiler) of one call of each kind, under "counts". After a change:
    python tests/cuda/test_counts.py
"""

import json
from functools import cache
from pathlib import Path

import pytest
import simulation
import torch

from tinygpt_kernels import dispatch, parity
from tinygpt_kernels.cases import Case

BUDGET = Path(__file__).with_name("budgets.json")
BF16, F32 = torch.bfloat16, torch.float32


def attention_qkv(T, D, causal=True):
    return lambda draw: ((draw.normal(1, T, 4, D), 2, 1), {"causal": causal})


def norm(rows, cols, *more):
    return lambda draw: (
        (*(draw.normal(rows, cols) for _ in (0, *more)), draw.normal(cols) + 1, draw.normal(cols)),
        {},
    )


def losses(rows, V, C=None):
    def build(draw):
        first = (draw.normal(rows, V),) if C is None else (draw.normal(rows, C), draw.normal(V, C, scale=C**-0.5))
        return (*first, draw.integers(V, rows)), {}

    return build


def embedding(B, T, V, C):
    return lambda draw: ((draw.integers(V, B, T), draw.normal(V, C), draw.normal(T, C)), {})


def decode(B, S, H, K, D):
    def build(draw):
        cache = (draw.normal(B, S, K, D), draw.normal(B, S, K, D))
        return (draw.normal(B, H, D), *cache, draw.tensor([S] * B)), {}

    return build


def lists(op, *shapes):
    def build(draw):
        params, grads = ([draw.normal(*shape) for shape in shapes] for _ in range(2))
        if op == "clip_grad_norm_":
            return (grads, 1.0), {}
        moments = [draw.positive(*shape) for shape in shapes], [draw.positive(*shape) for shape in shapes]
        return (params, grads, *moments), {
            "step": 3, "lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "grad_scale": 1.0}  # fmt: skip

    return build


SHAPES = (768, 256), (768,), (3, 5)
COUNTED = [
    *(Case("attention_qkv", f"T256 D{D}", attention_qkv(256, D)) for D in (32, 64, 96, 128)),
    Case("layer_norm", "64x768", norm(64, 768)),
    Case("layer_norm", "16x4096", norm(16, 4096)),
    Case("add_layer_norm", "64x768", norm(64, 768, 1)),
    Case("gelu", "64x1024 bias", lambda draw: ((draw.normal(64, 1024), draw.normal(1024)), {})),
    Case("cross_entropy", "32x64", losses(32, 64)),
    Case("cross_entropy", "8x50304", losses(8, 50304)),
    Case("cross_entropy", "8x50257", losses(8, 50257)),
    Case("linear_cross_entropy", "64x128x256", losses(64, 256, 128)),
    Case("embedding", "4x64", embedding(4, 64, 65, 768)),
    Case("decode_attention", "2x512 D64", decode(2, 512, 4, 2, 64), differentiable=False),
    Case("adamw_", "three tensors", lists("adamw_", *SHAPES), differentiable=False),
    Case("clip_grad_norm_", "three tensors", lists("clip_grad_norm_", *SHAPES), differentiable=False),
]
CASES = [
    pytest.param(case, dtype, id=f"{case.op} {case.name} {str(dtype)[6:]}") for case in COUNTED for dtype in (BF16, F32)
]

# Why a kernel moves more sectors, or keeps a bank busy for longer, than its bytes need; by kernel and space.
_HALVES = "eight sums of a thread leave and come in two pieces of 16 bytes, each half of a sector; once a block, not once a row"
_BORDERS = "50257 numbers a row: vectors begin at multiples of 16 bytes, but only half of them at sectors"
EXPLAINED = {
    ("layer_norm backward", "global write"): _HALVES,
    ("gelu backward", "global write"): _HALVES,
    ("embedding backward", "global write"): _HALVES,
    ("embedding backward, sums", "global read"): _HALVES,
    ("cross_entropy forward", "global read"): _BORDERS,
    ("cross_entropy backward", "global read"): _BORDERS,
    ("cross_entropy backward", "global write"): _BORDERS,
}


@cache
def count(simt, case, dtype):
    """By kernel, what one forward and backward asked for."""
    dispatch.load_backend("cuda")
    simt.forget_counts()
    with simulation.simulated(simt, "count"):
        parity.check(case, simulation.run_on(case.op), dtype)
    return json.loads(simt.counts())


def kept(counts):
    """What is the same whichever compiler built the simulation: what kernels ask for in words of their own."""
    found = {}
    for kernel, c in counts.items():
        found[kernel] = {
            name: c[name] for name in ("blocks", "barriers", "shuffles", "matrices", "products") if c[name]
        }
        for space in ("global read", "global write", "shared read", "shared write"):
            cost, width = c[space]["sectors" if space[0] == "g" else "turns"], c[space]["by_width"].get("16", 0)
            if c[space]["bytes"]:
                found[kernel][space] = {"16 bytes wide": width, "needless": cost - c[space]["needed"]}
    return found


@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_nothing_is_moved_for_nothing(simt, case, dtype):
    for kernel, c in count(simt, case, dtype).items():
        needless = {}
        for site in c["wasteful"]:
            needless.setdefault(site["space"], []).append(site)
        for space, sites in needless.items():
            assert (kernel, space) in EXPLAINED, f"{kernel}: {space} costs more than it needs, at {sites}"


@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_counts_are_those_of_the_budget(simt, case, dtype, request):
    recorded = json.loads(BUDGET.read_text())["counts"]
    name = f"{case.op} {case.name} {str(dtype)[6:]}"
    assert kept(count(simt, case, dtype)) == recorded[name], (
        "other counts than recorded: record them anew, if for the better"
    )


def test_every_explanation_is_needed(simt):
    found = {(k, s["space"]) for p in CASES for k, c in count(simt, *p.values).items() for s in c["wasteful"]}
    assert set(EXPLAINED) == found


if __name__ == "__main__":
    module = simulation.build()
    counts = {p.id: kept(count(module, *p.values)) for p in CASES}
    BUDGET.write_text(json.dumps(json.loads(BUDGET.read_text()) | {"counts": counts}, indent=1) + "\n")
