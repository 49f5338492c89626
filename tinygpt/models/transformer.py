"""The encoder-decoder of "Attention Is All You Need" (Vaswani et al. 2017).

# B batch, S source tokens, T target tokens, C channels, V vocabulary
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinygpt_kernels import Kernels

from ..config import ModelConfig
from ._base import Model
from .block import Block, add_positions, final_norm, initialise, through


class Transformer(Model):
    """Encoder and decoder over one vocabulary, whose table is also the output layer (section 3.4). Arguments as in `GPT`.

    The vocabulary holds a start and an end token (training/tasks/pairs.py): the source ends with the end token, the
    decoder reads the start token and then the target, and is to say the target and then the end token.
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
        self.encoder = nn.ModuleList(Block(config, self.kernels, causal=False) for _ in range(config.layers))
        self.encoder_norm = final_norm(config, self.kernels)
        self.decoder = nn.ModuleList(Block(config, self.kernels, cross=True) for _ in range(config.layers))
        self.decoder_norm = final_norm(config, self.kernels)
        initialise(self, config.layers, post=config.norm == "post", generator=generator)
        # Times √C the rows have variance 1, as their positions nearly have; as an output layer they give logits of variance 1.
        nn.init.normal_(self.token, std=config.width**-0.5, generator=generator)

    def forward(
        self,
        source_BS: Tensor,
        lengths_B: Tensor,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        denominator: Tensor | None = None,
    ) -> Tensor:
        """Mean loss over the targets, or without targets the logits of what follows the last token.

        Args:
            source_BS: int64 token ids; S and T are at most `config.block_size`.
            lengths_B: int64, how many leading tokens of each source are real; the others are seen by none.
            tokens_BT: int64, the start token and the target so far. Padding stands at the end, where the causal mask hides it.
            targets_BT: int64, the token that follows each; -100 does not count.
            denominator: divides the summed loss in place of the number of counted targets.

        Returns:
            scalar loss, at least float32; or logits [B, vocab_size].
        """
        hidden_BTC = self.decode(tokens_BT, self.encode(source_BS, lengths_B), lengths_B)
        if targets_BT is None:
            return self.logits(hidden_BTC[:, -1])
        loss: Tensor = self.kernels.linear_cross_entropy(
            hidden_BTC.flatten(0, 1),
            self.token,
            targets_BT.flatten(),
            label_smoothing=self.smoothing,
            vocab=self.padded_from,
            denominator=denominator,
        )
        return loss

    def encode(self, source_BS: Tensor, lengths_B: Tensor) -> Tensor:
        """The memory of a source, [B, S, C]."""
        return through(self.encoder, self.encoder_norm, self._embed(source_BS), lengths=lengths_B)

    def decode(self, tokens_BT: Tensor, memory_BSC: Tensor, lengths_B: Tensor) -> Tensor:
        """Output of the decoder at every token, [B, T, C], given the memory and its lengths."""
        x_BTC = self._embed(tokens_BT)
        return through(self.decoder, self.decoder_norm, x_BTC, memory=memory_BSC, memory_lengths=lengths_B)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., vocab_size] of hidden states [..., C]; padding of the table has none."""
        return F.linear(hidden, self.token)[..., : self.vocab_size]

    def _embed(self, tokens_BT: Tensor) -> Tensor:
        self.refuse_longer(tokens_BT)
        scale = math.sqrt(self.config.width)
        x_BTC: Tensor = self.kernels.embedding(tokens_BT, self.token, self.position, scale=scale)
        return F.dropout(x_BTC, self.config.dropout) if self.config.dropout and self.training else x_BTC
