"""Byte-level byte pair encoding (Sennrich et al. 2016; Radford et al. 2019), trained on the corpus."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, models, trainers

from ._base import check_size
from ._subword import SubwordTokenizer


class BpeTokenizer(SubwordTokenizer):
    """The commonest pair of neighbouring tokens becomes a token, again and again."""

    name = "bpe"
    model = "BPE"
    sample = 1 << 27

    def smaller(self, vocab_size: int) -> BpeTokenizer:
        """What training on the same text with a smaller `vocab_size` gives: the merges come in the same order."""
        size = check_size(self.name, vocab_size, self.specials)
        assert size is not None
        described = json.loads(self._library.to_str())
        model = described["model"]
        kept = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])][
            : size - len(self.specials)
        ]
        model["vocab"] = {token: i for i, token in enumerate(kept)}
        merges = []
        left = set(kept[256:])
        for first, second in model["merges"]:
            if not left:
                break
            merges.append([first, second])
            left.discard(first + second)
        model["merges"] = merges
        return BpeTokenizer(Tokenizer.from_str(json.dumps(described)), specials=self.specials)

    @classmethod
    def _empty(cls) -> models.Model:
        return models.BPE()

    @classmethod
    def _trainer(cls, **settings: Any) -> trainers.Trainer:
        return trainers.BpeTrainer(**settings)
