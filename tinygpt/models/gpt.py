"""The pre-norm decoder: GPT-2's shape and initialisation (Radford et al. 2019), every hot operation an op that can be swapped.

# B batch, T tokens, R = B * T rows, C channels, H heads, K key/value heads, E = H + 2K, D head dim, V vocabulary
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinygpt_kernels import Kernels, bind

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
    """Causal self-attention on the packed projection, which the op reads in place."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim, self.dropout = config.head_dim, config.dropout
        self.qkv = nn.Linear(config.width, (self.heads + 2 * self.kv_heads) * self.head_dim, config.bias)
        self.proj = nn.Linear(config.width, config.width, config.bias)
        self.attention_qkv = kernels.attention_qkv

    def forward(self, x_BTC: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        qkv_BTED = self.qkv(x_BTC).view(B, T, -1, self.head_dim)
        p = self.dropout if self.training else 0.0
        y_BTHD = self.attention_qkv(qkv_BTED, self.heads, self.kv_heads, causal=True, dropout_p=p)
        y: Tensor = self.proj(y_BTHD.reshape(B, T, C))
        return y


class FeedForward(nn.Module):
    """Two linear layers around a GELU, four times as wide inside; the first one's bias is added with the GELU."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.approximate = config.gelu
        self.up = nn.Linear(config.width, 4 * config.width, config.bias)
        self.down = nn.Linear(4 * config.width, config.width, config.bias)
        self.gelu = kernels.gelu

    def forward(self, x_BTC: Tensor) -> Tensor:
        wide = self.gelu(F.linear(x_BTC, self.up.weight), self.up.bias, approximate=self.approximate)
        y: Tensor = self.down(wide)
        return y


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    Each addition is left to the norm that follows it, one pass for both; so a block takes the stream and the branch that is
    still to be added, and hands both on.
    """

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.attention_norm = Norm(config.width, config.bias, kernels)
        self.attention = SelfAttention(config, kernels)
        self.feed_forward_norm = Norm(config.width, config.bias, kernels)
        self.feed_forward = FeedForward(config, kernels)
        self.dropout = config.dropout

    def forward(self, x_BTC: Tensor, branch_BTC: Tensor | None) -> tuple[Tensor, Tensor]:
        y_BTC, x_BTC = self.attention_norm(x_BTC, branch_BTC)
        branch_BTC = self._drop(self.attention(y_BTC))
        y_BTC, x_BTC = self.feed_forward_norm(x_BTC, branch_BTC)
        return x_BTC, self._drop(self.feed_forward(y_BTC))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout and self.training else x


class GPT(nn.Module):
    """A decoder-only transformer over token ids.

    Args:
        config: its shape.
        vocab_size: number of tokens; the tables may be padded beyond it (`config.vocab_multiple`).
        kernels: the ops, bound to a backend spec once; None means `auto`.
        generator: draws the initial weights; None means PyTorch's global generator.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        kernels: Kernels | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.kernels = kernels or bind("auto")
        rows = math.ceil(vocab_size / config.vocab_multiple) * config.vocab_multiple
        self.padded_from = None if rows == vocab_size else vocab_size
        self.token = nn.Parameter(torch.empty(rows, config.width))
        self.position = nn.Parameter(torch.empty(config.block_size, config.width))
        self.blocks = nn.ModuleList(Block(config, self.kernels) for _ in range(config.layers))
        self.norm = Norm(config.width, config.bias, self.kernels)
        self._initialise(generator)

    @classmethod
    def from_run(cls, run: str | Path, *, backend: str = "auto", strict: bool = False, device: str = "cpu") -> GPT:
        """The model of a training run, in evaluation mode, with the weights of its newest checkpoint.

        Raises:
            UserError: the directory is no run, or is damaged; the message says which file and why.
        """
        from ..checkpoint import Run

        opened = Run.open(Path(run))
        model = cls(opened.config.model, opened.tokenizer.vocab_size, bind(backend, strict=strict))
        model.load_state_dict(opened.load_weights())
        return model.to(device).eval()

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None, denominator: Tensor | None = None) -> Tensor:
        """Mean loss over the targets, or without targets the logits of the last token.

        Args:
            tokens_BT: int64 token ids, T at most `config.block_size`.
            targets_BT: int64, the token that follows each; -100 does not count.
            denominator: divides the summed loss in place of the number of counted targets.

        Returns:
            scalar loss, at least float32; or logits [B, vocab_size].
        """
        hidden_BTC = self.hidden(tokens_BT)
        if targets_BT is None:
            logits: Tensor = F.linear(hidden_BTC[:, -1], self.token)[:, : self.vocab_size]
            return logits
        loss: Tensor = self.kernels.linear_cross_entropy(
            hidden_BTC.flatten(0, 1),
            self.token,
            targets_BT.flatten(),
            vocab=self.padded_from,
            denominator=denominator,
        )
        return loss

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Output of the last norm, [B, T, C]."""
        if tokens_BT.shape[1] > self.config.block_size:
            raise ValueError(f"{tokens_BT.shape[1]} tokens a row; this model's context is {self.config.block_size}")
        x_BTC = self.kernels.embedding(tokens_BT, self.token, self.position)
        if self.config.dropout and self.training:
            x_BTC = F.dropout(x_BTC, self.config.dropout)
        branch_BTC: Tensor | None = None
        for block in self.blocks:
            x_BTC, branch_BTC = block(x_BTC, branch_BTC)
        y: Tensor = self.norm(x_BTC, branch_BTC)[0]
        return y

    def parameter_count(self) -> int:
        """All parameters; the output layer shares the token table."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Floating-point operations of forward and backward per token (Chowdhery et al. 2022, appendix B)."""
        c = self.config
        matmul = self.parameter_count() - self.position.numel()
        return 6 * matmul + 12 * c.layers * c.width * c.block_size

    def _initialise(self, generator: torch.Generator | None) -> None:
        # Each block adds two branches to the residual stream; scaling their last layers keeps its variance independent of depth.
        branch = 0.02 / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):
                nn.init.normal_(parameter, std=branch, generator=generator)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
