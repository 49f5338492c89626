"""Byte-level byte pair encoding (Sennrich et al. 2016; Radford et al. 2019), trained on the corpus."""

from __future__ import annotations

from typing import Any

from tokenizers import models, trainers

from ._subword import SubwordTokenizer


class BpeTokenizer(SubwordTokenizer):
    """The commonest pair of neighbouring tokens becomes a token, again and again."""

    name = "bpe"
    model = "BPE"
    sample = 1 << 27

    @classmethod
    def _empty(cls) -> models.Model:
        return models.BPE()

    @classmethod
    def _trainer(cls, **settings: Any) -> trainers.Trainer:
        return trainers.BpeTrainer(**settings)
