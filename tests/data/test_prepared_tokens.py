"""Corpora in every tokenizer's tokens: what is kept, what is told, what it takes."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tinygpt.data import list_cache, prepare
from tinygpt.data.hub import HubDataset
from tinygpt.errors import UserError
from tinygpt.tokenizers import END, PAD, tokenizer_class

TEXT = "".join(f"to be, or not to be: {n % 97} naïve 漢字\n" for n in range(3000))
TOKENIZERS = ["char", "word", "whitespace", "bpe", "unigram"]


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_corpus_comes_back_and_is_counted_in_characters_and_bytes(name: str, text: str) -> None:
    corpus, tokenizer = prepare([text], name)
    assert tokenizer.decode(corpus.train) + tokenizer.decode(corpus.validation) == TEXT
    assert corpus.train_chars + corpus.validation_chars == len(TEXT)
    assert corpus.train_bytes + corpus.validation_bytes == len(TEXT.encode())
    again, same = prepare([text], name)
    assert again.location == corpus.location
    assert same == tokenizer
    resumed, _ = prepare([text], tokenizer)
    assert resumed.location == corpus.location


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    "content",
    ["z" * 1_200_000, "abab a bab " * 110_000, "、漢字" * 380_000],
    ids=["one character", "one line whose words fall apart into words", "CJK"],
)
def test_text_without_lines_comes_back(name: str, content: str, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(content)
    corpus, tokenizer = prepare([str(file)], name)
    assert tokenizer.decode(corpus.train) + tokenizer.decode(corpus.validation) == content


def test_each_size_and_set_of_special_tokens_has_a_vocabulary_of_its_own(text: str) -> None:
    made = [
        prepare([text], "bpe"),
        prepare([text], "bpe", vocab_size=280),
        prepare([text], "bpe", vocab_size=280, specials=(PAD, END)),
    ]
    assert [t.vocab_size for _, t in made[1:]] == [280, 280]
    assert len({corpus.location for corpus, _ in made}) == 3
    assert made[2][0].train.min() >= 2
    for corpus, tokenizer in made:
        assert tokenizer.decode(corpus.train) + tokenizer.decode(corpus.validation) == TEXT
    with pytest.raises(UserError, match="is too small"):
        prepare([text], "bpe", vocab_size=100)


def test_a_token_file_of_another_tokenizer_is_not_taken(text: str) -> None:
    one, _ = prepare([text], "bpe", vocab_size=280)
    other, tokenizer = prepare([text], "bpe", vocab_size=300)
    shutil.copy(one.location, other.location)
    again, _ = prepare([text], "bpe", vocab_size=300)
    assert tokenizer.decode(again.train) + tokenizer.decode(again.validation) == TEXT
    assert not np.array_equal(again.train, one.train)


@pytest.mark.parametrize("name", ["word", "bpe"])
def test_characters_of_other_text(name: str, text: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_class(name).train(["to be or not\n" * 9])
    corpus, _ = prepare([text], tokenizer)
    back = tokenizer.decode(corpus.train) + tokenizer.decode(corpus.validation)
    if name == "bpe":
        assert back == TEXT
        assert corpus.notices == ()
    else:
        assert back == "".join(c for c in TEXT if c in "to be or not\n")
        assert "'漢'" in corpus.notices[0]


def test_progress_names_each_stage_and_ends_at_the_whole(text: str) -> None:
    told: list[tuple[str, int, int | None]] = []
    prepare([text], "bpe", progress=lambda *now: told.append(now))
    assert list(dict.fromkeys(doing for doing, _, _ in told)) == ["reading", "training the tokenizer", "tokenising"]
    assert {total for _, _, total in told} == {len(TEXT.encode())}
    assert told[-1][:2] == ("tokenising", len(TEXT))
    told.clear()
    prepare([text], "bpe", progress=lambda *now: told.append(now))
    assert told == []


KILLED = """
import os, signal, sys
from tinygpt.data import prepare
def progress(doing, done, total):
    if doing == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)
prepare(sys.argv[3:], sys.argv[2], progress=progress)
"""


@pytest.mark.parametrize("name", ["word", "bpe"])
@pytest.mark.parametrize("where", ["reading", "training the tokenizer", "tokenising"])
def test_killed_anywhere_it_was_not_prepared(
    where: str, name: str, text: str, cache: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start(KILLED, where, name, text)
    process.communicate(timeout=60)
    if (name, where) == ("word", "training the tokenizer"):  # nothing to wait for there
        assert process.returncode == 0
        return
    assert process.returncode == -signal.SIGKILL
    assert not list(cache.glob("tokens/*.tokens"))
    assert len(list(cache.glob("tokenizers/*.json"))) == (where == "tokenising")
    corpus, tokenizer = prepare([text], name)
    assert tokenizer.decode(corpus.train) + tokenizer.decode(corpus.validation) == TEXT
    assert {entry.kind for entry in list_cache()} == {"tokens", "tokenizers"}


@pytest.mark.parametrize("name", ["word", "bpe"])
def test_published_splits_in_words_and_bytes(name: str, tmp_path: Path) -> None:
    """TinyStories' shape: Parquet files with a column of text, and a validation split of its own."""
    from datasets import Dataset

    rows = {"train": [f"Once there was a cat {n}." for n in range(400)], "validation": ["The cat sat.", "The end."]}
    files = {}
    for split, texts in rows.items():
        files[split] = str(tmp_path / f"{split}.parquet")
        Dataset.from_dict({"text": texts}).to_parquet(files[split])
    corpus, tokenizer = prepare([HubDataset("stories", "parquet", data_files=files, separator="\n\n")], name)
    assert tokenizer.decode(corpus.validation) == "The cat sat.\n\nThe end."
    assert tokenizer.decode(corpus.train) == "\n\n".join(rows["train"])


MEASURED = """
import resource, sys
from tinygpt.data import prepare
prepare([sys.argv[2]], sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
corpus, tokenizer = prepare([sys.argv[3]], sys.argv[1])
megabyte = 1 << 20 if sys.platform == "darwin" else 1 << 10  # of ru_maxrss
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / megabyte, len(corpus.train), corpus.train_chars)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["char", "word", "bpe"])
def test_memory_stays_flat(name: str, run: Callable[..., str], tmp_path: Path) -> None:
    block = "".join(f"{n:x} the quick brown fox, {n * n}\n" for n in range(30_000))
    small, big = tmp_path / "small.txt", tmp_path / "big.txt"
    small.write_text(block * 2)
    with big.open("w") as file:
        while file.tell() < 60_000_000:
            file.write(block)
    growth, tokens, chars = map(float, run(MEASURED, name, small, big, timeout=600).split())
    assert growth < 100
    assert chars > 50_000_000 > tokens or name == "char"
