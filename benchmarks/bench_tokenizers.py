"""Does `bpe` encode at the speed of the library it calls? Prepared pieces against the library by itself, in turns.

    python benchmarks/bench_tokenizers.py [--megabytes 100] [--data shakespeare] [--rounds 3]

Both get the same text in pieces of a megabyte and leave ids in NumPy arrays; the library gets each piece as a batch of its lines,
the fastest way it has. Prints how many times as fast as the library the tokenizer is, and what all tokenizers do on the first tenth.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np

from tinygpt.data.sources import find
from tinygpt.data.text import chunks
from tinygpt.errors import UserError
from tinygpt.tokenizers import Tokenizer, known_tokenizers, tokenizer_class
from tinygpt.tokenizers.bpe import BpeTokenizer


def text(name: str, megabytes: float) -> list[str]:
    """A corpus, repeated to that length, in pieces."""
    parts = [part for source in find([name]) for part in source.parts()]
    once = [piece for part in parts for piece in part.read()]
    pieces, size = [], 0
    for piece in chunks(itertools.chain.from_iterable(itertools.repeat(once))):
        pieces.append(piece)
        size += len(piece.encode())
        if size >= megabytes * 1e6:
            return pieces
    raise AssertionError


def library(tokenizer: BpeTokenizer, pieces: list[str]) -> int:
    """Tokens of the text, by the library's own batches."""
    count = 0
    for piece in pieces:
        encoded = tokenizer._library.encode_batch_fast(piece.splitlines(keepends=True), add_special_tokens=False)
        count += len(np.concatenate([np.array(found.ids, np.int64) for found in encoded]))
    return count


def ours(tokenizer: Tokenizer, pieces: list[str]) -> int:
    """Tokens of the text, as a corpus is prepared."""
    return sum(len(ids) for _, ids in tokenizer.encode_pieces(iter(pieces)))


def timed(work: Callable[[], int]) -> float:
    """Seconds it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def tokenizers(pieces: list[str]) -> Iterator[Tokenizer]:
    """All that can be had here, trained on the text."""
    for name in known_tokenizers():
        try:
            yield tokenizer_class(name).train(pieces[:4])
        except UserError as error:
            print(f"{name:<12}{error}")


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--data", default="shakespeare")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    pieces = text(arguments.data, arguments.megabytes)
    size = sum(len(piece.encode()) for piece in pieces) / 1e6
    bpe = BpeTokenizer.train(pieces[:8])
    rounds = []
    for _ in range(arguments.rounds):
        direct, through = timed(lambda: library(bpe, pieces)), timed(lambda: ours(bpe, pieces))
        rounds.append(direct / through)
        print(
            f"library {size / direct:.2f} MB/s, bpe {size / through:.2f} MB/s: {rounds[-1]:.3f} times as fast",
            flush=True,
        )
    print(
        f"median of {len(rounds)} rounds on {size:.0f} MB: {statistics.median(rounds):.3f} times as fast as the library"
    )
    tenth = pieces[: max(1, len(pieces) // 10)]
    size = sum(len(piece.encode()) for piece in tenth) / 1e6
    for tokenizer in tokenizers(pieces):
        print(f"{tokenizer.name:<12}{size / timed(lambda t=tokenizer: ours(t, tenth)):8.2f} MB/s")  # type: ignore[misc]


if __name__ == "__main__":
    main()
