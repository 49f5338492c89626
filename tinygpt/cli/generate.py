"""`tinygpt generate`: text from a run, written as it is sampled."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable

from ..errors import UserError
from .arguments import Generate
from .backends import tell_idle, tell_served
from .early import settle_backend


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
    settle_backend(args.backend)
    return lambda: _generate(args)


def _generate(args: Generate) -> int:
    from ..checkpoint import Run
    from ..generation import sample
    from ..models.gpt import GPT
    from ..tokenizers import name_characters
    from ..training.machine import pick_device

    device = pick_device(args.device)
    if not args.strict:
        tell_idle(args.backend, device.type)
    tokenizer = Run.open(args.run).tokenizer
    model = GPT.from_run(args.run, backend=args.backend, strict=args.strict, device=str(device))
    prompt = args.prompt
    if strange := tokenizer.unknown_characters(prompt):
        print(
            f"tinygpt: the prompt holds characters this run never saw: {name_characters(strange)}; they are left out",
            file=sys.stderr,
        )
        prompt = "".join(c for c in prompt if c not in strange)
    # PyTorch's own default seed is the same in every process.
    seed = random.randrange(1 << 31) if args.seed is None else args.seed
    _write(prompt)
    for piece in sample(
        model, tokenizer, prompt, count=args.tokens, temperature=args.temperature, top_k=args.top_k, seed=seed
    ):
        _write(piece)
    _write("\n")
    tell_served(args.backend, model.kernels)
    return 0


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
