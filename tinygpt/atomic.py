"""Files that are either finished or absent: written under a temporary name, synced, renamed.

A writer holds a lock on its temporary file, so `sweep` can tell what a killed process left behind from what another
process is writing at this moment.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed: no lock is needed there
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".partial"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file open for writing that takes the place of `path` when the block ends, and leaves nothing when it raises.

    Raises:
        OSError: the directory does not exist or cannot be written, or the disk is full.
    """
    temporary, file = _create(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl:  # renamed while still locked, so that no sweep can come between
                os.replace(temporary, path)
        if not fcntl:
            os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def write(path: Path, content: bytes) -> None:
    """Replace the file at `path` by `content`, atomically."""
    with replacing(path) as file:
        file.write(content)


def sync_directory(directory: Path) -> None:
    """Make renames within `directory` survive a loss of power, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def leftovers(directory: Path) -> list[Path]:
    """Temporary files in `directory` whose writer is gone."""
    return [path for path in sorted(directory.glob(f".*{_SUFFIX}")) if not _in_use(path)]


def sweep(directory: Path) -> None:
    """Remove what killed writers left in `directory`."""
    for path in leftovers(directory):
        with suppress(OSError):
            path.unlink()


def _create(path: Path) -> tuple[Path, BinaryIO]:
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_SUFFIX}")
        file = temporary.open("xb")
        if not fcntl:
            return temporary, file
        fcntl.flock(file, fcntl.LOCK_EX)
        # A sweep may have come between creating and locking, and removed the name.
        with suppress(FileNotFoundError):
            if os.stat(temporary).st_ino == os.fstat(file.fileno()).st_ino:
                return temporary, file
        file.close()


def _in_use(path: Path) -> bool:
    if not fcntl:
        return False
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False
