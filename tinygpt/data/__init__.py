"""Corpora: where text comes from, how it becomes tokens on disk, and how batches are drawn from them.

>>> corpus, tokenizer = prepare(["shakespeare"])
>>> x_BT, y_BT = random_batch(corpus.train, 12, 64, seed=1337, step=0)

torch is imported by `batches` alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batches import consecutive_batches, random_batch, random_batches
    from .cache import clear_cache, list_cache
    from .corpus import Corpus, prepare, require_blocks

_HOME = {
    "Corpus": "corpus",
    "prepare": "corpus",
    "require_blocks": "corpus",
    "random_batch": "batches",
    "random_batches": "batches",
    "consecutive_batches": "batches",
    "clear_cache": "cache",
    "list_cache": "cache",
}
__all__ = [
    "Corpus",
    "clear_cache",
    "consecutive_batches",
    "list_cache",
    "prepare",
    "random_batch",
    "random_batches",
    "require_blocks",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
