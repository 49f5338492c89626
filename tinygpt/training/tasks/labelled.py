"""Labelled lines, for a model that names their class.

# B batch, T tokens, L classes
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...data.batches import Batch, draws, moved
from ...data.examples import ExampleCorpus, Examples, encode_known, prepare_examples
from ...data.records import RecordSource, find_for
from ...models._base import Model
from ...models.encoder import Encoder
from ...tokenizers import Tokenizer
from ..evaluate import Evaluation, mean_loss
from ..machine import autocast
from ._base import Opening, Progress, Task
from .pairs import in_order

_AT_A_TIME = 64
_SHOWN = 5


@dataclass(frozen=True)
class LabelEvaluation(Evaluation):
    """accuracy: share of lines whose likeliest class is theirs. confusion: lines of each class by what they were taken for."""

    accuracy: float
    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]

    def summary(self) -> str:
        return f"accuracy {100 * self.accuracy:.1f} % of {self.tokens:,}"

    def figures(self) -> dict[str, float]:
        return {"loss": self.loss, "accuracy": self.accuracy}

    def details(self) -> list[str]:
        """Recall of each class, and what its lines were most often taken for."""
        width = max(map(len, self.labels))
        lines = []
        for i, (label, row) in enumerate(zip(self.labels, self.confusion, strict=True)):
            wrong = {self.labels[j]: n for j, n in enumerate(row) if j != i and n}
            most = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))[:3]
            taken = f", taken for {', '.join(f'{name} {n}' for name, n in most)}" if most else ""
            lines.append(f"{label:<{width}}  {row[i]} of {sum(row)} right{taken}")
        return lines


class Labelled(Task):
    """Classification. A text longer than the context is cut, which is said; its beginning decides."""

    corpus: ExampleCorpus
    labels: tuple[str, ...]
    unit = "line"

    def _read(self, opening: Opening) -> None:
        config, (run, data, _) = self.config, opening
        sources = find_for(data or config.data.sources, "labelled", config.model.name)
        self.corpus, self.tokenizer = prepare_examples(
            [s for s in sources if isinstance(s, RecordSource)],
            run.tokenizer if run is not None else config.data.tokenizer,
            vocab_size=config.data.vocab_size,
            labels=run.facts["labels"] if run is not None else (),
            whole=bool(data),
        )
        self.labels = self.corpus.labels
        self.row_tokens = len(self.corpus.train.first.ids) / max(1, len(self.corpus.train))

    def about(self) -> str:
        c, block = self.corpus, self.config.model.block_size
        cut = int(sum((half.first.lengths > block).sum() for half in (c.train, c.validation)))
        return (
            f"{c.name}: {len(c.train):,} training and {len(c.validation):,} validation lines of {len(self.labels)} classes, "
            f"vocabulary {self.tokenizer.vocab_size} ({self.tokenizer.name})"
            + (f"; {cut:,} lines are cut at model.block_size={block} tokens" if cut else "")
        )

    def batch(self, step: int, micro: int = 0) -> Batch:
        c, train = self.config, self.corpus.train
        return self._batch(train, draws(c.training.batch_size, len(train), seed=c.seed, step=step, micro=micro))

    def validation(self, batch_size: int, count: int | None = None) -> Iterator[Batch]:
        for index in in_order(len(self.corpus.validation), batch_size, count):
            yield self._batch(self.corpus.validation, index)

    def evaluate(self, model: Model, precision: torch.dtype, progress: Progress | None = None) -> LabelEvaluation:
        loss, count = mean_loss(model, self.validation(_AT_A_TIME), self.device, precision)
        confusion = np.zeros((len(self.labels), len(self.labels)), np.int64)
        for tokens, lengths, labels in self.validation(_AT_A_TIME):
            with torch.inference_mode(), autocast(self.device, precision):
                taken = _evaluating(model, tokens, lengths).argmax(-1)
            np.add.at(confusion, (labels.cpu().numpy(), taken.cpu().numpy()), 1)
            if progress:
                progress(int(confusion.sum()), count)
        rows = tuple(tuple(int(n) for n in row) for row in confusion)
        return LabelEvaluation(loss, count, float(confusion.trace() / count), self.labels, rows)

    def sample(self, model: Model) -> str:
        assert isinstance(model, Encoder)
        examples = self.corpus.validation
        lines = []
        for row in range(min(_SHOWN, len(examples))):
            label, p = classify(model, examples.first[row], self.labels)
            right = self.labels[examples.labels[row]]
            text = self.tokenizer.decode(examples.first[row])
            lines.append(f"{label} ({100 * p:.0f} %){'' if label == right else f', not {right}'}: {text}")
        return "\n".join(lines)

    def _batch(self, examples: Examples, index: NDArray[np.int64]) -> Batch:
        limit = self.config.model.block_size
        longest = int((examples.first.starts[index + 1] - examples.first.starts[index]).max())
        tokens, lengths = examples.first.padded(index, min(limit, max(8, -(-longest // 8) * 8)))
        return moved((tokens, lengths, examples.labels[index]), self.device)


def classify(model: Encoder, ids: NDArray[np.integer[Any]], labels: Sequence[str]) -> tuple[str, float]:
    """The likeliest class of a text's token ids, and its probability."""
    ids = ids[: model.config.block_size]
    tokens = torch.zeros(1, max(1, len(ids)), dtype=torch.int64)
    tokens[0, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
    with torch.inference_mode():
        logits = _evaluating(model, tokens.to(model.device), torch.tensor([len(ids)], device=model.device))
    p = torch.softmax(logits[0].float(), -1)
    return labels[int(p.argmax())], float(p.max())


def classify_text(model: Encoder, tokenizer: Tokenizer, text: str, labels: Sequence[str]) -> tuple[str, float]:
    """`classify` for a text."""
    return classify(model, encode_known(tokenizer, text), labels)


def _evaluating(model: Model, *inputs: torch.Tensor) -> torch.Tensor:
    """The model's output in evaluation mode; its mode is as it was afterwards."""
    was_training = model.training
    model.eval()
    output = model(*inputs)
    model.train(was_training)
    return output


TASK = Labelled
