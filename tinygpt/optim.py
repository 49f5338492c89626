"""AdamW on the ops, and the learning rate's schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tinygpt_kernels import Kernels

from .config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from `lr` to `min_lr` at the last step (Loshchilov, Hutter 2017, eq. 5).

    Args:
        step: 0 at the first step. steps: length of the run.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / (config.warmup + 1)
    progress = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.lr - config.min_lr)


class AdamW:
    """AdamW over named parameters: matrices decay, vectors do not. Moments are at least float32.

    The state is two tensors per parameter and one step count; `state_dict` holds nothing else, so that it can be loaded
    without running any code of the file's.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, kernels: Kernels) -> None:
        self.config = config
        self.step_count = 0
        self.parameters = {name: p for name, p in parameters if p.requires_grad}
        self.exp_avgs = {name: _moment(p) for name, p in self.parameters.items()}
        self.exp_avg_sqs = {name: _moment(p) for name, p in self.parameters.items()}
        self._groups = [
            ([n for n, p in self.parameters.items() if p.dim() >= 2], config.weight_decay),
            ([n for n, p in self.parameters.items() if p.dim() < 2], 0.0),
        ]
        self._adamw, self._clip = kernels.adamw_, kernels.clip_grad_norm_

    def clip(self) -> Tensor:
        """Scale gradients to the configured norm; returns the norm before, a scalar tensor."""
        limit = self.config.clip if self.config.clip is not None else math.inf
        norm: Tensor = self._clip([p.grad for p in self.parameters.values()], limit)
        return norm

    def step(self, lr: float) -> None:
        """Update every parameter from its gradient."""
        self.step_count += 1
        c = self.config
        for names, decay in self._groups:
            if names:
                self._adamw([self.parameters[n] for n in names], [self.parameters[n].grad for n in names],
                            [self.exp_avgs[n] for n in names], [self.exp_avg_sqs[n] for n in names],
                            step=self.step_count, lr=lr, betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=decay)  # fmt: skip

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in self.parameters.values():
            p.grad = None

    def state_dict(self) -> dict[str, object]:
        """Step count and moments."""
        return {
            "step": self.step_count,
            "exp_avgs": dict(self.exp_avgs),
            "exp_avg_sqs": dict(self.exp_avg_sqs),
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Copy step count and moments in; shapes and names must be this model's.

        Raises:
            ValueError: a moment is missing, left over, or of another shape.
        """
        step = state["step"]
        assert isinstance(step, int)
        self.step_count = step
        for key, mine in (("exp_avgs", self.exp_avgs), ("exp_avg_sqs", self.exp_avg_sqs)):
            theirs = state[key]
            assert isinstance(theirs, dict)
            if theirs.keys() != mine.keys():
                raise ValueError(
                    f"optimizer state {key} belongs to another model: {sorted(theirs.keys() ^ mine.keys())[:3]}"
                )
            for name, moment in mine.items():
                if theirs[name].shape != moment.shape:
                    raise ValueError(
                        f"optimizer state {key}[{name}] is {tuple(theirs[name].shape)}, not {tuple(moment.shape)}"
                    )
                moment.copy_(theirs[name])


def _moment(p: nn.Parameter) -> Tensor:
    return torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), memory_format=torch.preserve_format)


class LossScale:
    """Dynamic loss scaling for float16 (Micikevicius et al. 2018, section 3.2).

    The scale is halved at an overflow, whose step is not taken, and doubled after 2000 good steps.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = 2.0**16 if enabled else 1.0
        self.good_steps = 0

    def unscale(self, gradients: Iterable[Tensor | None]) -> None:
        """Undo the scale on gradients, in place."""
        if self.enabled:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(1.0 / self.scale)

    def accepts(self, norm: Tensor) -> bool:
        """Whether a step with this gradient norm may be taken; adjusts the scale."""
        if not self.enabled:
            return True
        finite = math.isfinite(norm.item())
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good_steps == 2000:
            self.scale, self.good_steps = self.scale * 2, 0
        return finite
