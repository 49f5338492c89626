"""The next token from the last one alone: a table of logits, and the least that any later model must beat.

# B batch, T tokens, V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinygpt_kernels import Kernels

from ..config import ModelConfig
from ..errors import UserError
from ._base import Model

_LARGEST = 1 << 26  # elements of the table (256 MB), beyond which it and its moments stop being small


class Bigram(Model):
    """Row t of the table holds the logits of what follows token t. Arguments as in `GPT`; the initial table is zero.

    Raises:
        UserError: a vocabulary whose square is no table for a small machine.
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
        if self.rows**2 > _LARGEST:
            raise UserError(
                f"a bigram of {vocab_size:,} tokens has {self.rows**2 / 1e6:,.0f} million logits; take a tokenizer of at "
                f"most {int(_LARGEST**0.5):,} tokens, such as --tokenizer char, or another --model"
            )
        # Zero is the uniform distribution, and no row needs to be told from another: nothing is drawn.
        self.table = nn.Parameter(torch.zeros(self.rows, self.rows))

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None, denominator: Tensor | None = None) -> Tensor:
        """Mean loss over the targets, or without targets the logits of the last token: as `GPT.forward`."""
        if targets_BT is None:
            return self.table[tokens_BT[:, -1], : self.vocab_size]
        logits_BTV = self.kernels.embedding(tokens_BT, self.table)
        loss: Tensor = self.kernels.cross_entropy(
            logits_BTV.flatten(0, 1), targets_BT.flatten(), vocab=self.padded_from, denominator=denominator
        )
        return loss
