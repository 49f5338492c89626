"""`tinygpt eval`: how well a run predicts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from ..errors import UserError
from .arguments import Eval, flat
from .backends import tell_idle, tell_served
from .early import find_readable, recorded_config, settle_backend


def plan(args: Eval) -> Callable[[], int]:
    """Check all that needs no torch, and return the evaluation.

    Raises:
        UserError: what --data names cannot be read; nothing was begun.
    """
    if args.beams < 1:
        raise UserError(f"--beams {args.beams} must be at least 1")
    config = recorded_config(args.run)
    find_readable(flat(args.data), config.model.name if config else "gpt")
    settle_backend(args.backend)
    return lambda: _evaluate(args)


def _evaluate(args: Eval) -> int:
    from .. import models
    from ..checkpoint import Run
    from ..training import machine
    from ..training.display import for_errors
    from ..training.tasks import open_task
    from ..training.tasks.pairs import Pairs

    run = Run.open(args.run)
    device = machine.pick_device(args.device)
    if not args.strict:
        tell_idle(args.backend, device.type)
    model = models.load(run, backend=args.backend, strict=args.strict, device=str(device))
    display = for_errors()
    task = open_task(run.config, device, run, data=flat(args.data), preparing=display.preparing)
    display.close()
    if isinstance(task, Pairs):
        task.beams = args.beams
    elif args.beams > 1:
        raise UserError(f"--beams is for translations; {args.run} is a {run.config.model.name}")
    for notice in task.corpus.notices:
        print(f"tinygpt: {notice}", file=sys.stderr)
    precision = machine.pick_precision(run.config.training.precision, device)
    found = task.evaluate(model, precision, display.evaluating)
    display.close()
    if args.json:
        print(json.dumps(found.figures(), indent=1))
        tell_served(args.backend, model.kernels)
        return 0

    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{task.corpus.name}, {found.tokens:,} {task.unit}s", title_justify="left", show_header=False)
    for name, value in found.figures().items():
        table.add_row(name.replace("_", " "), f"{value:.4f}", {"loss": f"nats per {task.unit}"}.get(name, ""))
    console.print(table)
    for line in found.details():
        console.print(line, markup=False, highlight=False)
    tell_served(args.backend, model.kernels)
    return 0
