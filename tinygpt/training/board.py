"""Metrics for TensorBoard, for those who watch them there (extra `log`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError


class Board:
    """Writes numbers of metrics.jsonl's lines to `folder` as scalars. After a resume, later steps of the past are hidden."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "training.tensorboard=true needs TensorBoard: pip install 'tinygpt[log]', or leave it out; "
                "metrics.jsonl holds the same numbers"
            ) from None
        self.writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Write the numbers among `values`."""
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush."""
        self.writer.close()
