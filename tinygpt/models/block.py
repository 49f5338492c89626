"""The transformer block, and what stands before it: one of each, with options, for every model that has them.

# B batch, T tokens, S tokens of the memory, C channels, H heads, K key/value heads, E = H + 2K, D head dim
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinygpt_kernels import Kernels

from ..config import ModelConfig


class Norm(nn.Module):
    """Layer norm over the channels, of the residual stream with the branch that is added to it."""

    def __init__(self, width: int, bias: bool, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.layer_norm, self.add_layer_norm = kernels.layer_norm, kernels.add_layer_norm

    def forward(self, x_BTC: Tensor, branch_BTC: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum); the sum is x where no branch is to be added."""
        if branch_BTC is None:
            return self.layer_norm(x_BTC, self.weight, self.bias), x_BTC
        # Under autocast branches are 16 bits wide and the stream is not.
        y, h = self.add_layer_norm(branch_BTC.to(x_BTC.dtype), x_BTC, self.weight, self.bias)
        return y, h


class SelfAttention(nn.Module):
    """Self-attention on the packed projection, which the op reads in place.

    Args:
        causal: a token sees itself and those before it. Padding stands at the end of a row, so no real token sees it.
    """

    def __init__(self, config: ModelConfig, kernels: Kernels, *, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim, self.dropout, self.causal = config.head_dim, config.dropout, causal
        self.qkv = nn.Linear(config.width, (self.heads + 2 * self.kv_heads) * self.head_dim, config.bias)
        self.proj = nn.Linear(config.width, config.width, config.bias)
        self.attention_qkv = kernels.attention_qkv

    def forward(self, x_BTC: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Args: lengths_B: how many leading tokens of each row are real, where not causal; None: all."""
        B, T, C = x_BTC.shape
        qkv_BTED = self.qkv(x_BTC).view(B, T, -1, self.head_dim)
        p = self.dropout if self.training else 0.0
        y_BTHD = self.attention_qkv(
            qkv_BTED, self.heads, self.kv_heads, causal=self.causal, kv_lengths=lengths_B, dropout_p=p
        )
        y: Tensor = self.proj(y_BTHD.reshape(B, T, C))
        return y


class CrossAttention(nn.Module):
    """Attention of one sequence's queries to another's keys and values, the memory."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kv_heads = config.kv_heads or config.heads
        self.head_dim, self.dropout = config.head_dim, config.dropout
        self.q = nn.Linear(config.width, config.width, config.bias)
        self.kv = nn.Linear(config.width, 2 * self.kv_heads * self.head_dim, config.bias)
        self.proj = nn.Linear(config.width, config.width, config.bias)
        self.attention = kernels.attention

    def forward(self, x_BTC: Tensor, memory_BSC: Tensor, lengths_B: Tensor | None) -> Tensor:
        """Args: lengths_B: how many leading tokens of each row of the memory are real; None: all."""
        B, T, C = x_BTC.shape
        q_BTHD = self.q(x_BTC).view(B, T, -1, self.head_dim)
        k, v = self.kv(memory_BSC).view(B, memory_BSC.shape[1], 2 * self.kv_heads, self.head_dim).chunk(2, dim=2)
        p = self.dropout if self.training else 0.0
        y_BTHD = self.attention(q_BTHD, k, v, causal=False, kv_lengths=lengths_B, dropout_p=p)
        y: Tensor = self.proj(y_BTHD.reshape(B, T, C))
        return y


class FeedForward(nn.Module):
    """Two linear layers around an activation, wider inside; with GELU the first one's bias is added by its op."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.activation, self.approximate = config.activation, config.gelu
        self.up = nn.Linear(config.width, config.inner, config.bias)
        self.down = nn.Linear(config.inner, config.width, config.bias)
        self.gelu = kernels.gelu

    def forward(self, x_BTC: Tensor) -> Tensor:
        if self.activation == "relu":
            wide = F.relu(self.up(x_BTC))
        else:
            wide = self.gelu(F.linear(x_BTC, self.up.weight), self.up.bias, approximate=self.approximate)
        y: Tensor = self.down(wide)
        return y


class Block(nn.Module):
    """Attention, attention to a memory if `cross`, feed-forward: each a branch f that is added to the residual stream.

    pre:   x + f(norm(x)). Each addition is left to the norm that follows it, one pass for both; so a block takes the stream
           and the branch that is still to be added, and hands both on.
    post:  norm(x + f(x)). Nothing is left over, and there is no last norm.
    """

    def __init__(self, config: ModelConfig, kernels: Kernels, *, causal: bool = True, cross: bool = False) -> None:
        super().__init__()
        self.attention_norm = Norm(config.width, config.bias, kernels)
        self.attention = SelfAttention(config, kernels, causal=causal)
        self.cross_norm = Norm(config.width, config.bias, kernels) if cross else None
        self.cross_attention = CrossAttention(config, kernels) if cross else None
        self.feed_forward_norm = Norm(config.width, config.bias, kernels)
        self.feed_forward = FeedForward(config, kernels)
        self.dropout, self.post = config.dropout, config.norm == "post"

    def forward(
        self, x: Tensor, branch: Tensor | None = None, *, lengths: Tensor | None = None,
        memory: Tensor | None = None, memory_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """(stream, branch still to be added), both [B, T, C], from the same.

        Args:
            lengths: int64 [B], real tokens of each row; only where attention is not causal.
            memory, memory_lengths: [B, S, C] and int64 [B], for cross-attention.
        """
        if self.post:
            x, _ = self.attention_norm(x, self._drop(self.attention(x, lengths)))
            if self.cross_norm is not None and self.cross_attention is not None:
                x, _ = self.cross_norm(x, self._drop(self.cross_attention(x, memory, memory_lengths)))
            x, _ = self.feed_forward_norm(x, self._drop(self.feed_forward(x)))
            return x, None
        y, x = self.attention_norm(x, branch)
        branch = self._drop(self.attention(y, lengths))
        if self.cross_norm is not None and self.cross_attention is not None:
            y, x = self.cross_norm(x, branch)
            branch = self._drop(self.cross_attention(y, memory, memory_lengths))
        y, x = self.feed_forward_norm(x, branch)
        return x, self._drop(self.feed_forward(y))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout and self.training else x


def final_norm(config: ModelConfig, kernels: Kernels) -> Norm | None:
    """The norm after the last block, which pre-norm blocks need and post-norm blocks have already had."""
    return Norm(config.width, config.bias, kernels) if config.norm == "pre" else None


def through(
    blocks: Iterable[nn.Module], norm: Norm | None, x: Tensor, *, lengths: Tensor | None = None,
    memory: Tensor | None = None, memory_lengths: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [B, T, C] through all blocks and the norm after them. Arguments as in `Block.forward`."""
    branch: Tensor | None = None
    for block in blocks:
        x, branch = block(x, branch, lengths=lengths, memory=memory, memory_lengths=memory_lengths)
    return x if norm is None else norm(x, branch)[0]


def add_positions(model: nn.Module, config: ModelConfig) -> None:
    """Give a model its table `position` [block_size, width]: a parameter, or sinusoids, which are no part of its weights."""
    if config.positions == "learned":
        model.register_parameter("position", nn.Parameter(torch.empty(config.block_size, config.width)))
    else:
        model.register_buffer("position", sinusoids(config.block_size, config.width), persistent=False)


def sinusoids(length: int, width: int) -> Tensor:
    """Positions as sines and cosines of geometrically spaced wavelengths, [length, width] (Vaswani et al. 2017, section 3.5).

    PE[p, 2i] = sin(p / 10000^(2i / width)), PE[p, 2i + 1] = cos of the same.
    """
    even = torch.arange(0, width, 2, dtype=torch.float64)
    angles = torch.arange(length, dtype=torch.float64)[:, None] / 10000 ** (even / width)
    table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]
    return table.float()


def initialise(model: nn.Module, layers: int, *, post: bool, generator: torch.Generator | None) -> None:
    """Initial weights of a model of blocks: GPT-2's, or where norms stand after additions Glorot's.

    GPT-2: normal with 0.02, and the last layer of each branch smaller: every block adds two branches to the residual stream,
    and so its variance does not depend on depth. After a post-norm each branch meets a stream of variance 1; with 0.02 it
    would hardly be heard there, so matrices are Glorot's (2010, eq. 16) and tables stay at 0.02.
    """
    branch = 0.02 / math.sqrt(2 * layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            if post and name.endswith(".weight"):
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                last = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=branch if last else 0.02, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
