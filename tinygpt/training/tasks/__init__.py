"""What a model is trained on and measured by: everything between data and the loop that differs from model to model.

One module per task, which `models.MODELS` names; its class stands in `TASK`. `_base.Task` says what each answers.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ...config import RunConfig
from ...errors import UserError
from ...models import kind
from ._base import Opening, Preparing, Task

if TYPE_CHECKING:
    from ...checkpoint import Run

__all__ = ["Task", "open_task"]


def open_task(
    config: RunConfig,
    device: torch.device,
    run: Run | None = None,
    *,
    data: Sequence[str] = (),
    preparing: Preparing | None = None,
) -> Task:
    """The task of a model, with its data read.

    Args:
        run: what is resumed or evaluated; its tokenizer is taken, and its corpus must be what it was.
        data: other data, all of it to be evaluated.
        preparing: told of long work on the data.

    Raises:
        UserError: data that cannot be read, has changed, or does not suit the model.
    """
    cls: type[Task] = importlib.import_module(f".{kind(config.model.name).task}", __name__).TASK
    task = cls(config, device, Opening(run, data, preparing))
    recorded = run.facts.get("corpus", {}) if run is not None else {}
    if run is not None and not data and recorded.get("fingerprint") != task.corpus.fingerprint:
        before = {part["name"]: part["sha256"] for part in recorded.get("parts", [])}
        now = {part.name: part.sha256 for part in task.corpus.parts}
        changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        raise UserError(
            f"the corpus has changed since this run began ({', '.join(changed[:3]) or task.corpus.name}): restore it, "
            "or train anew with --overwrite or another --out; `tinygpt eval --data` takes other data"
        )
    return task
