"""Pairs of source and target, for a model that reads the one and writes the other.

# B batch, S source tokens, T target tokens

Behind the tokenizer's vocabulary stand two ids: start and end. A source ends with `end`; the decoder reads start, target and is to
say target, end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...data.batches import IGNORED, Batch, draws, moved
from ...data.examples import ExampleCorpus, Examples, Rows, prepare_examples
from ...data.records import RecordSource, find_for
from ...decoding import PENALTY, search
from ...errors import UserError
from ...models._base import Model
from ...models.transformer import Transformer
from ...tokenizers import Tokenizer
from ..evaluate import Evaluation, mean_loss, perplexity
from ._base import Opening, Progress, Task

TRANSLATED = 1000
"""Validation pairs that are translated for exact match and BLEU: the first ones."""
_AT_A_TIME = 250
_SHOWN = 5


@dataclass(frozen=True)
class PairEvaluation(Evaluation):
    """exact_match: share of translations that equal the target. bleu: 0 to 100, None without sacrebleu."""

    perplexity: float
    exact_match: float
    bleu: float | None
    translated: int

    def summary(self) -> str:
        bleu = "" if self.bleu is None else f", BLEU {self.bleu:.2f}"
        return (
            f"perplexity {self.perplexity:.3f}, exact match {100 * self.exact_match:.1f} % of {self.translated:,}{bleu}"
        )

    def details(self) -> list[str]:
        return [] if self.bleu is not None else [NO_BLEU]


NO_BLEU = "BLEU needs sacrebleu: pip install 'tinygpt[bleu]'"


class Pairs(Task):
    """Sequence to sequence. Arguments as in `Task`; `beams` is what `evaluate` and `sample` decode with."""

    corpus: ExampleCorpus

    def _read(self, opening: Opening) -> None:
        config, (run, data, _) = self.config, opening
        sources = find_for(data or config.data.sources, "pairs", config.model.name)
        self.corpus, self.tokenizer = prepare_examples(
            [s for s in sources if isinstance(s, RecordSource)],
            run.tokenizer if run is not None else config.data.tokenizer,
            vocab_size=config.data.vocab_size,
            whole=bool(data),
        )
        self.beams, self.penalty = 1, PENALTY
        self.start, self.end = self.tokenizer.vocab_size, self.tokenizer.vocab_size + 1
        for examples in (self.corpus.train, self.corpus.validation):
            self._require_fit(examples)
        train = self.corpus.train
        self.row_tokens = (len(train.first.ids) + len(train.second.ids)) / max(1, len(train)) + 2

    def about(self) -> str:
        c = self.corpus
        return (
            f"{c.name}: {len(c.train):,} training and {len(c.validation):,} validation pairs, "
            f"vocabulary {self.tokenizer.vocab_size} ({self.tokenizer.name})"
        )

    def batch(self, step: int, micro: int = 0) -> Batch:
        c, train = self.config, self.corpus.train
        return self._batch(train, draws(c.training.batch_size, len(train), seed=c.seed, step=step, micro=micro))

    def validation(self, batch_size: int, count: int | None = None) -> Iterator[Batch]:
        for index in in_order(len(self.corpus.validation), batch_size, count):
            yield self._batch(self.corpus.validation, index)

    def evaluate(self, model: Model, precision: torch.dtype, progress: Progress | None = None) -> PairEvaluation:
        assert isinstance(model, Transformer)
        loss, tokens = mean_loss(model, self.validation(_AT_A_TIME), self.device, precision)
        count = min(TRANSLATED, len(self.corpus.validation))
        written: list[str] = []
        for first in range(0, count, _AT_A_TIME):
            written += self.translate(model, np.arange(first, min(first + _AT_A_TIME, count)))
            if progress:
                progress(len(written), count)
        wanted = [self.tokenizer.decode(self.corpus.validation.second[row]) for row in range(count)]
        exact = sum(a == b for a, b in zip(written, wanted, strict=True)) / count
        return PairEvaluation(loss, tokens, perplexity(loss), exact, bleu(written, wanted), count)

    def sample(self, model: Model) -> str:
        assert isinstance(model, Transformer)
        examples = self.corpus.validation
        index = np.arange(min(_SHOWN, len(examples)))
        lines = []
        for row, text in zip(index, self.translate(model, index), strict=True):
            source, target = (self.tokenizer.decode(side[int(row)]) for side in (examples.first, examples.second))
            lines.append(f"{source} -> {text}" + ("" if text == target else f"   (not {target})"))
        return "\n".join(lines)

    def translate(self, model: Transformer, index: NDArray[np.int64]) -> list[str]:
        """What the model writes for some validation sources."""
        return translate(
            model, self.tokenizer, [self.corpus.validation.first[row] for row in index], self.beams, self.penalty
        )

    def _batch(self, examples: Examples, index: NDArray[np.int64]) -> Batch:
        limit = self.config.model.block_size
        source, lengths = examples.first.padded(index, limit)
        target, written = examples.second.padded(index, limit, fill=IGNORED)
        S, T = (min(limit, -(-(int(n.max()) + 1) // 8) * 8) for n in (lengths, written))
        row = np.arange(len(index))
        source[row, lengths] = self.end
        target[row, written] = self.end
        x = np.where(target == IGNORED, 0, target)
        x = np.concatenate([np.full((len(index), 1), self.start), x[:, :-1]], axis=1)
        return moved((source[:, :S], lengths + 1, x[:, :T], target[:, :T]), self.device)

    def _require_fit(self, examples: Examples) -> None:
        limit = self.config.model.block_size
        longest = np.maximum(examples.first.lengths, examples.second.lengths) + 1
        wrong = np.flatnonzero(longest > limit)
        if len(wrong):
            first = int(wrong[0])
            side = "source" if examples.first.lengths[first] >= limit else "target"
            raise UserError(
                f"{examples.where[first]}: its {side} has {longest[first]} tokens, its end included, and model.block_size="
                f"{limit} holds {limit} ({len(wrong)} of {len(longest)} pairs are too long); set model.block_size to "
                f"{longest.max()}, or shorten them"
            )


def translate(
    model: Transformer, tokenizer: Tokenizer, sources: Sequence[NDArray[np.integer[Any]]], beams: int = 1,
    penalty: float = PENALTY,
) -> list[str]:  # fmt: skip
    """The targets that a model writes for sources, each a row of the tokenizer's ids, shorter than the model's context."""
    start, end = tokenizer.vocab_size, tokenizer.vocab_size + 1
    rows = Rows.of(np.append(source, end) for source in sources)
    ids, lengths = rows.padded(np.arange(len(rows)), int(rows.lengths.max()))
    source, lengths_B = moved((ids, lengths), model.device)
    found = search(model, source, lengths_B, start=start, end=end, beams=beams, penalty=penalty)
    return [tokenizer.decode(ids) for ids, _ in found]


def in_order(rows: int, batch_size: int, count: int | None) -> Iterator[NDArray[np.int64]]:
    """Numbers of rows, a batch at a time; `count`: only that many batches, of rows spread evenly."""
    chosen = np.arange(rows)
    if count is not None and count * batch_size < rows:
        chosen = np.arange(count * batch_size) * rows // (count * batch_size)
    for first in range(0, len(chosen), batch_size):
        yield chosen[first : first + batch_size]


def bleu(written: Sequence[str], wanted: Sequence[str]) -> float | None:
    """Corpus BLEU (Papineni et al. 2002) as sacrebleu has it (Post 2018); None where that is not installed.

    Where no target holds a space, words would be whole targets: characters are compared instead.
    """
    try:
        import sacrebleu
    except ImportError:
        return None
    tokenize = "13a" if any(" " in text for text in wanted) else "char"
    # Effective order: where every target is shorter than four words, the longer n-grams that nobody has do not count.
    metric = sacrebleu.BLEU(tokenize=tokenize, effective_order=True)
    return float(metric.corpus_score(list(written), [list(wanted)]).score)


TASK = Pairs
