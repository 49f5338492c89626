"""Lines of two columns: pairs of source and target, or texts with their labels. Where they come from, and how they are read.

Files: .tsv (two columns, no header), .csv (a header that names the columns), .jsonl (an object per line, or a list of two).
Imports no numpy: names and errors must answer at once.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..errors import UserError
from .generated import GENERATORS
from .hub import HubDataset
from .sources import Files, Identity, Part, Role, Source, corpora, find
from .text import check_file

Holds = Literal["pairs", "labelled"]
COLUMNS: dict[Holds, tuple[str, str]] = {"pairs": ("source", "target"), "labelled": ("text", "label")}
_SUFFIXES = (".tsv", ".csv", ".jsonl")


@dataclass(frozen=True)
class Record:
    """One line. where: for messages, the part's name and its line number."""

    where: str
    first: str
    second: str


class RecordSource(Source):
    """A source of records; `format` is that of its parts' text."""

    format: str

    def records(self, part: Part) -> Iterator[Record]:
        """The records of one of its parts.

        Raises:
            UserError: a line that is none; the message names it and says what it lacks.
        """
        columns = COLUMNS[self.holds]  # type: ignore[index]
        for line, first, second in _READERS[self.format](_lines(part.read()), columns, part.name):
            where = f"{part.name} line {line}"
            for column, value in zip(columns, (first, second), strict=True):
                if not value.strip():
                    raise UserError(f"{where}: its {column} is empty; fill it in, or take the line out")
            yield Record(where, first, second)


@dataclass(frozen=True)
class RecordFile(RecordSource):
    """A file of the user's."""

    path: Path
    holds: Holds  # type: ignore[misc]

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.path.stem

    @property
    def format(self) -> str:  # type: ignore[override]
        return self.path.suffix.lower()

    def parts(self) -> list[Part]:
        check_file(self.path)
        return [Files(str(self.path), (self.path,))]


@dataclass(frozen=True)
class Generated(RecordSource):
    """Records that are made up, always the same: `validation` of them are held out, and no input is there twice."""

    name: str
    make: Callable[[], Iterator[tuple[str, str]]]
    holds: Holds  # type: ignore[misc]
    validation: int = 1000
    format = ".tsv"

    def parts(self) -> list[Part]:
        text = [f"{first}\t{second}\n" for first, second in self.make()]
        return [_Made(f"{self.name}/validation", "validation", "".join(text[: self.validation])),
                _Made(f"{self.name}/train", "train", "".join(text[self.validation :]))]  # fmt: skip


@dataclass(frozen=True)
class _Made(Part):
    name: str
    role: Role
    text: str

    def identity(self) -> Identity:
        content = self.text.encode()
        return Identity(self.name, self.role, len(content), sha256(content).hexdigest())

    def read(self) -> Iterator[str]:
        yield self.text


@dataclass(frozen=True)
class HubPairs(HubDataset, RecordSource):
    """Pairs in a dataset that the `datasets` library finds.

    Args: those of HubDataset; column: those of source and target, "de,en", on their own or within a column `translation`.
    """

    column: str = "source,target"
    holds: ClassVar[Holds] = "pairs"  # type: ignore[misc]
    format = ".jsonl"

    def text(self, row: Mapping[str, Any]) -> str:
        values = row.get("translation", row)
        return json.dumps([str(values[column]) for column in self.column.split(",")])


MULTI30K = HubPairs("multi30k", "bentrevett/multi30k", column="de,en")


def record_corpora() -> dict[str, RecordSource]:
    """The named sources of records."""
    made = {name: Generated(name, make, holds) for name, (holds, make) in GENERATORS.items()}
    return {**made, MULTI30K.name: MULTI30K}


def find_for(names: Sequence[str], holds: str, model: str) -> list[Source]:
    """The sources of these names, for a model that reads what `holds` says: text, pairs or labelled.

    Raises:
        UserError: there is none of a name, or it holds data of another kind; says which model reads that.
    """
    known = record_corpora()
    if holds == "text":
        for name in names:
            if name in known:
                raise _wrong_kind(name, known[name].holds, model, holds)
        return find(names)
    found: list[Source] = []
    for name in names:
        if name in known:
            if known[name].holds != holds:
                raise _wrong_kind(name, known[name].holds, model, holds)
            found.append(known[name])
        elif Path(name).suffix.lower() in _SUFFIXES:
            found.append(RecordFile(Path(name).expanduser(), holds))  # type: ignore[arg-type]
        elif name in corpora() or Path(name).expanduser().exists():
            raise _wrong_kind(name, "text", model, holds)
        else:
            fitting = [other for other, source in known.items() if source.holds == holds]
            raise UserError(f"no dataset {name!r} for model {model!r}, which reads {_wanted(holds, fitting)}")
    return found


def _wrong_kind(name: str, is_: str, model: str, holds: str) -> UserError:
    reader = {"text": "gpt", "pairs": "transformer", "labelled": "encoder"}[is_]
    what = {"text": "plain text", "pairs": "pairs of source and target", "labelled": "labelled lines"}
    fitting = [other for other, source in record_corpora().items() if source.holds == holds]
    wanted = "plain text" if holds == "text" else _wanted(holds, fitting)
    return UserError(
        f"{name!r} holds {what[is_]}, and model {model!r} reads {wanted}; give it that, or train --model {reader}"
    )


def _wanted(holds: str, fitting: Sequence[str]) -> str:
    first, second = COLUMNS[holds]  # type: ignore[index]
    return f"{', '.join(fitting)}, or a .tsv, .csv or .jsonl file with {first} and {second}"


def _lines(pieces: Iterator[str]) -> Iterator[str]:
    """The text's lines, each with its end, whatever pieces it comes in."""
    rest = ""
    for piece in pieces:
        *whole, rest = (rest + piece).split("\n")
        for line in whole:
            yield line + "\n"
    if rest:
        yield rest


Fields = Iterator[tuple[int, str, str]]


def _read_tsv(lines: Iterator[str], columns: tuple[str, str], name: str) -> Fields:
    for number, line in enumerate(lines, 1):
        if line.strip():
            fields = line.rstrip("\n").split("\t")
            if len(fields) != 2:
                raise UserError(
                    f"{name} line {number} holds {len(fields)} column{'s' * (len(fields) != 1)}, not 2: "
                    f"{columns[0]}, a tab, {columns[1]}"
                )
            yield number, fields[0], fields[1]


def _read_csv(lines: Iterator[str], columns: tuple[str, str], name: str) -> Fields:
    rows = csv.DictReader(lines, strict=True)
    try:
        _require_columns(rows.fieldnames or (), columns, f"{name}: the first line names")
        for row in rows:
            first, second = (row[column] for column in columns)
            if first is None or second is None:
                raise UserError(f"{name} line {rows.line_num} has fewer columns than the first line names")
            yield rows.line_num, first, second
    except csv.Error as error:
        raise UserError(f"{name} line {rows.line_num + 1} is no CSV: {error}") from None


def _read_jsonl(lines: Iterator[str], columns: tuple[str, str], name: str) -> Fields:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name} line {number}"
        try:
            values = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is no JSON: {error}") from None
        if isinstance(values, list) and len(values) == 2:
            values = dict(zip(columns, values, strict=True))
        if not isinstance(values, dict):
            raise UserError(f"{where} must be an object with {columns[0]} and {columns[1]}, or a list of two")
        _require_columns(values, columns, f"{where} has")
        for column in columns:
            if isinstance(values[column], (dict, list)) or values[column] is None:
                raise UserError(f"{where}: {column} must be text, not {values[column]!r}")
        yield number, str(values[columns[0]]), str(values[columns[1]])


def _require_columns(there: Any, columns: tuple[str, str], says: str) -> None:
    missing = [column for column in columns if column not in there]
    if missing:
        names = ", ".join(map(repr, there)) or "nothing"
        raise UserError(f"{says} {names}; {' and '.join(map(repr, missing))} must be there too")


_READERS: dict[str, Callable[[Iterator[str], tuple[str, str], str], Fields]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
}
