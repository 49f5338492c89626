"""The next token from the mean of the context's embeddings: what a context says when nobody asks in which order.

# B batch, T tokens, C channels, V vocabulary
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinygpt_kernels import Kernels

from ..config import ModelConfig
from ._base import Model


class Average(Model):
    """Token embedding, mean over the context, a hidden layer with LeakyReLU and dropout, logits. Arguments as in `GPT`.

    Every place of a window is a prediction of its own, from the tokens up to it: the mean runs over those alone, so that what
    a shorter context lacks (its padding) counts nowhere, and one pass trains on every length from 1 to `block_size`.
    """

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
        self.up = nn.Linear(config.width, config.inner)
        self.head = nn.Linear(config.inner, self.rows, bias=False)
        nn.init.normal_(self.token, generator=generator)
        for layer in (self.up, self.head):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None, denominator: Tensor | None = None) -> Tensor:
        """Mean loss over the targets, or without targets the logits of the last token: as `GPT.forward`."""
        self.refuse_longer(tokens_BT)
        mean_BTC = self.means(tokens_BT)
        if targets_BT is None:
            logits: Tensor = self.head(self._inner(mean_BTC[:, -1]))[:, : self.vocab_size]
            return logits
        loss: Tensor = self.kernels.linear_cross_entropy(
            self._inner(mean_BTC).flatten(0, 1),
            self.head.weight,
            targets_BT.flatten(),
            vocab=self.padded_from,
            denominator=denominator,
        )
        return loss

    def means(self, tokens_BT: Tensor) -> Tensor:
        """Mean embedding of each place's context, itself included, [B, T, C]."""
        x_BTC = self.kernels.embedding(tokens_BT, self.token)
        count_T1 = torch.arange(1, tokens_BT.shape[1] + 1, device=x_BTC.device, dtype=x_BTC.dtype)[:, None]
        mean: Tensor = x_BTC.cumsum(1) / count_T1
        return mean

    def _inner(self, mean: Tensor) -> Tensor:
        inner = F.leaky_relu(self.up(mean))
        return F.dropout(inner, self.config.dropout) if self.config.dropout and self.training else inner
