"""What a person sees of a run: a live line with progress in a terminal, plain lines where output is kept, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table


@dataclass(frozen=True)
class Status:
    """Where a run is. loss: of the last step's batch; val_loss: of the last evaluation; utilisation: share of matmul rate."""

    step: int
    steps: int
    loss: float
    lr: float
    val_loss: float | None
    tokens_per_second: float
    utilisation: float | None

    def __str__(self) -> str:
        val = "" if self.val_loss is None else f"  val {self.val_loss:.4f}"
        share = "" if self.utilisation is None else f"  {100 * self.utilisation:.0f}% of matmul"
        return f"loss {self.loss:.4f}{val}  lr {self.lr:.1e}  {self.tokens_per_second:,.0f} tok/s{share}"


class Display:
    """Shows nothing; the others override what they show."""

    def header(self, rows: Sequence[tuple[str, str]]) -> None:
        """What is about to be trained."""

    def note(self, message: str) -> None:
        """One line the user should know."""

    def update(self, status: Status) -> None:
        """A step was logged."""

    def evaluated(self, status: Status) -> None:
        """The validation loss is new."""

    def evaluating(self, done: int, total: int) -> None:
        """So many tokens of a long evaluation are done."""

    def preparing(self, doing: str, done: int, total: int | None) -> None:
        """Text is read for the first time: so many characters are done, of about so many; None: nobody knows."""

    def sample(self, step: int, text: str) -> None:
        """Text the model wrote."""

    def close(self) -> None:
        """No more is shown."""


class Lines(Display):
    """Plain lines, for files and pipes: the header, one line per evaluation, samples."""

    def __init__(self) -> None:
        self._last: Status | None = None

    def header(self, rows: Sequence[tuple[str, str]]) -> None:
        width = max(len(label) for label, _ in rows)
        for label, value in rows:
            self.note(f"{label:<{width}}  {value}")

    def note(self, message: str) -> None:
        print(message, flush=True)

    def evaluated(self, status: Status) -> None:
        self.note(f"step {status.step}/{status.steps}  {status}")

    def sample(self, step: int, text: str) -> None:
        self.note(f"--- sample at step {step}\n{text}\n---")


class Live(Display):
    """A table, then one live progress line above which evaluations and samples scroll by."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("[bold]{task.completed}/{task.total}"), BarColumn(bar_width=None), TextColumn("{task.fields[status]}"),
            TextColumn("left"), TimeRemainingColumn(), console=console, transient=True,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._preparing: Progress | None = None
        self._doing = ""

    def header(self, rows: Sequence[tuple[str, str]]) -> None:
        self._prepared()
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for label, value in rows:
            table.add_row(f"[dim]{label}", value)
        self.console.print(table)

    def note(self, message: str) -> None:
        self._prepared()
        self.console.print(message, markup=False, highlight=False)

    def update(self, status: Status) -> None:
        val = "" if status.val_loss is None else f" val {status.val_loss:.3f}"
        share = "" if status.utilisation is None else f" {100 * status.utilisation:.0f}%"
        line = f"loss {status.loss:.3f}{val} lr {status.lr:.1e} {status.tokens_per_second / 1000:,.1f}k tok/s{share}"
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("", total=status.steps, completed=status.step, status=line)
        self._progress.update(self._task, completed=status.step, status=line)

    def evaluated(self, status: Status) -> None:
        self.note(f"step {status.step:>6}  {status}")

    def evaluating(self, done: int, total: int) -> None:
        self._prepared()
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("", total=total, status="")
        self._progress.update(self._task, completed=done, total=total, status="tokens evaluated")

    def preparing(self, doing: str, done: int, total: int | None) -> None:
        if doing != self._doing:
            if self._preparing is None:
                self._preparing = Progress(
                    TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                    console=self.console, transient=True,
                )  # fmt: skip
                self._preparing.start()
            for task in self._preparing.task_ids:
                self._preparing.remove_task(task)
            self._doing = doing
            self._preparing.add_task(doing, total=total)
        assert self._preparing is not None
        self._preparing.update(self._preparing.task_ids[0], completed=done, total=total)

    def _prepared(self) -> None:
        if self._preparing is not None:
            self._preparing.stop()
            self._preparing, self._doing = None, ""

    def sample(self, step: int, text: str) -> None:
        self.console.rule(f"[dim]sample at step {step}", align="left", style="dim")
        self.note(text)
        self.console.rule(style="dim")

    def close(self) -> None:
        self._prepared()
        self._progress.stop()
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None


def for_output() -> Display:
    """Live in a terminal, lines elsewhere."""
    console = Console()
    return Live(console) if console.is_terminal and sys.stdout.isatty() else Lines()


def for_errors() -> Display:
    """Live on a terminal's stderr, so that stdout holds the result alone; nothing elsewhere."""
    console = Console(stderr=True)
    return Live(console) if console.is_terminal else Display()
