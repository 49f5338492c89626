"""The decoder: GPT-2's shape and initialisation (Radford et al. 2019), every hot operation an op that can be swapped.

# B batch, T tokens, C channels, V vocabulary
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinygpt_kernels import Kernels

from ..config import ModelConfig
from ._base import Model
from .block import Block, add_positions, final_norm, initialise, through

if TYPE_CHECKING:
    from typing_extensions import Self


class GPT(Model):
    """A decoder-only transformer over token ids.

    Args:
        config, vocab_size, kernels: as every model's.
        generator: draws the initial weights; None means PyTorch's global generator.
    """

    position: Tensor

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        kernels: Kernels | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(config, vocab_size, kernels)
        self.token = nn.Parameter(torch.empty(self.rows, config.width))
        add_positions(self, config)
        self.blocks = nn.ModuleList(Block(config, self.kernels) for _ in range(config.layers))
        self.norm = final_norm(config, self.kernels)
        initialise(self, config.layers, post=config.norm == "post", generator=generator)

    @classmethod
    def from_run(cls, run: str | Path, *, backend: str = "auto", strict: bool = False, device: str = "cpu") -> Self:
        """The model of a training run, in evaluation mode, with the weights of its newest checkpoint.

        Raises:
            UserError: the directory is no run, or is damaged, or of another model; the message says which file and why.
        """
        from ..checkpoint import Run
        from ..errors import UserError
        from . import load

        model = load(Run.open(Path(run)), backend=backend, strict=strict, device=device)
        if not isinstance(model, cls):
            raise UserError(f"{run} holds a model {model.config.name!r}; `tinygpt.models.load` loads any")
        return model

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
        self.refuse_longer(tokens_BT)
        x_BTC = self.kernels.embedding(tokens_BT, self.token, self.position)
        if self.config.dropout and self.training:
            x_BTC = F.dropout(x_BTC, self.config.dropout)
        return through(self.blocks, self.norm, x_BTC)

    def flops_per_token(self) -> int | None:
        """Floating-point operations of forward and backward per token (Chowdhery et al. 2022, appendix B)."""
        c = self.config
        positions = self.position.numel() if c.positions == "learned" else 0
        return 6 * (self.parameter_count() - positions) + 12 * c.layers * c.width * c.block_size
