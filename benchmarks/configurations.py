"""The two training steps that benchmarks measure, and everything they are measured on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tinygpt.config import ModelConfig, OptimConfig
from tinygpt.models.gpt import GPT
from tinygpt.optim import AdamW
from tinygpt_kernels import bind


@dataclass(frozen=True)
class Configuration:
    """A model's shape and a batch of it."""

    layers: int
    heads: int
    width: int
    block_size: int
    batch_size: int
    vocab: int = 65

    def __str__(self) -> str:
        return f"{self.layers} layers, {self.heads} heads, width {self.width}, T {self.block_size}, batch {self.batch_size}"

    def batch(self) -> tuple[Tensor, Tensor]:
        """Random tokens and targets [B, T], the same at every call."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.batch_size, self.block_size)
        x, y = (torch.randint(self.vocab, shape, generator=generator) for _ in range(2))
        return x, y


CONFIGURATIONS = {
    "small": Configuration(4, 4, 128, 64, 12),  # nanoGPT's for CPUs, preset char-cpu
    "medium": Configuration(6, 6, 384, 256, 8),
}


def build(configuration: Configuration, backend: str) -> tuple[GPT, AdamW, Tensor, Tensor]:
    """(model, optimizer, tokens, targets) on a backend."""
    c = configuration
    kernels = bind(backend)
    model = GPT(ModelConfig(c.layers, c.heads, width=c.width, block_size=c.block_size), c.vocab, kernels)
    return model, AdamW(model.named_parameters(), OptimConfig(), kernels), *c.batch()
