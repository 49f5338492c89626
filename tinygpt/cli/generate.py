"""`tinygpt generate`: text from a run, written as it is sampled."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .arguments import Generate
from .backends import tell_idle, tell_served
from .early import settle_backend

if TYPE_CHECKING:
    from ..checkpoint import Run


def plan(args: Generate) -> Callable[[], int]:
    """Check all that needs no torch, and return the sampling.

    Raises:
        UserError: an argument is wrong; nothing was begun.
    """
    if args.tokens < 0:
        raise UserError(f"--tokens {args.tokens} must be at least 0")
    if not (args.temperature >= 0 and math.isfinite(args.temperature)):
        raise UserError(f"--temperature {args.temperature} must be 0 (greedy) or above")
    if args.top_k is not None and args.top_k < 1:
        raise UserError(f"--top-k {args.top_k} must be at least 1")
    if args.beams < 1:
        raise UserError(f"--beams {args.beams} must be at least 1")
    settle_backend(args.backend)
    return lambda: _generate(args)


def _generate(args: Generate) -> int:
    from .. import models
    from ..checkpoint import Run
    from ..tokenizers import name_characters
    from ..training.machine import pick_device

    device = pick_device(args.device)
    if not args.strict:
        tell_idle(args.backend, device.type)
    run = Run.open(args.run)
    model = models.load(run, backend=args.backend, strict=args.strict, device=str(device))
    prompt = args.prompt
    if strange := run.tokenizer.unknown_characters(prompt):
        print(
            f"tinygpt: the prompt holds characters this run never saw: {name_characters(strange)}; they are left out",
            file=sys.stderr,
        )
        prompt = "".join(c for c in prompt if c not in strange)
    answer = {"text": _continue, "pairs": _translate, "labelled": _classify}[models.kind(run.config.model.name).reads]
    for piece in answer(args, run, model, prompt):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    tell_served(args.backend, model.kernels)
    return 0


def _continue(args: Generate, run: Run, model: Any, prompt: str) -> Iterator[str]:
    from .. import generation
    from ..models import kind

    # PyTorch's own default seed is the same in every process.
    seed = random.randrange(1 << 31) if args.seed is None else args.seed
    line_end = generation.line_end(run.tokenizer) if kind(run.config.model.name).task == "lines" else None
    yield prompt
    yield from generation.sample(
        model, run.tokenizer, prompt, count=args.tokens, temperature=args.temperature, top_k=args.top_k, seed=seed,
        line_end=line_end,
    )  # fmt: skip


def _translate(args: Generate, run: Run, model: Any, prompt: str) -> Iterator[str]:
    from ..data.examples import encode_known
    from ..training.tasks.pairs import translate

    ids, limit = encode_known(run.tokenizer, prompt), run.config.model.block_size - 1
    if len(ids) > limit:
        raise UserError(f"the prompt has {len(ids)} tokens; this run's context holds {limit} and their end")
    yield from translate(model, run.tokenizer, [ids], args.beams)


def _classify(args: Generate, run: Run, model: Any, prompt: str) -> Iterator[str]:
    from ..training.tasks.labelled import classify_text

    label, p = classify_text(model, run.tokenizer, prompt, run.facts["labels"])
    yield f"{label} ({100 * p:.1f} %)"
