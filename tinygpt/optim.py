"""Optimizers over flat buffers (AdamW on the ops, plain SGD), and the learning rate's schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tinygpt_kernels import Kernels

from .config import OptimConfig
from .flat import Flat


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Linear warm-up to `lr`, then a decay to `min_lr` at the last step.

    cosine: half a cosine (Loshchilov, Hutter 2017, eq. 5). linear: a line. exponential: the same factor at every step.
    inverse_sqrt: lr * min((step + 1) / warmup, (warmup / (step + 1))^0.5) (Vaswani et al. 2017, eq. 3), whatever the length
    of the run, and never below `min_lr`. Where there is a cooldown, its line takes the place of any of them at the end.

    Args:
        step: 0 at the first step. steps: length of the run.
    """
    c = config
    fall = round(steps * (1 - c.cooldown))
    if fall < steps and fall < step:
        share = max(0, steps - step) / (steps - fall)
        return c.min_lr + share * (learning_rate(c, fall, steps) - c.min_lr)
    if c.schedule == "inverse_sqrt":
        warmup = max(1, c.warmup)
        rate = c.lr * min((step + 1) / warmup, math.sqrt(warmup / (step + 1)))
        return rate if step < warmup else max(c.min_lr, rate)
    if step < c.warmup:
        return c.lr * (step + 1) / (c.warmup + 1)
    progress = min(1.0, (step - c.warmup) / max(1, steps - c.warmup))
    if c.schedule == "exponential":
        return c.lr * math.exp(progress * math.log(c.min_lr / c.lr))
    share = 1 - progress if c.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return c.min_lr + share * (c.lr - c.min_lr)


class Optimizer:
    """Plain stochastic gradient descent over named parameters, and the base of other optimizers. Matrices decay, vectors do not.

    Parameters are moved into a flat buffer, matrices first, so that a step is two calls over long rows. Gradients are where
    autograd leaves them, until `flat_gradients` gives them a buffer too.

    `state_dict` holds tensors and numbers alone, so that it can be loaded without running any code of the file's.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, kernels: Kernels) -> None:
        self.config, self.kernels = config, kernels
        self.step_count = 0
        trained = [(name, p) for name, p in parameters if p.requires_grad]
        self.parameters = dict(sorted(trained, key=lambda item: item[1].dim() < 2))
        self._decayed = sum(p.dim() >= 2 for p in self.parameters.values())
        first = next(iter(self.parameters.values()))
        self._weights = self._flat(first.dtype)
        self._gradients: Flat | None = None
        for name, view in self._weights.views.items():
            view.copy_(self.parameters[name].detach())
            self.parameters[name].data = view

    def flat_gradients(self) -> Flat:
        """Keep gradients in one buffer from now on: who writes them (autograd adds) finds them as every parameter's `grad`."""
        if self._gradients is None:
            self._gradients = self._flat(self._weights.buffer.dtype)
            for name, view in self._gradients.views.items():
                self.parameters[name].grad = view
        return self._gradients

    def clip(self) -> Tensor:
        """Scale gradients to the configured norm; returns the norm before, a scalar tensor."""
        limit = self.config.clip if self.config.clip is not None else math.inf
        flat = self._gradients
        gradients = [flat.buffer] if flat else [p.grad for p in self.parameters.values()]
        norm: Tensor = self.kernels.clip_grad_norm_(gradients, limit)
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
        for decay, decayed in ((self.config.weight_decay, True), (0.0, False)):
            lists = self._lists(decayed)
            if lists[0] and lists[0][0].numel():
                self._update(lists, lr, decay)

    def try_kernels(self) -> None:
        """Call the ops of a step on copies: what a backend refuses is said before anything is written."""
        trial = [p.grad.clone() for p in self.parameters.values() if p.grad is not None]
        self.kernels.clip_grad_norm_(trial, 1.0)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        if self._gradients is not None:
            self._gradients.buffer.zero_()
            return
        for p in self.parameters.values():
            p.grad = None

    def state_dict(self) -> dict[str, object]:
        """Step count and moments."""
        return {"step": self.step_count}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Copy step count and moments in.

        Raises:
            ValueError: the state is of another optimizer or model.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"optimizer state holds {sorted(state)}, which is another optimizer's than optim.optimizer="
                f"{self.config.optimizer}"
            )
        step = state["step"]
        assert isinstance(step, int)
        self.step_count = step

    @torch.no_grad()
    def _update(self, lists: tuple[list[Tensor], ...], lr: float, decay: float) -> None:
        for p, gradient in zip(*lists, strict=True):
            p.mul_(1 - lr * decay).add_(gradient, alpha=-lr)

    def _flats(self) -> tuple[Flat, ...]:
        """What belongs to parameters beside weights and gradients: moments."""
        return ()

    def _flat(self, dtype: torch.dtype) -> Flat:
        first = next(iter(self.parameters.values()))
        return Flat({name: p.shape for name, p in self.parameters.items()}, dtype, first.device)

    def _lists(self, decayed: bool) -> tuple[list[Tensor], ...]:
        """Parameters, gradients and moments of the matrices, or of the vectors: one long tensor each where gradients are flat."""
        names = list(self.parameters)
        names = names[: self._decayed] if decayed else names[self._decayed :]
        if self._gradients is None:
            return ([self.parameters[n] for n in names], [_gradient(self.parameters[n]) for n in names],
                    *([flat.views[n] for n in names] for flat in self._flats()))  # fmt: skip
        flats = (self._weights, self._gradients, *self._flats())
        boundary = next(iter(list(self.parameters)[self._decayed :]), None)
        if decayed:
            return tuple([flat.until(boundary)] for flat in flats)
        return tuple([flat.since(boundary)] if boundary else [] for flat in flats)


class AdamW(Optimizer):
    """AdamW (Loshchilov, Hutter 2019). Moments are at least float32; the state is two tensors per parameter and one step count."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, kernels: Kernels) -> None:
        super().__init__(parameters, config, kernels)
        moment = torch.promote_types(self._weights.buffer.dtype, torch.float32)
        self._exp_avgs, self._exp_avg_sqs = self._flat(moment), self._flat(moment)
        self.exp_avgs, self.exp_avg_sqs = self._exp_avgs.views, self._exp_avg_sqs.views

    def try_kernels(self) -> None:
        super().try_kernels()
        trial = [p.grad.clone() for p in self.parameters.values() if p.grad is not None]
        moments = [torch.zeros_like(g) for g in trial]
        self.kernels.adamw_([g.clone() for g in trial], trial, moments, [m.clone() for m in moments], step=1, lr=0.0,
                            betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)  # fmt: skip

    def state_dict(self) -> dict[str, object]:
        return {
            **super().state_dict(),
            # Copies: a view would be written with the whole buffer behind it.
            "exp_avgs": {name: moment.clone() for name, moment in self.exp_avgs.items()},
            "exp_avg_sqs": {name: moment.clone() for name, moment in self.exp_avg_sqs.items()},
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Copy step count and moments in; shapes and names must be this model's.

        Raises:
            ValueError: a moment is missing, left over, or of another shape.
        """
        super().load_state_dict(state)
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

    def _update(self, lists: tuple[list[Tensor], ...], lr: float, decay: float) -> None:
        c = self.config
        self.kernels.adamw_(
            *lists, step=self.step_count, lr=lr, betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=decay
        )

    def _flats(self) -> tuple[Flat, ...]:
        return self._exp_avgs, self._exp_avg_sqs


def make_optimizer(parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, kernels: Kernels) -> Optimizer:
    """The optimizer that `config.optimizer` names."""
    return (AdamW if config.optimizer == "adamw" else Optimizer)(parameters, config, kernels)


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
