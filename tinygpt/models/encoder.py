"""The encoder: every token sees every other, their mean is the text, and a linear layer says which class it is of.

# B batch, T tokens, C channels, L classes
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinygpt_kernels import Kernels

from ..config import ModelConfig
from ._base import Model
from .block import Block, add_positions, final_norm, initialise, through


class Encoder(Model):
    """Blocks without the causal mask, mean pooling over the real tokens, a classifier.

    Args:
        config, vocab_size, kernels, generator: as in `GPT`.
        classes: L.
    """

    position: Tensor

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        kernels: Kernels | None = None,
        *,
        classes: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(config, vocab_size, kernels)
        self.classes = classes
        self.token = nn.Parameter(torch.empty(self.rows, config.width))
        add_positions(self, config)
        self.blocks = nn.ModuleList(Block(config, self.kernels, causal=False) for _ in range(config.layers))
        self.norm = final_norm(config, self.kernels)
        self.head = nn.Parameter(torch.empty(classes, config.width))
        initialise(self, config.layers, post=config.norm == "post", generator=generator)

    def forward(
        self, tokens_BT: Tensor, lengths_B: Tensor, labels_B: Tensor | None = None, denominator: Tensor | None = None
    ) -> Tensor:
        """Mean loss over the labels, or without labels the logits of each class.

        Args:
            tokens_BT: int64 token ids, T at most `config.block_size`.
            lengths_B: int64, how many leading tokens of each row are real; the others are seen by none.
            labels_B: int64 class of each row; -100 does not count.
            denominator: divides the summed loss in place of the number of counted labels.

        Returns:
            scalar loss, at least float32; or logits [B, L].
        """
        pooled_BC = self.pooled(tokens_BT, lengths_B)
        if labels_B is None:
            return F.linear(pooled_BC, self.head)
        loss: Tensor = self.kernels.linear_cross_entropy(
            pooled_BC, self.head, labels_B, label_smoothing=self.smoothing, denominator=denominator
        )
        return loss

    def pooled(self, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Mean over the real tokens of what the last norm gives, [B, C]; zero for a row that has none."""
        self.refuse_longer(tokens_BT)
        x_BTC = self.kernels.embedding(tokens_BT, self.token, self.position)
        if self.config.dropout and self.training:
            x_BTC = F.dropout(x_BTC, self.config.dropout)
        x_BTC = through(self.blocks, self.norm, x_BTC, lengths=lengths_B)
        real_BT1 = (torch.arange(tokens_BT.shape[1], device=x_BTC.device) < lengths_B[:, None])[..., None]
        return (x_BTC * real_BT1).sum(1) / lengths_B.clamp(min=1)[:, None]
