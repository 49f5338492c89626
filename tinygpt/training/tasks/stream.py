"""A stream of tokens: windows at random places, every token the target of those before it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ... import generation
from ...data.batches import Batch, consecutive_batches, random_batch
from ...data.corpus import TRAIN_SHARE, Corpus, prepare, require_blocks
from ...models._base import Model
from ..evaluate import TextEvaluation, evaluate, random_estimate
from ._base import Opening, Progress, Task


class Stream(Task):
    """Text, for models that continue it."""

    corpus: Corpus
    line_end: int | None = None

    def _read(self, opening: Opening) -> None:
        config, (run, data, preparing) = self.config, opening
        self.corpus, self.tokenizer = prepare(
            data or config.data.sources,
            run.tokenizer if run is not None else config.data.tokenizer,
            vocab_size=config.data.vocab_size if run is None else None,
            train_share=0.0 if data else TRAIN_SHARE,
            progress=preparing,
        )
        if not data:
            require_blocks(self.corpus, config.model.block_size)
        self.row_tokens = float(config.model.block_size)

    def about(self) -> str:
        c = self.corpus
        return (
            f"{c.name}: {len(c.train):,} training and {len(c.validation):,} validation tokens, "
            f"vocabulary {self.tokenizer.vocab_size} ({self.tokenizer.name})"
        )

    def batch(self, step: int, micro: int = 0) -> Batch:
        c = self.config
        return random_batch(self.corpus.train, c.training.batch_size, c.model.block_size, seed=c.seed, step=step,
                            micro=micro, device=self.device)  # fmt: skip

    def validation(self, batch_size: int, count: int | None = None) -> Iterator[Batch]:
        block = self.config.model.block_size
        return consecutive_batches(self.corpus.validation, batch_size, block, count=count, device=self.device)

    def evaluate(self, model: Model, precision: torch.dtype, progress: Progress | None = None) -> TextEvaluation:
        return evaluate(model, self.corpus, self.device, precision, batches=self.validation, progress=progress)

    def estimate(self, model: Model, precision: torch.dtype) -> float | None:
        c = self.config
        return random_estimate(model, self.corpus.validation, c.training.batch_size, c.seed, self.device, precision)

    def sample(self, model: Model) -> str:
        count, seed = self.config.training.sample_tokens, self.config.seed
        return "".join(generation.sample(model, self.tokenizer, count=count, seed=seed, line_end=self.line_end))


TASK = Stream
