"""What every task answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from ...config import RunConfig
from ...data.batches import Batch
from ...models import kind
from ...models._base import Model
from ...tokenizers import Tokenizer
from ..evaluate import Evaluation, mean_loss

if TYPE_CHECKING:
    from ...checkpoint import Run
    from ...data.sources import Identity

Progress = Callable[[int, int], None]
"""Told how much of an evaluation is done, and of how much."""


Preparing = Callable[[str, int, int | None], None]
"""Told what is being done to data before the first batch, how much of it, and of how much if that is known."""


class AnyCorpus(Protocol):
    """What all corpora know of themselves: see `data.corpus.Corpus`."""

    @property
    def name(self) -> str: ...
    @property
    def parts(self) -> tuple[Identity, ...]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def notices(self) -> tuple[str, ...]: ...


class Opening(NamedTuple):
    """What a task reads, as in `open_task`: the data of a run, or other data."""

    run: Run | None = None
    data: Sequence[str] = ()
    preparing: Preparing | None = None


class Task(ABC):
    """Data as batches, and what a model makes of it.

    Args:
        config: of the run. device: where batches go. opening: what is read.

    Attributes:
        corpus, tokenizer: what was read.
        row_tokens: tokens of an average row of a batch, for throughput.
        labels: the names of a classifier's classes, else None.
        unit: what a target is called.
    """

    corpus: AnyCorpus
    tokenizer: Tokenizer
    row_tokens: float
    labels: tuple[str, ...] | None = None
    unit: str = "token"

    def __init__(self, config: RunConfig, device: torch.device, opening: Opening) -> None:
        self.config, self.device = config, device
        self._read(opening)

    @abstractmethod
    def _read(self, opening: Opening) -> None:
        """Fill `corpus`, `tokenizer`, `row_tokens` and what else comes from the data.

        Raises:
            UserError: data that cannot be read or does not suit the model.
        """

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer, and those that the task needs beside them."""
        return self.tokenizer.vocab_size + kind(self.config.model.name).extra_tokens

    @property
    def classes(self) -> int | None:
        """Number of labels."""
        return None if self.labels is None else len(self.labels)

    @abstractmethod
    def about(self) -> str:
        """Corpus, its sizes and its vocabulary, in one line."""

    @abstractmethod
    def batch(self, step: int, micro: int = 0) -> Batch:
        """The training batch of a step: the same for the same seed, step and microbatch."""

    @abstractmethod
    def validation(self, batch_size: int, count: int | None = None) -> Iterator[Batch]:
        """The validation data in order; `count`: only that many batches, spread evenly over it."""

    @abstractmethod
    def evaluate(self, model: Model, precision: torch.dtype, progress: Progress | None = None) -> Evaluation:
        """All that is measured of a model on the validation data."""

    @abstractmethod
    def sample(self, model: Model) -> str:
        """What the model writes, for a person to look at. The same for the same model."""

    def subset_loss(self, model: Model, precision: torch.dtype) -> float:
        """Mean loss over a fixed subset of the validation data."""
        t = self.config.training
        return mean_loss(model, self.validation(t.batch_size, t.eval_batches), self.device, precision)[0]

    def estimate(self, model: Model, precision: torch.dtype) -> float | None:
        """nanoGPT's estimate of the loss, where the data is a stream of tokens."""
        return None

    def facts(self) -> dict[str, Any]:
        """What config.json records of the data."""
        return {"labels": list(self.labels)} if self.labels is not None else {}
