"""Every op on every backend that serves it here, beside the usual PyTorch code, behind the parity gate.

    pytest benchmarks/bench_ops.py                       one line for each op, size and backend
    pytest benchmarks/bench_ops.py --benchmark-save=before;  ... --benchmark-compare=before
    python benchmarks/report.py --only ops               the table of ratios

pytest-benchmark's own figures are of the op as a model calls it, forward and backward; `extra_info` holds the ratios to the plain
code from interleaved rounds, which is what to trust: the machine drifts, candidates that take turns drift together.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from peers import plain_ops

from tinygpt_kernels import dispatch, measure, workloads
from tinygpt_kernels.dispatch import all_ops
from tinygpt_kernels.measure import BOTH, FORWARD, KERNELS, Measurement
from tinygpt_kernels.workloads import Workload, workload

ATTENTION = ((12, 4, 64, 32), (8, 6, 256, 64), (2, 8, 512, 64), (1, 12, 1024, 64), (1, 4, 2048, 128))
NORMS = tuple((R, C) for C in (128, 384, 768, 1024) for R in (768, 2048))
SHAPES: dict[str, tuple[str, ...]] = {
    "attention": tuple(f"B={B},H={H},T={T},D={D}" for B, H, T, D in ATTENTION),
    "attention_qkv": tuple(f"B={B},H={H},T={T},D={D}" for B, H, T, D in ATTENTION),
    "layer_norm": tuple(f"R={R},C={C}" for R, C in NORMS),
    "add_layer_norm": tuple(f"R={R},C={C}" for R, C in NORMS),
    "gelu": ("R=768,C=512", "R=2048,C=1536", "R=2048,C=3072", "R=768,C=512,bias=1", "R=2048,C=1536,tanh=1"),
    "cross_entropy": ("R=768,V=65", "R=2048,V=65", "R=512,V=50304"),
    "linear_cross_entropy": ("R=768,C=128,V=65", "R=2048,C=384,V=65", "R=512,C=384,V=50304"),
    "embedding": ("B=12,T=64,V=65,C=128", "B=8,T=256,V=65,C=384", "B=8,T=256,V=50304,C=384"),
    "decode_attention": ("B=1,H=4,S=64,D=32", "B=1,H=6,S=256,D=64", "B=8,H=12,S=1024,D=64"),
    "adamw_": ("L=4,C=128,V=65,T=64", "L=6,C=384,V=65,T=256"),
    "clip_grad_norm_": ("L=4,C=128,V=65,T=64", "L=6,C=384,V=65,T=256"),
}
WORKLOADS = tuple(workload(op, shape) for op, shapes in SHAPES.items() for shape in shapes)
PLAIN = "plain"


def backends(op: str) -> tuple[str, ...]:
    """Those that serve an op on this machine's CPU at full speed: not the reference, nothing interpreted."""
    found = []
    for name in dispatch.known_backends():
        if name not in ("reference", "triton") and measure.refusal(
                workloads.default_workloads(op)[0], name, torch.float32, "cpu") is None:  # fmt: skip
            found.append(name)
    return tuple(found)


@lru_cache(maxsize=4)
def measured(workload: Workload, dtype: torch.dtype = torch.float32, budget: float = 5.0) -> Measurement:
    """All backends and the plain code on one workload."""
    pair = plain_ops.pair(workload, dtype)
    plain_ops._optimizers.clear()
    return measure.measure(
        workload, backends(workload.op), dtype, others={PLAIN: plain_ops.OPS[workload.op]},
        pairs={PLAIN: pair} if pair else {}, budget=budget,
    )  # fmt: skip


def ratios(m: Measurement, backend: str) -> dict[str, float]:
    """Pass -> how many times faster than the plain code."""
    found = {
        pass_: m.ratio(pass_, backend, PLAIN)
        for pass_ in (FORWARD, BOTH, KERNELS)
        if backend in m.seconds.get(pass_, ())
    }
    return {pass_: ratio for pass_, ratio in found.items() if ratio is not None}


@pytest.mark.parametrize(
    ("workload", "backend"),
    [pytest.param(w, b, id=f"{w}-{b}") for w in WORKLOADS for b in backends(w.op)],
)
def test_op(workload, backend, benchmark):
    m = measured(workload)
    assert not m.wrong
    runs = measure.passes(workload, all_ops()[workload.op].on(backend), torch.float32, "cpu")
    pass_ = BOTH if BOTH in runs else FORWARD
    calls = max(1, round(0.01 / min(m.seconds[pass_][backend])))
    benchmark.pedantic(runs[pass_], rounds=10, iterations=calls, warmup_rounds=1)
    for name, ratio in ratios(m, backend).items():
        benchmark.extra_info[f"{name}, x plain"] = round(ratio, 3)
    benchmark.extra_info[f"G{m.work.unit}/s"] = round(m.rate(pass_, backend) / 1e9, 2)
    benchmark.extra_info["share of ceiling"] = round(m.rate(pass_, backend) / m.ceiling(pass_), 3)
