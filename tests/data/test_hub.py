from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tinygpt.data import clear_cache, list_cache, prepare
from tinygpt.data.hub import TINY_SHAKESPEARE, TINY_STORIES, HubDataset
from tinygpt.errors import UserError

TRAIN = ["Once upon a time there was a fox.\nIt slept.", "", "A bear — 🐻 — came by."] * 50
VALIDATION = ["The fox woke up.", "The end."]


def parquet(path: Path, rows: Iterable[str], column: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: list(rows)}), path, row_group_size=7)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A folder of the shape that the hub gives a dataset of two splits, the first in two files."""
    folder = tmp_path / "hub"
    parquet(folder / "data/train-00000-of-00002-2d5a1467fff1081b.parquet", TRAIN[:70])
    parquet(folder / "data/train-00001-of-00002-5852b56a2bd28fd9.parquet", TRAIN[70:])
    parquet(folder / "data/validation-00000-of-00001-869c898b519ad725.parquet", VALIDATION)
    return folder


def test_stories_are_read_with_their_published_splits(hub: Path) -> None:
    corpus, tokenizer = prepare([replace(TINY_STORIES, path=str(hub))])
    assert tokenizer.decode(corpus.train) == "\n\n".join(TRAIN)
    assert tokenizer.decode(corpus.validation) == "\n\n".join(VALIDATION)
    assert corpus.name == "tinystories"
    contents = ["\n\n".join(rows).encode() for rows in (TRAIN, VALIDATION)]
    assert [(part.name, part.role, part.bytes, part.sha256) for part in corpus.parts] == [
        (f"tinystories/{role}", role, len(content), hashlib.sha256(content).hexdigest())
        for role, content in zip(("train", "validation"), contents, strict=True)
    ]


def test_a_single_row_of_text_as_tiny_shakespeare_has_it_comes_back_as_it_is(tmp_path: Path) -> None:
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 300
    for split, part in (("train", text), ("validation", text[:500]), ("test", "not read")):
        parquet(tmp_path / f"{split}.parquet", [part])
    source = replace(
        TINY_SHAKESPEARE,
        path="parquet",
        data_files={split: str(tmp_path / f"{split}.parquet") for split in ("train", "validation", "test")},
    )
    corpus, tokenizer = prepare([source])
    assert tokenizer.decode(corpus.train) == text
    assert tokenizer.decode(corpus.validation) == text[:500]

    parquet(tmp_path / "train.parquet", ["The text has changed since.\n" * 99])
    changed, tokenizer = prepare([source])
    assert tokenizer.decode(changed.train) == "The text has changed since.\n" * 99
    assert changed.fingerprint != corpus.fingerprint


def test_once_fetched_no_network_is_needed_and_clearing_forgets(hub: Path, cache: Path) -> None:
    source = replace(TINY_STORIES, path=str(hub))
    first, tokenizer = prepare([source])
    shutil.rmtree(hub)
    again, _ = prepare([source], tokenizer)
    assert again.location == first.location
    assert {(entry.kind, entry.name) for entry in list_cache()} == {
        ("texts", "tinystories/train"),
        ("texts", "tinystories/validation"),
        ("tokens", "tinystories"),
        ("tokenizers", "char"),
    }
    clear_cache()
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_fetched_text_that_was_cut_short_is_fetched_again(hub: Path, cache: Path) -> None:
    source = replace(TINY_STORIES, path=str(hub))
    first, tokenizer = prepare([source])
    for path in cache.glob("texts/*.txt"):
        path.write_bytes(path.read_bytes()[:-1])
    first.location.unlink()
    again, _ = prepare([source])
    assert again.fingerprint == first.fingerprint
    assert tokenizer.decode(again.validation) == "\n\n".join(VALIDATION)


def test_without_a_published_validation_split_the_text_is_cut_by_position(hub: Path) -> None:
    corpus, tokenizer = prepare([HubDataset("plain", str(hub), validation=None, separator="")])
    text = "".join(TRAIN)
    assert tokenizer.decode(corpus.train) == text[: len(text) * 9 // 10]
    assert tokenizer.decode(corpus.validation) == text[len(text) * 9 // 10 :]


def test_a_column_that_is_not_there_and_files_that_are_no_parquet_are_named(hub: Path, cache: Path) -> None:
    with pytest.raises(UserError, match=r"dataset 'tinystories': .*hub has no column 'story'"):
        prepare([replace(TINY_STORIES, path=str(hub), column="story")])
    for file in hub.rglob("*.parquet"):
        file.write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"dataset 'tinystories': reading .* failed: "):
        prepare([replace(TINY_STORIES, path=str(hub))])
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_the_hub_is_asked_for_a_commit_and_streamed_from(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    asked: list[object] = []

    class Info:
        sha = "c0ffee"

    def info(self: object, path: str, *, revision: str | None, timeout: float) -> Info:
        asked.append((path, revision))
        return Info()

    def load(path: str, **options: object) -> list[dict[str, str]]:
        asked.append((path, options))
        return [{"text": f"{options['split']} text"}]

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    corpus, tokenizer = prepare(["tiny_shakespeare"])
    assert tokenizer.decode(corpus.train) == "train text"
    assert tokenizer.decode(corpus.validation) == "validation text"
    repository = "karpathy/tiny_shakespeare"
    options = {"data_files": None, "revision": "c0ffee", "streaming": True}
    assert asked == [
        (repository, "refs/convert/parquet"),
        (repository, {"split": "train", **options}),
        (repository, "refs/convert/parquet"),
        (repository, {"split": "validation", **options}),
    ]


def test_without_a_network_one_message_says_so_and_what_else_there_is(run: Callable[..., str]) -> None:
    code = """
import sys, time
from tinygpt.data import prepare
from tinygpt.errors import UserError
try:
    prepare(["tinystories"])
except UserError as error:
    print(error)
assert "datasets" not in sys.modules
"""
    message = run(code, HF_HUB_OFFLINE="1").strip()
    assert "\n" not in message
    assert message.startswith("dataset 'tinystories' needs the network once, to fetch roneneldan/TinyStories")
    assert "--data python" in message
    assert "--data shakespeare" in message
