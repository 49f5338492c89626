"""One training step: tinygpt on each backend, a plain PyTorch GPT eager and compiled, Hugging Face's GPT-2 of the same size.

    pytest benchmarks/bench_training_step.py -s
    python benchmarks/report.py --only steps

All take the same batches in turn in one process, and clip and step with AdamW. Before anything is timed, every model but Hugging
Face's (which has biases) makes a few steps from the same weights, and has to arrive at the plain model's losses. A run in which
the plain model stays below 36 % of the machine's own large matrix product rate is called noisy and repeated, three times at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from peers import huggingface
from peers.plain_gpt import PlainGPT, plain_optimizer, plain_step

from tinygpt.config import ModelConfig, OptimConfig, TrainingConfig
from tinygpt.models.gpt import GPT
from tinygpt.optim import AdamW, LossScale
from tinygpt.training import gradients
from tinygpt_kernels import bind, timing
from tinygpt_kernels.workloads import CHAR_CPU, CHAR_GPU, Shape

Step = Callable[[], float]
CONFIGS: dict[str, tuple[Shape, int]] = {
    "char-cpu": (CHAR_CPU, 100),
    "char-gpu, batch 8": (CHAR_GPU._replace(batch=8), 30),
}
PLAIN, COMPILED, HUGGING_FACE = "plain PyTorch", "plain PyTorch, torch.compile", "Hugging Face GPT-2"
NOISY, ATTEMPTS = 0.36, 3
_LR, _GATE_STEPS, _GATE = 1e-3, 5, 2e-3


@dataclass(frozen=True)
class Steps:
    """What was found for one configuration. seconds: by candidate, one figure per round. shares: the plain model's, each attempt."""

    config: str
    seconds: dict[str, list[float]]
    flop: float
    matmul_rate: float
    shares: list[float] = field(default_factory=list)

    @property
    def noisy(self) -> bool:
        return self.shares[-1] < NOISY

    def share(self, name: str) -> float:
        """Of the machine's large matrix product rate; can pass 1 where the machine's own products are not the best there are."""
        return self.flop / timing.median(self.seconds[name]) / self.matmul_rate

    def ratio(self, name: str, peer: str = PLAIN) -> float:
        """How many times faster than a peer."""
        return timing.ratio(self.seconds[peer], self.seconds[name])


class Batches:
    """Eight batches, again and again: each candidate has its own counter, so that all see the same."""

    def __init__(self, shape: Shape) -> None:
        draw = torch.Generator().manual_seed(1)
        size = (8, shape.batch, shape.tokens)
        self.x, self.y = (torch.randint(shape.vocab, size, generator=draw) for _ in range(2))
        self.count = 0

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        i = self.count % 8
        self.count += 1
        return self.x[i], self.y[i]


def model(shape: Shape, backend: str = "torch") -> GPT:
    """tinygpt's decoder, with the same weights at every call."""
    config = ModelConfig(layers=shape.layers, heads=shape.heads, width=shape.width, block_size=shape.tokens)
    return GPT(config, shape.vocab, bind(backend), generator=torch.Generator().manual_seed(2))


def tinygpt(shape: Shape, backend: str, *, autograd: bool = False) -> Step:
    """A step as the trainer makes it: written out where that serves, by autograd elsewhere or on request."""
    ours, batches = model(shape, backend), Batches(shape)
    optimizer = AdamW(ours.named_parameters(), OptimConfig(), ours.kernels)
    config = TrainingConfig(batch_size=shape.batch, autograd=autograd)
    make_gradients, _ = gradients.choose(ours, optimizer, LossScale(False), torch.float32, config)

    def step() -> float:
        loss = make_gradients(*batches.next())
        optimizer.clip()
        value = loss.item()
        optimizer.step(_LR)
        return value

    return step


def plain(shape: Shape, *, compiled: bool = False) -> Step:
    """The plain model from tinygpt's weights."""
    theirs, batches = PlainGPT(shape.vocab, shape.layers, shape.heads, shape.width, shape.tokens), Batches(shape)
    theirs.load_state_dict(_translated(model(shape).state_dict()), strict=False)
    optimizer = plain_optimizer(theirs)
    forward = torch.compile(theirs) if compiled else theirs

    def step() -> float:
        loss: float = plain_step(forward, optimizer, *batches.next(), _LR).item()
        return loss

    return step


def hugging_face(shape: Shape) -> Step:
    """GPT-2 as transformers has it."""
    torch.manual_seed(2)
    batches = Batches(shape)
    theirs = huggingface.HuggingFaceGPT(shape.vocab, shape.layers, shape.heads, shape.width, shape.tokens)
    optimizer = plain_optimizer(theirs)
    return lambda: plain_step(theirs, optimizer, *batches.next(), _LR).item()


def _translated(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {"attention_norm": "norm1", "feed_forward_norm": "norm2", "attention.qkv": "qkv", "attention.proj": "proj",
             "feed_forward.up": "up", "feed_forward.down": "down"}  # fmt: skip
    found = {}
    for name, tensor in ours.items():
        for mine, theirs in names.items():
            name = name.replace(f".{mine}.", f".{theirs}.")
        found[name if "." in name else f"{name}.weight"] = tensor
    return found


MAKERS: dict[str, Callable[[Shape], Step]] = {
    PLAIN: plain,
    COMPILED: lambda shape: plain(shape, compiled=True),
    "tinygpt, auto": lambda shape: tinygpt(shape, "auto"),
    "tinygpt, cpp": lambda shape: tinygpt(shape, "cpp"),
    "tinygpt, cpp, autograd": lambda shape: tinygpt(shape, "cpp", autograd=True),
    "tinygpt, torch": lambda shape: tinygpt(shape, "torch"),
    HUGGING_FACE: hugging_face,
}


def names() -> list[str]:
    """Who is timed: everybody, but for Hugging Face where transformers is not installed."""
    return [name for name in MAKERS if name != HUGGING_FACE or huggingface.available()]


def gate(steps: dict[str, Step], shape: Shape) -> None:
    """Everybody learns, and all from the same weights to the same losses.

    Raises:
        AssertionError: somebody does not; names it, with the losses.
    """
    losses = {name: [step() for _ in range(_GATE_STEPS)] for name, step in steps.items()}
    for name, found in losses.items():
        told = f"{name}: losses {found}, the plain model's {losses[PLAIN]}"
        assert abs(found[0] - math.log(shape.vocab)) < 0.5, told
        if name != HUGGING_FACE:
            assert all(abs(a - b) <= _GATE * b for a, b in zip(found, losses[PLAIN], strict=True)), told


def measure(name: str, rounds: int | None = None) -> Steps:
    """Interleaved rounds of everybody's step; again where the machine was not idle."""
    shape, enough = CONFIGS[name]
    timing.keep_freed_memory()
    steps = {candidate: MAKERS[candidate](shape) for candidate in names()}
    gate(steps, shape)
    ours = model(shape)
    flop = float(ours.flops_per_token() * shape.batch * shape.tokens)
    shares: list[float] = []
    while True:
        before = timing.matmul_rate()
        seconds = timing.interleaved(steps, rounds=rounds or enough, seconds=0.0)
        rate = max(before, timing.matmul_rate())
        shares.append(flop / timing.median(seconds[PLAIN]) / rate)
        if shares[-1] >= NOISY or len(shares) == ATTEMPTS:
            return Steps(name, seconds, flop, rate, shares)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_step(name, benchmark):
    found = measure(name)
    print(f"\n{name}: {found.matmul_rate / 1e9:.0f} GFLOP/s in large products{', noisy' * found.noisy}")
    for candidate, times in found.seconds.items():
        print(f"{candidate:<30}{1e3 * timing.median(times):8.2f} ms ± {100 * timing.spread(times):2.0f}%  "
              f"x{found.ratio(candidate):.2f} of plain, x{found.ratio(candidate, COMPILED):.2f} of compiled, "
              f"{100 * found.share(candidate):.0f}% of products")  # fmt: skip
        benchmark.extra_info[candidate] = round(found.ratio(candidate), 3)
    benchmark.extra_info["noisy"] = found.noisy
    benchmark.pedantic(tinygpt(CONFIGS[name][0], "auto"), rounds=10, iterations=1, warmup_rounds=3)
