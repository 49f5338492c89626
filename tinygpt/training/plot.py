"""loss.png: training and validation loss over steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..checkpoint import Run

_PAUSE = 10.0  # seconds between drawings: one takes as long as ten steps of a small model


class LossPlot:
    """Keeps a run's loss.png up to date, without spending the run's time on it."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._drawn = time.monotonic()  # what ends within a pause is drawn once

    def update(self, run: Run, *, last: bool = False) -> None:
        """Draw the curve anew, unless that was done a moment ago; `last`: in any case."""
        if last or time.monotonic() - self._drawn >= _PAUSE:
            plot_losses(run.metrics(), run.path / "loss.png", self.title)
            self._drawn = time.monotonic()


def plot_losses(metrics: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the losses of metrics.jsonl's lines into a PNG file."""
    from matplotlib.figure import Figure  # no pyplot: it would pick a window system and keep every figure

    figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    train = [(m["step"], m["loss"]) for m in metrics if "loss" in m]
    validation = [(m["step"], m["val_loss"]) for m in metrics if "val_loss" in m]
    if train:
        axes.plot(*zip(*train, strict=True), color="#9db7d5", linewidth=0.8, label="training (one batch)")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="#b3322b", marker="o", markersize=3.5, label="validation")
        step, loss = validation[-1]
        axes.annotate(
            f"{loss:.3f}", (step, loss), textcoords="offset points", xytext=(-4, 8), ha="right", color="#b3322b"
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if train or validation:
        axes.legend(frameon=False)
    figure.savefig(path)
