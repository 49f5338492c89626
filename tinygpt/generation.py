"""Sampling text from a model, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .errors import UserError
from .models._base import Model
from .tokenizers import Tokenizer


@torch.inference_mode()
def next_token(logits_V: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> int:
    """Draw a token: softmax(logits / temperature) over the `top_k` largest (Fan et al. 2018); temperature 0 takes the largest."""
    if temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V.float() / temperature
    if top_k is not None and top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial(torch.softmax(logits_V, dim=-1), 1, generator=generator))


def generate(
    model: Model, tokens: Sequence[int], *, count: int, temperature: float = 0.8, top_k: int | None = None,
    seed: int | None = None, line_end: int | None = None,
) -> Iterator[int]:  # fmt: skip
    """Token ids that follow `tokens`, as they are drawn. The model sees the last `block_size` tokens.

    Args:
        model: of text: `model(tokens)` must be the logits of what follows.
        tokens: at least one id. count: how many to draw. temperature: 0 is greedy. top_k: None means all.
        seed: None draws from PyTorch's global generator.
        line_end: a token before whose last appearance the model sees nothing, if it was trained on lines.

    Raises:
        UserError: a value out of range.
    """
    if not tokens:
        raise ValueError("generation starts from at least one token")
    if temperature < 0:
        raise UserError(f"--temperature {temperature} must be 0 (greedy) or above")
    if top_k is not None and top_k < 1:
        raise UserError(f"--top-k {top_k} must be at least 1")
    if count < 0:
        raise UserError(f"--tokens {count} must be at least 0")
    return _draw(model, list(tokens), count, temperature, top_k, seed, line_end)


def _draw(
    model: Model, context: list[int], count: int, temperature: float, top_k: int | None, seed: int | None,
    line_end: int | None,
) -> Iterator[int]:  # fmt: skip
    device = model.device
    # On the CPU whatever the model's device is: a seed then means the same text everywhere, up to rounding.
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    was_training = model.training
    model.eval()
    try:
        for _ in range(count):
            with torch.inference_mode():
                window = context[-model.config.block_size :]
                if line_end in window:
                    window = window[len(window) - 1 - window[::-1].index(line_end) :]
                logits = model(torch.tensor([window], device=device))[0].cpu()
            token = next_token(logits, temperature, top_k, generator)
            context.append(token)
            yield token
    finally:
        model.train(was_training)


def start(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt; an empty one, or one with nothing the tokenizer knows, starts from a line break, else from token 0."""
    for text in (prompt, "\n"):
        ids = [int(i) for i in tokenizer.encode(text)]
        if ids:
            return ids
    return [0]


def sample(
    model: Model, tokenizer: Tokenizer, prompt: str = "", *, count: int = 200, temperature: float = 0.8,
    top_k: int | None = None, seed: int | None = None, line_end: int | None = None,
) -> Iterator[str]:  # fmt: skip
    """The continuation of a prompt, piece by piece: as soon as a token completes a character, and never less than one."""
    prompt_ids = start(tokenizer, prompt)
    decoder = tokenizer.decoder()
    decoder.feed(prompt_ids)  # what follows a word begins with a space, where words are tokens
    for token in generate(
        model, prompt_ids, count=count, temperature=temperature, top_k=top_k, seed=seed, line_end=line_end
    ):
        if piece := decoder.feed([token]):
            yield piece
    if rest := decoder.finish():
        yield rest


def line_end(tokenizer: Tokenizer) -> int | None:
    """The token that ends a line, where one token does."""
    ids = tokenizer.encode("\n")
    return int(ids[0]) if len(ids) == 1 else None
