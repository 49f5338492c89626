"""On a GPU: every op on every backend that serves it there, forward and backward, against PyTorch's own, behind the parity gate.

    pytest -m gpu tests benchmarks -s

Prints per op, size and backend the ratio to PyTorch's op (above 1 is faster), and how near the kernel is to what the GPU can do: the
rate of its own large matrix products for attention, of a copy for the rest. Times are medians of interleaved rounds by CUDA events.
"""

import statistics

import pytest
import torch

from tinygpt_kernels import dispatch, parity
from tinygpt_kernels.cases import cases
from tinygpt_kernels.dispatch import all_ops, known_backends

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
BF16 = torch.bfloat16


def normal(*shape, dtype=BF16):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def attention(B, T, H, D, causal=True):
    def make():
        return (normal(B, T, 3 * H, D), H, H), {"causal": causal}

    flop = 4 * B * H * T * T * D * (0.5 if causal else 1)
    return make, {"forward": ("flop", flop), "backward": ("flop", 2.5 * flop)}


def moving(make, forward, backward):
    """An op that waits for memory: bytes it must move forward and backward."""
    return make, {"forward": ("bytes", forward), "backward": ("bytes", backward)}


def norm(R, C):
    return moving(lambda: ((normal(R, C), normal(C), normal(C)), {}), 4 * R * C, 6 * R * C)


def losses(R, V):
    return moving(lambda: ((normal(R, V), torch.randint(V, (R,), device="cuda")), {}), 2 * R * V, 4 * R * V)


SIZES = {
    **{f"attention_qkv B{B} T{T} H{H} D{D}": attention(B, T, H, D)
       for B, T, H, D in ((64, 64, 4, 32), (64, 256, 6, 64), (8, 1024, 12, 64), (4, 2048, 16, 64), (4, 2048, 8, 128))},
    "attention_qkv full B8 T1024 H12 D64": attention(8, 1024, 12, 64, causal=False),
    **{f"layer_norm {R}x{C}": norm(R, C) for R, C in ((16384, 384), (8192, 768), (8192, 1024), (4096, 4096))},
    "gelu 8192x3072": moving(lambda: ((normal(8192, 3072),), {}), 4 * 8192 * 3072, 6 * 8192 * 3072),
    **{f"cross_entropy {R}x{V}": losses(R, V) for R, V in ((16384, 65), (4096, 50257), (4096, 50304))},
    "embedding 16x1024 C768": moving(
        lambda: ((torch.randint(50304, (16, 1024), device="cuda"), normal(50304, 768), normal(1024, 768)), {}),
        4 * 16384 * 768, 2 * (16384 + 50304) * 768),
    "linear_cross_entropy 8192x768x50304": (
        lambda: ((normal(8192, 768), normal(50304, 768), torch.randint(50304, (8192,), device="cuda")), {}),
        {"forward": ("flop", 2 * 8192 * 768 * 50304), "backward": ("flop", 6 * 8192 * 768 * 50304)}),
}  # fmt: skip


def interleaved(candidates, rounds=20):
    """Milliseconds of each candidate, one figure per round, candidates in turn."""
    times = {name: [] for name in candidates}
    for run in candidates.values():
        for _ in range(3):
            run()
    for _ in range(rounds):
        for name, run in candidates.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return times


@pytest.fixture(scope="module")
def ceilings():
    """What this GPU does: FLOP/s of a large bfloat16 product, bytes/s read and written by a large copy."""
    a, x = normal(8192, 8192), normal(1 << 28)
    y = torch.empty_like(x)
    times = interleaved({"product": lambda: a @ a, "copy": lambda: y.copy_(x)})
    return {
        "flop": 2 * 8192**3 / statistics.median(times["product"]) * 1e3,
        "bytes": 2 * x.numel() * 2 / statistics.median(times["copy"]) * 1e3,
    }


@pytest.mark.parametrize("name", SIZES)
def test_speed(name, ceilings, benchmark):
    op = all_ops()[name.split()[0]]
    make, work = SIZES[name]
    args, kwargs = make()
    leaves = [a.requires_grad_() for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
    call = op.call(*args, **kwargs)
    served = [b for b in known_backends() if b != "reference" and dispatch.reason(b, call) is None]
    for backend in served:
        for case in cases(op.name)[:8]:
            if dispatch.reason(backend, parity.call_of(op, case, BF16, "cuda")) is None:
                parity.check(case, backend, BF16, "cuda")
    bound = {backend: op.on(backend) for backend in served}
    outputs = {backend: bound[backend](*args, **kwargs) for backend in served}
    upstream = torch.randn_like(outputs["torch"])
    candidates = {}
    for backend in served:
        candidates[backend, "forward"] = lambda b=backend: bound[b](*args, **kwargs)
        candidates[backend, "backward"] = lambda b=backend: torch.autograd.grad(
            outputs[b], leaves, upstream, retain_graph=True
        )
    times = interleaved(candidates)
    for (backend, direction), found in times.items():
        ratio = statistics.median(t / f for t, f in zip(times["torch", direction], found, strict=True))
        kind, amount = work[direction]
        share = amount / statistics.median(found) * 1e3 / ceilings[kind]
        print(
            f"\n{name} {direction} {backend}: x{ratio:.2f} of torch, {100 * share:.0f}% of the GPU's {kind} rate",
            end="",
        )
        benchmark.extra_info[f"{backend} {direction}"] = ratio
    benchmark(lambda: (bound[served[-1]](*args, **kwargs), torch.cuda.synchronize()))
