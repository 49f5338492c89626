"""Prepared text in the user's cache directory, keyed by content.

    tokens/KEY.tokens       token ids of a corpus, mapped into memory when read
    tokenizers/KEY.json     tokenizers trained on a corpus
    texts/KEY.txt, .json    datasets fetched from the network, as plain text, with their size and hash

Every file is written under a temporary name, synced and renamed, so an interrupted preparation is never taken for a
finished one. Processes that prepare the same text at once each write their own file; the last rename wins, with the
same content.

A token file is: magic (8 bytes), zeros up to 64 bytes, training ids, validation ids, a JSON description, and a footer
of the description's SHA-256 (32 bytes), its length (8 bytes, little endian) and the magic again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tinygpt_kernels.userdir import cache_directory

from .. import atomic
from ..errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FORMAT_VERSION = 1
"""Goes up whenever the same files would give other text, other tokens or another file layout."""

_MAGIC = b"tinygpt\x01"
_HEADER = 64
_FOOTER = 32 + 8 + len(_MAGIC)
_KINDS = {"tokens": ".tokens", "tokenizers": ".json", "texts": ".txt"}


@dataclass(frozen=True)
class Description:
    """What a token file says of itself. Chars and bytes are lengths of the text that the tokens stand for."""

    key: str
    name: str
    dtype: str
    train_tokens: int
    train_chars: int
    train_bytes: int
    validation_tokens: int
    validation_chars: int
    validation_bytes: int
    unknown: str


@dataclass(frozen=True)
class TokenFile:
    """An opened token file. train, validation: read-only uint16 or uint32 [N], mapped into memory."""

    path: Path
    description: Description
    train: NDArray[np.unsignedinteger[Any]]
    validation: NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class CacheEntry:
    """A file in the cache. kind: tokens, tokenizers, texts, or unfinished (left by a killed process)."""

    path: Path
    kind: str
    name: str
    bytes: int


def cache_key(values: object) -> str:
    """A key for JSON values, and for this version of the format."""
    return hashlib.sha256(json.dumps([FORMAT_VERSION, values], sort_keys=True).encode()).hexdigest()


def token_path(key: str) -> Path:
    return cache_directory() / "tokens" / f"{key[:32]}.tokens"


def record_path(kind: str, key: str) -> Path:
    return cache_directory() / kind / f"{key[:32]}.json"


@contextmanager
def storing(path: Path, *, needed: int | None) -> Iterator[BinaryIO]:
    """A file for writing that becomes `path` when the block ends well, and leaves nothing when it does not.

    Args:
        needed: bytes that will be written at most, for the message when they do not fit; None: not known.

    Raises:
        UserError: the disk is full, or the cache directory cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.sweep(path.parent)
        with atomic.replacing(path) as file:
            yield file
    except OSError as error:
        raise _explained(error, path.parent, needed) from None


def read_record(kind: str, key: str) -> dict[str, object] | None:
    """A small JSON object of the cache; None when it is not there or damaged."""
    try:
        values = json.loads(record_path(kind, key).read_bytes())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def write_record(kind: str, key: str, values: dict[str, object]) -> None:
    """Keep a small JSON object. Raises UserError as `storing` does."""
    content = json.dumps(values).encode()
    with storing(record_path(kind, key), needed=len(content)) as file:
        file.write(content)


def start_tokens(file: BinaryIO) -> None:
    """Begin a token file; training ids follow, then validation ids, then `finish_tokens`."""
    file.write(_MAGIC.ljust(_HEADER, b"\0"))


def finish_tokens(file: BinaryIO, description: Description) -> None:
    """End a token file. Without this the file is not one."""
    text = json.dumps(asdict(description)).encode()
    file.write(text + hashlib.sha256(text).digest() + len(text).to_bytes(8, "little") + _MAGIC)


def open_tokens(key: str) -> TokenFile | None:
    """The finished token file of that key; None when there is none, or when it is damaged and must be made again."""
    path = token_path(key)
    try:
        with path.open("rb") as file:
            description, start = _read_description(file)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    import numpy as np  # here: names and errors of corpora must not wait for it

    item = np.dtype(description.dtype).itemsize
    middle = _HEADER + description.train_tokens * item
    if description.key != key or start != middle + description.validation_tokens * item:
        return None
    return TokenFile(
        path,
        description,
        _mapped(path, description.dtype, _HEADER, description.train_tokens),
        _mapped(path, description.dtype, middle, description.validation_tokens),
    )


def list_cache() -> list[CacheEntry]:
    """All that the cache holds, sorted by kind and path."""
    entries = []
    for kind, suffix in _KINDS.items():
        directory = cache_directory() / kind
        for path in sorted(directory.glob(f"[!.]*{suffix}")):
            with suppress(FileNotFoundError):  # another process may be clearing it
                entries.append(CacheEntry(path, kind, _name(path, kind), path.stat().st_size))
        for path in atomic.leftovers(directory):
            with suppress(FileNotFoundError):
                entries.append(CacheEntry(path, "unfinished", path.name, path.stat().st_size))
    return entries


def clear_cache() -> list[CacheEntry]:
    """Remove all that the cache holds, but what another process is writing now; returns what was removed.

    Raises:
        UserError: a file cannot be removed.
    """
    removed = list_cache()
    for entry in removed:
        for path in (entry.path, entry.path.with_suffix(".json")):  # fetched texts have a record beside them
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"cannot remove {path}: {error.strerror}") from None
    return removed


def _name(path: Path, kind: str) -> str:
    try:
        if kind == "tokens":
            with path.open("rb") as file:
                return _read_description(file)[0].name
        record = json.loads(path.with_suffix(".json").read_bytes())
        return str(record["type" if kind == "tokenizers" else "name"])
    except (OSError, ValueError, TypeError, KeyError):
        return "damaged"


def _read_description(file: BinaryIO) -> tuple[Description, int]:
    """The description, and the byte at which it starts. Raises ValueError or TypeError where the file is damaged."""
    size = file.seek(0, os.SEEK_END)
    if size < _HEADER + _FOOTER:
        raise ValueError("too short")
    file.seek(size - _FOOTER)
    footer = file.read(_FOOTER)
    start = size - _FOOTER - int.from_bytes(footer[32:40], "little")
    if footer[40:] != _MAGIC or start < _HEADER:
        raise ValueError("no footer")
    file.seek(0)
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ValueError("no header")
    file.seek(start)
    text = file.read(size - _FOOTER - start)
    if hashlib.sha256(text).digest() != footer[:32]:
        raise ValueError("damaged description")
    values = json.loads(text)
    return Description(**{field.name: values[field.name] for field in fields(Description)}), start


def _mapped(path: Path, dtype: str, offset: int, count: int) -> NDArray[np.unsignedinteger[Any]]:
    import numpy as np

    if count == 0:  # nothing cannot be mapped
        return np.empty(0, dtype)
    # As a plain array: indexing a memmap costs several times as much.
    return np.memmap(path, dtype, "r", offset, (count,)).view(np.ndarray)


def _explained(error: OSError, directory: Path, needed: int | None) -> OSError | UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        room = "" if needed is None else f": up to {_megabytes(needed)} are needed"
        with suppress(OSError):
            room += f", {_megabytes(shutil.disk_usage(directory).free)} are free" if room else ""
        return UserError(
            f"no space left in the cache {directory}{room}; "
            "free some, or set TINYGPT_CACHE to a directory on another disk"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return UserError(
            f"the cache {directory} cannot be written ({error.strerror}); set TINYGPT_CACHE to a directory that can"
        )
    return error


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
