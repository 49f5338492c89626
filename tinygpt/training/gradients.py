"""Who makes the gradients of a batch: the step that is written out where it serves, autograd elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import TrainingConfig
from ..models._base import Model
from ..models.gpt import GPT
from ..models.step import NotServed, Step
from ..optim import LossScale, Optimizer
from .machine import autocast


class Autograd:
    """Loss and gradients by PyTorch's autograd; called as `Step` is.

    Args:
        compiled: run the model through torch.compile.
    """

    how = "by autograd"

    def __init__(
        self, model: Model, optimizer: Optimizer, loss_scale: LossScale, precision: torch.dtype, *, compiled: bool
    ) -> None:
        self.forward = torch.compile(model) if compiled else model
        self.optimizer, self.loss_scale, self.precision = optimizer, loss_scale, precision

    def __call__(self, first: Tensor, *rest: Tensor | None, add: bool = False) -> Tensor:
        """The loss of a batch; its gradients are every parameter's `grad`, added to what was there if `add`.

        Args:
            first, rest: the batch, and perhaps a denominator: what the model's `forward` takes.
        """
        if not add:
            self.optimizer.zero_grad()
        with autocast(first.device, self.precision):
            loss: Tensor = self.forward(first, *rest)
        (loss * self.loss_scale.scale if self.loss_scale.enabled else loss).backward()
        return loss.detach()


def choose(
    model: Model, optimizer: Optimizer, loss_scale: LossScale, precision: torch.dtype, config: TrainingConfig
) -> tuple[Step | Autograd, str | None]:
    """What serves, and why it is autograd where nobody asked for that."""
    why = None
    # GPT itself: what derives from it is fed otherwise. For other models nobody expects a step that is written out.
    if type(model) is GPT and not (config.autograd or config.compile):
        try:
            return Step(model, optimizer, config.batch_size, precision), None
        except NotServed as reason:
            why = str(reason)
    return Autograd(model, optimizer, loss_scale, precision, compiled=config.compile), why
