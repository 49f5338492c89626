"""One training step of the char-cpu preset: a plain PyTorch GPT, and tinygpt on each backend.

    pytest benchmarks/bench_training_step.py --benchmark-only -s

All take the same batches; ratios are to the plain model (above 1 is faster). The share of this machine's own large matrix
product rate stands beside, since that is the ceiling.
"""

import torch
from peers.plain_gpt import PlainGPT, plain_optimizer, plain_step
from timing import interleaved, median, ratio

from tinygpt.config import OptimConfig, preset
from tinygpt.models.gpt import GPT
from tinygpt.optim import AdamW
from tinygpt.training.machine import matmul_rate
from tinygpt_kernels import bind

BACKENDS = ("auto", "torch", "cpp")


def test_step(benchmark):
    config, vocab = preset("char-cpu"), 80
    m, t = config.model, config.training
    x, y = torch.randint(vocab, (t.batch_size, m.block_size)), torch.randint(vocab, (t.batch_size, m.block_size))

    plain = PlainGPT(vocab, m.layers, m.heads, m.width, m.block_size)
    optimizer = plain_optimizer(plain)
    candidates = {"plain": lambda: plain_step(plain, optimizer, x, y, 1e-3).item()}
    for backend in BACKENDS:
        kernels = bind(backend)
        model = GPT(m, vocab, kernels)
        own = AdamW(model.named_parameters(), OptimConfig(), kernels)

        def step(model=model, own=own):
            own.zero_grad()
            loss = model(x, y)
            loss.backward()
            own.clip()
            own.step(1e-3)
            return loss.item()

        candidates[backend] = step
    times = interleaved(candidates, rounds=60, seconds=0.05)
    rate = matmul_rate(torch.device("cpu"), torch.float32)
    flop = model.flops_per_token() * x.numel()
    print()
    for name, found in times.items():
        share = flop / median(found) / rate
        print(
            f"{name:>6}: x{ratio(times['plain'], found):.2f} of plain, {100 * share:.0f}% of {rate / 1e9:.0f} GFLOP/s"
        )
    benchmark(candidates["auto"])
    benchmark.extra_info.update({name: ratio(times["plain"], found) for name, found in times.items()})
    assert ratio(times["plain"], times["auto"]) >= 1.0
