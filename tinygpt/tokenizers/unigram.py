"""SentencePiece's unigram language model (Kudo 2018), trained on the corpus, on bytes."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, models, trainers

from ._subword import SubwordTokenizer


class UnigramTokenizer(SubwordTokenizer):
    """From many candidate tokens those are kept without which the text would become least likely."""

    name = "unigram"
    model = "Unigram"
    sample = 1 << 23  # measured: 8 million characters take half a minute and 0.9 GB, and more are not better

    @classmethod
    def _finish(cls, trained: Tokenizer) -> Tokenizer:
        # The library reads no more than 15 digits of a number exactly: with more, what is saved would come back as another tokenizer.
        described = json.loads(trained.to_str())
        described["model"]["vocab"] = [[piece, round(score, 10)] for piece, score in described["model"]["vocab"]]
        return Tokenizer.from_str(json.dumps(described))

    @classmethod
    def _empty(cls) -> models.Model:
        return models.Unigram()

    @classmethod
    def _trainer(cls, **settings: Any) -> trainers.Trainer:
        return trainers.UnigramTrainer(**settings)
