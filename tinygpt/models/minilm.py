"""The small language model: the same decoder as `gpt`, as the first transformers were built and fed.

Norms stand after the additions, the activation is ReLU, and a row is a line of at most 20 tokens, padded at its end. The
causal mask keeps padding out of attention: a token sees what stands before it, and padding stands behind all of them. Its
targets are -100, which keeps it out of the loss.
"""

from __future__ import annotations

from .gpt import GPT


class MiniLM(GPT):
    """`GPT` with the settings of `MODELS["minilm"]`, trained on padded lines (training/tasks/lines.py)."""
