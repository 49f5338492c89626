"""On a GPU: every op on every backend that serves it there, against PyTorch's own, behind the gate of measure.py: right first.

    pytest -m gpu tests benchmarks -s

Prints per op, size and backend the ratio to PyTorch's op (above 1 is faster), and how near it is to what the GPU can do: the rate of
its own large matrix products for attention, of a copy for the rest. Times are medians of interleaved rounds by CUDA events.
"""

import pytest
import torch

from tinygpt_kernels import measure
from tinygpt_kernels.dispatch import all_ops, known_backends
from tinygpt_kernels.workloads import workload

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
BF16 = torch.bfloat16
SHAPES = {
    "attention_qkv": ("B=64,H=4,T=64,D=32", "B=64,H=6,T=256,D=64", "B=8,H=12,T=1024,D=64", "B=4,H=16,T=2048,D=64",
                      "B=4,H=8,T=2048,D=128", "B=8,H=12,T=1024,D=64,causal=0"),
    "layer_norm": ("R=16384,C=384,bias=1", "R=8192,C=768,bias=1", "R=8192,C=1024,bias=1", "R=4096,C=4096,bias=1"),
    "add_layer_norm": ("R=8192,C=768,bias=1",),
    "gelu": ("R=8192,C=3072,bias=1",),
    "cross_entropy": ("R=16384,V=65", "R=4096,V=50257", "R=4096,V=50304"),
    "embedding": ("B=16,T=1024,V=50304,C=768",),
    "linear_cross_entropy": ("R=8192,C=768,V=50304",),
    "decode_attention": ("B=1,H=12,S=1024,D=64", "B=32,H=12,K=4,S=4096,D=128"),
    "adamw_": ("L=12,C=768,V=50304,T=1024",),
    "clip_grad_norm_": ("L=12,C=768,V=50304,T=1024",),
}  # fmt: skip


@pytest.mark.parametrize("asked", [workload(op, shape) for op, shapes in SHAPES.items() for shape in shapes], ids=str)
def test_speed(asked, benchmark):
    served = [b for b in known_backends() if b != "reference" and measure.refusal(asked, b, BF16, "cuda") is None]
    found = measure.measure(asked, served, BF16, "cuda", rounds=12)
    assert not found.wrong
    what = "large products" if found.work.unit == "FLOP" else "copy"
    for pass_, times in found.seconds.items():
        for backend in times:
            share = found.rate(pass_, backend) / found.ceiling(pass_)
            ratio = found.ratio(pass_, backend)
            print(
                f"\n{asked} {pass_} {backend}: x{ratio:.2f} of torch, {100 * share:.0f}% of the GPU's {what} rate",
                end="",
            )
            benchmark.extra_info[f"{backend} {pass_}"] = ratio
    run = measure.passes(asked, all_ops()[asked.op].on(served[-1]), BF16, "cuda")[measure.BOTH]
    benchmark(lambda: (run(), torch.cuda.synchronize()))
