"""What every model is: a module that knows its configuration, its vocabulary and the ops it is bound to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tinygpt_kernels import Kernels, bind

from ..config import ModelConfig

if TYPE_CHECKING:
    from collections.abc import Iterator


class Model(nn.Module):
    """The base of all models. A subclass makes its parameters, then calls `initialise`.

    `model(*batch, denominator)` is the mean loss of a batch (`data.batches.Batch`: inputs, then targets); what a model
    returns without targets is its own affair, and said there.

    Args:
        config: its shape.
        vocab_size: number of tokens; tables may be padded beyond it (`config.vocab_multiple`).
        kernels: the ops, bound to a backend spec once; None means `auto`.

    Attributes:
        rows: rows of a table over the vocabulary, padding included.
        padded_from: the first row that is padding; None: no row is.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, kernels: Kernels | None = None) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.kernels = kernels or bind("auto")
        self.rows = math.ceil(vocab_size / config.vocab_multiple) * config.vocab_multiple
        self.padded_from = None if self.rows == vocab_size else vocab_size

    if TYPE_CHECKING:  # nn.Module's own returns Any

        def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def smoothing(self) -> float:
        """Label smoothing: of training alone, so that evaluation is the loss itself."""
        return self.config.label_smoothing if self.training else 0.0

    def parameter_count(self) -> int:
        """All parameters; a shared table counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int | None:
        """Floating-point operations of forward and backward per token; None where nobody has counted."""
        return None

    def matrices(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of two dimensions, by name."""
        return ((name, p) for name, p in self.named_parameters() if p.dim() == 2)

    def refuse_longer(self, tokens_BT: Tensor) -> None:
        """Raise ValueError for more tokens a row than the context holds."""
        if tokens_BT.shape[1] > self.config.block_size:
            raise ValueError(f"{tokens_BT.shape[1]} tokens a row; this model's context is {self.config.block_size}")
