"""The training loop.

A step is a pure function of (weights, optimizer state, seed, step): batches come from counters (data/batches.py), and
PyTorch's generators are reseeded from (seed, step) before each step. So a run that was killed and resumed is, byte for byte,
the run that was not, and evaluating or sampling in between changes nothing.

What differs from model to model (batches, measures, samples) is its task's (tasks/); nothing here asks which model it is.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from tinygpt_kernels import bind, timing

from .. import models
from ..checkpoint import Run, refuse_existing
from ..config import RunConfig
from ..data.batches import IGNORED
from ..errors import UserError
from ..optim import LossScale, learning_rate, make_optimizer
from . import gradients, machine
from .board import Board
from .display import Display, Status
from .evaluate import Evaluation
from .plot import LossPlot
from .tasks import open_task


@dataclass(frozen=True)
class Result:
    """How a run ended. evaluation and estimate are None when a signal stopped it before its last step, or none was asked for."""

    path: Path
    step: int
    signal: int | None
    evaluation: Evaluation | None
    estimate: float | None
    tokens_per_second: float


def train(
    config: RunConfig, out: Path, *, resume: bool = False, overwrite: bool = False, display: Display | None = None
) -> Result:
    """Train `config` into the run directory `out`; with `resume`, go on from its newest checkpoint.

    Resuming takes model, data, optimizer and seed from `config`, which the caller made of the run's own; weights and
    optimizer state come from the checkpoint.

    Raises:
        UserError: anything the user can mend; nothing that was saved before is lost.
        BackendError: the backend cannot serve this model here, with reasons; nothing was written.
    """
    display = display or Display()
    if not resume:
        refuse_existing(out, overwrite=overwrite)
    run = Run.open(out, lock=True) if resume else None
    trainer: Trainer | None = None
    try:
        trainer = Trainer(config, display, run)
        if run is None:
            run = Run.create(out, config, trainer.tokenizer, trainer.facts(), trainer.save, overwrite=overwrite)
            trainer.run = run
        return trainer.loop()
    finally:
        display.close()
        if trainer is not None and trainer.board is not None:
            trainer.board.close()
        if run is not None:
            run.close()


class Trainer:
    """A model, its data and its optimizer, ready to step."""

    def __init__(self, config: RunConfig, display: Display, run: Run | None) -> None:
        self.config, self.display, self.run = config, display, run
        self.device = machine.pick_device(config.device)
        self.precision = machine.pick_precision(config.training.precision, self.device)
        self.task = open_task(config, self.device, run, preparing=display.preparing)
        display.close()
        self.corpus, self.tokenizer = self.task.corpus, self.task.tokenizer
        for notice in self.corpus.notices:
            display.note(notice)

        self.kernels = bind(config.backend, strict=config.strict)
        generator = torch.Generator().manual_seed(config.seed)
        self.model = models.build(
            config.model, self.task.vocab_size, self.kernels, classes=self.task.classes, generator=generator
        ).to(self.device)
        self.optimizer = make_optimizer(self.model.named_parameters(), config.optim, self.kernels)
        self.loss_scale = LossScale(self.precision == torch.float16)
        self.gradients, why = gradients.choose(
            self.model, self.optimizer, self.loss_scale, self.precision, config.training
        )
        if why:
            display.note(f"gradients by autograd: {why}")
        self.step = 0
        self.val_loss: float | None = None
        self.signal: int | None = None
        self.board: Board | None = None
        self.plot = LossPlot(self._title())
        self._try_backends()
        # Of training: evaluation may be served by others, and must not look like a change when the run is resumed.
        self.served = self.kernels.served()
        self.matmul_rate = self._ceiling()
        display.header(self._header())
        if run is not None:
            self._restore(run)

    def loop(self) -> Result:
        """Train to the last step, or to a signal; either way the run can go on from where it is."""
        assert self.run is not None
        c = self.config.training
        loss = torch.zeros(())
        if c.tensorboard:
            self.board = Board(self.run.path / "tensorboard", self.step)
        done, since, spent = 0, time.perf_counter(), 0.0  # throughput counts training, not evaluation or sampling
        rate = 0.0
        with self._signals():
            if self.step == 0:
                self._evaluate(Status(0, c.steps, math.nan, 0.0, None, 0.0, None))
                if c.sample_before:
                    self._sample()
                since = time.perf_counter()
            while self.step < c.steps and self.signal is None:
                lr = learning_rate(self.config.optim, self.step, c.steps)
                loss, norm = self.train_step(lr)
                self.step += 1
                done += 1
                last = self.step == c.steps or self.signal is not None
                evaluating = self.step % c.eval_every == 0 or self.step == c.steps
                saving = self.step % c.checkpoint_every == 0 or last
                if self.step % c.log_every == 0 or evaluating or saving:
                    value = self._finite(loss)
                    now = time.perf_counter()
                    spent += now - since
                    rate = done * c.batch_size * c.accumulate * self.task.row_tokens / spent
                    status = Status(self.step, c.steps, value, lr, self.val_loss, rate, self._utilisation(rate))
                    self._log(loss=value, lr=lr, grad_norm=norm.item(), tokens_per_second=round(rate, 1))
                    self.display.update(status)
                    if evaluating:
                        self._evaluate(status)
                    if c.sample_every and self.step % c.sample_every == 0 and self.step != c.steps:
                        self._sample()
                    if saving:
                        self.save(self.run)
                    done, spent = (done, spent) if spent < 10 else (0, 0.0)
                    since = time.perf_counter()
        return self._finish(rate)

    def train_step(self, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step; returns (loss, gradient norm before clipping) as tensors, so that a GPU need not wait."""
        self._reseed()
        batches = [self.task.batch(self.step, micro) for micro in range(self.config.training.accumulate)]
        # Several microbatches make one mean: each divides its sum by the targets of all.
        denominator = None
        if len(batches) > 1:
            denominator = torch.stack([(batch[-1] != IGNORED).sum() for batch in batches]).sum().float()
        total = torch.zeros((), device=self.device)
        loss_of: Callable[..., torch.Tensor] = self.gradients
        for micro, batch in enumerate(batches):
            total += loss_of(*batch, denominator, add=micro > 0)
        self.loss_scale.unscale(p.grad for p in self.optimizer.parameters.values())
        norm = self.optimizer.clip()
        if self.device.type == "cpu":  # reading a number from elsewhere waits: there it is read when it is logged
            self._finite(total)
            self._finite(norm)
        if self.loss_scale.accepts(norm):
            self.optimizer.step(lr)
        return total, norm

    def save(self, run: Run) -> None:
        """Save a checkpoint of this moment into `run`."""
        state = {
            "step": self.step,
            "val_loss": self.val_loss,
            "optimizer": self.optimizer.state_dict(),
            "loss_scale": [self.loss_scale.scale, self.loss_scale.good_steps],
            "exactness": self._exactness(),
        }
        run.save(self.step, self.model.state_dict(), state, self.val_loss)

    def facts(self) -> dict[str, Any]:
        """What config.json records beside the config."""
        return {
            "environment": machine.describe(self.device),
            "precision": str(self.precision).removeprefix("torch."),
            "corpus": {
                "name": self.corpus.name,
                "fingerprint": self.corpus.fingerprint,
                "parts": [asdict(part) for part in self.corpus.parts],
            },
            "backends": {op: list(served) for op, served in self.served.items()},
            "gradients": self.gradients.how,
            "parameters": self.model.parameter_count(),
            **self.task.facts(),
        }

    def _restore(self, run: Run) -> None:
        self.step, weights, state = run.load_newest(self.display.note)
        models.restore(self.model, weights, run)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, KeyError, ValueError, AssertionError) as error:
            raise UserError(
                f"{run.path}: checkpoint {self.step} is of another run: {str(error).splitlines()[0]}"
            ) from None
        self.val_loss = state.get("val_loss")
        if self.loss_scale.enabled:
            self.loss_scale.scale, self.loss_scale.good_steps = state["loss_scale"]
        run.sweep(self.step)
        was, now = state.get("exactness", {}), self._exactness()
        changed = [f"{key} {was.get(key)} -> {value}" for key, value in now.items() if was.get(key) != value]
        if changed:
            self.display.note(f"not bit for bit the same run from here on: {'; '.join(changed)}")
        if self.config.training.steps != run.config.training.steps:
            self.display.note(
                f"steps {run.config.training.steps} -> {self.config.training.steps}: the learning rate follows the new length"
            )
        run.config = replace(self.config, preset=run.config.preset)
        run.facts |= {"environment": machine.describe(self.device), "backends": self.facts()["backends"]}
        run.write_config()
        self.display.note(f"resumed at step {self.step} of {self.config.training.steps}")

    def _try_backends(self) -> None:
        """One forward and backward whose gradients are dropped: what a backend refuses is said before anything is written."""
        self._reseed()
        self.gradients(*self.task.batch(0))
        self.optimizer.try_kernels()
        self.optimizer.zero_grad()

    def _reseed(self) -> None:
        seed = int(np.random.SeedSequence([self.config.seed & (2**63 - 1), self.step]).generate_state(1, np.uint64)[0])
        machine.seed_generators(self.device, seed >> 1)

    def _finite(self, value: torch.Tensor) -> float:
        number = value.item()
        if not math.isfinite(number) and not self.loss_scale.enabled:
            saved = self.run.checkpoints() if self.run else []
            raise UserError(
                f"the loss or its gradient is {number} at step {self.step}; the run stops. The last good checkpoint is that "
                f"of step {saved[-1] if saved else 0}: go on from it with --resume --set optim.lr={self.config.optim.lr / 3:.1e}, "
                "or look for broken data"
            )
        return number

    def _evaluate(self, status: Status) -> None:
        assert self.run is not None
        c = self.config
        self.val_loss = self.task.subset_loss(self.model, self.precision)
        self._log(val_loss=self.val_loss)
        if self.step:
            self.display.evaluated(replace(status, val_loss=self.val_loss))
            self.plot.update(self.run)
        else:
            self.display.note(f"step 0/{c.training.steps}  val {self.val_loss:.4f} before training")

    def _sample(self) -> None:
        assert self.run is not None
        text = self.task.sample(self.model)
        self.run.log_sample(self.step, text)
        self.display.sample(self.step, text.strip("\n"))

    def _finish(self, rate: float) -> Result:
        assert self.run is not None
        self.display.close()
        self.plot.update(self.run, last=True)
        if self.step < self.config.training.steps:
            if self.step not in self.run.checkpoints():  # the signal came after the step had been logged
                self.save(self.run)
            return Result(self.run.path, self.step, self.signal, None, None, rate)
        if not self.config.training.final_evaluation:
            self._sample()
            return Result(self.run.path, self.step, self.signal, None, None, rate)
        self.display.note("evaluating on the whole validation split")
        evaluation = self.task.evaluate(self.model, self.precision, self.display.evaluating)
        self.display.close()
        estimate = self.task.estimate(self.model, self.precision)
        self._log(final=evaluation.to_dict(), **({} if estimate is None else {"estimate": estimate}))
        self._sample()
        return Result(self.run.path, self.step, self.signal, evaluation, estimate, rate)

    def _log(self, **values: Any) -> None:
        assert self.run is not None
        self.run.log(step=self.step, **values)
        if self.board is not None:
            self.board.log(self.step, values)

    def _ceiling(self) -> float:
        """FLOP/s of the large matrix products of whoever multiplies for this run."""
        rows = self.config.training.batch_size * self.config.model.block_size
        like = torch.empty(rows, self.config.model.width, device=self.device, dtype=self.precision)
        return timing.matmul_rate(str(self.device), self.precision, [self.kernels.products(like)])

    def _utilisation(self, rate: float) -> float | None:
        work = self.model.flops_per_token()
        return None if work is None else rate * work / self.matmul_rate

    def _exactness(self) -> dict[str, Any]:
        """What has to be the same for a resumed run to be the same bit for bit."""
        facts = machine.describe(self.device)
        served = {f"backend of {op}": "+".join(names) for op, names in self.served.items()}
        return (
            {key: facts[key] for key in ("torch", "device", "gpu", "threads", "isa")}
            | served
            | {"gradients": self.gradients.how}
        )

    def _title(self) -> str:
        m = self.config.model
        return f"{self.corpus.name}: {'' if m.name == 'gpt' else m.name + ', '}{models.describe(m)}"

    def _header(self) -> list[tuple[str, str]]:
        m, t = self.config.model, self.config.training
        by_backend: dict[str, list[str]] = {}
        for op, served in self.served.items():
            by_backend.setdefault("+".join(served), []).append(op)
        one = next(iter(by_backend)) if len(by_backend) == 1 else None
        served_by = (
            f"{one} for every op" if one else " · ".join(f"{b}: {', '.join(ops)}" for b, ops in by_backend.items())
        )
        return [
            ("corpus", self.task.about()),
            ("model", f"{m.name}, {self.model.parameter_count() / 1e6:.2f} M parameters: {models.describe(m)}"),
            ("training", f"{t.steps} steps of {t.batch_size * t.accumulate} x {self.task.row_tokens:.3g} tokens, "
             f"seed {self.config.seed}"),
            ("device", f"{self.device}, {str(self.precision).removeprefix('torch.')}, "
             f"{self.matmul_rate / 1e9:,.0f} GFLOP/s in large matrix products"),
            ("backend", f"{self.config.backend} -> {served_by}; gradients {self.gradients.how}"),
        ]  # fmt: skip

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM ends the loop after the step at hand; a second SIGINT stops at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = number
            # Straight to the descriptor: the handler may have interrupted a print, and Python's streams are not reentrant.
            with suppress(OSError):
                os.write(2, b"\nfinishing this step and saving; once more to stop at once\n")

        try:
            before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: its owner handles signals
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
