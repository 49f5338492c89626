"""Hugging Face's GPT-2 of a given size, from a configuration alone: nothing is downloaded. Needs the `bench` extra."""

from __future__ import annotations

import os

import torch.nn.functional as F
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class HuggingFaceGPT(nn.Module):
    """GPT-2 with its biases, without dropout; returns the loss as the plain model does.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """

    def __init__(self, vocab_size: int, layers: int, heads: int, width: int, block_size: int) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        config = GPT2Config(
            vocab_size=vocab_size, n_positions=block_size, n_embd=width, n_layer=layers, n_head=heads, use_cache=False,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0, attn_implementation="sdpa",
        )  # fmt: skip
        self.model = GPT2LMHeadModel(config)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(input_ids=tokens).logits
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def available() -> bool:
    """Whether transformers can be imported."""
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True
