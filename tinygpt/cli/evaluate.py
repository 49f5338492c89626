"""`tinygpt eval`: how well a run predicts text."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from ..errors import UserError
from .arguments import Eval, flat
from .backends import tell_idle, tell_served
from .early import find_readable, settle_backend


def plan(args: Eval) -> Callable[[], int]:
    """Check all that needs no torch, and return the evaluation.

    Raises:
        UserError: what --data names cannot be read; nothing was begun.
    """
    find_readable(flat(args.data))
    settle_backend(args.backend)
    return lambda: _evaluate(args)


def _evaluate(args: Eval) -> int:
    from ..checkpoint import Run
    from ..data.corpus import TRAIN_SHARE, prepare
    from ..models.gpt import GPT
    from ..training import evaluate as evaluation
    from ..training import machine
    from ..training.display import for_errors

    run = Run.open(args.run)
    files = flat(args.data)
    display = for_errors()
    corpus, _ = prepare(
        files or run.config.data.sources,
        run.tokenizer,
        progress=display.preparing,
        train_share=0.0 if files else TRAIN_SHARE,
    )
    display.close()
    recorded = run.facts.get("corpus", {}).get("fingerprint")
    if not files and recorded != corpus.fingerprint:
        raise UserError(
            f"the corpus {corpus.name} has changed since {args.run} was trained, and with it the validation split; "
            "restore it, or name the text to evaluate with --data"
        )
    for notice in corpus.notices:
        print(f"tinygpt: {notice}", file=sys.stderr)
    device = machine.pick_device(args.device)
    if not args.strict:
        tell_idle(args.backend, device.type)
    precision = machine.pick_precision(run.config.training.precision, device)
    model = GPT.from_run(args.run, backend=args.backend, strict=args.strict, device=str(device))
    found = evaluation.evaluate(model, corpus, device, precision, progress=display.evaluating)
    display.close()
    values = {
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_char": found.bits_per_char,
        "bits_per_byte": found.bits_per_byte,
    }
    if args.json:
        print(json.dumps(values, indent=1))
        tell_served(args.backend, model.kernels)
        return 0

    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{corpus.name}, {found.tokens:,} tokens", title_justify="left", show_header=False)
    for name, value in values.items():
        table.add_row(name.replace("_", " "), f"{value:.4f}", {"loss": "nats per token"}.get(name, ""))
    Console().print(table)
    tell_served(args.backend, model.kernels)
    return 0
