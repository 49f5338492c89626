"""AdamW on the ops, and the learning rate's schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tinygpt_kernels import Kernels

from .config import OptimConfig
from .flat import Flat


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

    Parameters and moments are moved into flat buffers, matrices first, so that a step is two calls over long rows. Gradients
    are where autograd leaves them, until `flat_gradients` gives them a buffer too.

    The state is two tensors per parameter and one step count; `state_dict` holds nothing else, so that it can be loaded
    without running any code of the file's.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, kernels: Kernels) -> None:
        self.config = config
        self.step_count = 0
        trained = [(name, p) for name, p in parameters if p.requires_grad]
        self.parameters = dict(sorted(trained, key=lambda item: item[1].dim() < 2))
        self._decayed = sum(p.dim() >= 2 for p in self.parameters.values())
        shapes = {name: p.shape for name, p in self.parameters.items()}
        first = next(iter(self.parameters.values()))
        moment = torch.promote_types(first.dtype, torch.float32)
        self._weights = Flat(shapes, first.dtype, first.device)
        self._exp_avgs, self._exp_avg_sqs = (Flat(shapes, moment, first.device) for _ in range(2))
        self._gradients: Flat | None = None
        for name, view in self._weights.views.items():
            view.copy_(self.parameters[name].detach())
            self.parameters[name].data = view
        self.exp_avgs, self.exp_avg_sqs = self._exp_avgs.views, self._exp_avg_sqs.views
        self._adamw, self._clip = kernels.adamw_, kernels.clip_grad_norm_

    def flat_gradients(self) -> Flat:
        """Keep gradients in one buffer from now on: who writes them (autograd adds) finds them as every parameter's `grad`."""
        if self._gradients is None:
            first = next(iter(self.parameters.values()))
            self._gradients = Flat({n: p.shape for n, p in self.parameters.items()}, first.dtype, first.device)
            for name, view in self._gradients.views.items():
                self.parameters[name].grad = view
        return self._gradients

    def clip(self) -> Tensor:
        """Scale gradients to the configured norm; returns the norm before, a scalar tensor."""
        limit = self.config.clip if self.config.clip is not None else math.inf
        flat = self._gradients
        norm: Tensor = self._clip([flat.buffer] if flat else [p.grad for p in self.parameters.values()], limit)
        return norm

    def step(self, lr: float) -> None:
        """Update every parameter from its gradient.

        Raises:
            RuntimeError: the parameters are no longer where they were when this was made, and would not be what is updated.
        """
        for name in (next(iter(self.parameters)), next(reversed(self.parameters))):
            if self.parameters[name].data_ptr() != self._weights.views[name].data_ptr():
                raise RuntimeError(
                    f"parameter {name!r} was moved or replaced (by model.to(), .double() or the like) after its optimizer "
                    "was made: make the optimizer after moving the model"
                )
        self.step_count += 1
        c = self.config
        for decay, lists in ((c.weight_decay, self._lists(True)), (0.0, self._lists(False))):
            if lists[0] and lists[0][0].numel():
                self._adamw(
                    *lists, step=self.step_count, lr=lr, betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=decay
                )

    def _lists(self, decayed: bool) -> tuple[list[Tensor], ...]:
        """Parameters, gradients and both moments of the matrices, or of the vectors: one long tensor each where gradients are flat."""
        names = list(self.parameters)
        names = names[: self._decayed] if decayed else names[self._decayed :]
        if self._gradients is None:
            return ([self.parameters[n] for n in names], [_gradient(self.parameters[n]) for n in names],
                    [self.exp_avgs[n] for n in names], [self.exp_avg_sqs[n] for n in names])  # fmt: skip
        flats = (self._weights, self._gradients, self._exp_avgs, self._exp_avg_sqs)
        boundary = next(iter(list(self.parameters)[self._decayed :]), None)
        if decayed:
            return tuple([flat.until(boundary)] for flat in flats)
        return tuple([flat.since(boundary)] if boundary else [] for flat in flats)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        if self._gradients is not None:
            self._gradients.buffer.zero_()
            return
        for p in self.parameters.values():
            p.grad = None

    def state_dict(self) -> dict[str, object]:
        """Step count and moments."""
        return {
            "step": self.step_count,
            # Copies: a view would be written with the whole buffer behind it.
            "exp_avgs": {name: moment.clone() for name, moment in self.exp_avgs.items()},
            "exp_avg_sqs": {name: moment.clone() for name, moment in self.exp_avg_sqs.items()},
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


def _gradient(p: nn.Parameter) -> Tensor:
    assert p.grad is not None
    return p.grad


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
