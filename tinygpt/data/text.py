"""Text files as streams of text, with an error that says where and why when a file is no text."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import UserError

CHUNK = 1 << 20
"""Bytes read at a time, and characters handed on at a time."""

# What no text holds: control characters but tab, line ends, form feed, backspace and escape (terminal recordings).
_CONTROL = bytes(set(range(32)) - set(b"\t\n\v\f\r\b\x1b")) + b"\x7f"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def check_file(path: Path) -> None:
    """Refuse what cannot be read twice as a file.

    Raises:
        UserError: no such file, a directory, a pipe or device, or an empty file.
    """
    try:
        if path.is_dir():
            raise UserError(f"{path} is a directory; name the text files in it, for example {path}/*.txt")
        if not path.exists():
            raise UserError(f"no such file: {path}")
        if not path.is_file():
            raise UserError(f"{path} is not a regular file; write its text to a file first")
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty")
    except OSError as error:
        raise _unreadable(path, error) from None


def read_bytes(path: Path) -> Iterator[bytes]:
    """The file in blocks of CHUNK bytes.

    Raises:
        UserError: the file cannot be read; the message names it and says why.
    """
    try:
        with path.open("rb") as file:
            while block := file.read(CHUNK):
                yield block
    except OSError as error:
        raise _unreadable(path, error) from None


def read_text(path: Path) -> Iterator[str]:
    """UTF-8 text in pieces, as Python's text mode reads it (every line end is "\\n"), without a byte order mark.

    Raises:
        UserError: unreadable, binary, or not UTF-8; the message names the file and the first bad byte.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(decoder, translate=True)
    end = 0
    try:
        for block in read_bytes(path):
            _refuse_binary(path, block, end)
            end += len(block)
            if end == len(block):
                block = block.removeprefix(codecs.BOM_UTF8)
            yield newlines.decode(block)
        yield newlines.decode(b"", final=True)
    except UnicodeDecodeError as error:
        # The decoder's input ended at `end`, whatever it had kept back from the block before.
        offset = end - len(error.object) + error.start
        raise UserError(
            f"{path} is not UTF-8: byte {offset} (0x{error.object[error.start]:02x}) starts no character. "
            f"If it is Latin-1, convert it: {_conversion(path, 'LATIN1')}"
        ) from None


def chunks(texts: Iterable[str], size: int = CHUNK) -> Iterator[str]:
    """The same text in pieces of about `size` characters that end with a line wherever lines are shorter than that.

    Where no line ends, a piece ends after white space, else after what is no word: hardly ever is a word cut. Where the cuts
    fall depends on the pieces that come in, never on time or machine.
    """
    pending: list[str] = []
    length = 0
    for text in texts:
        pending.append(text)
        length += len(text)
        if length >= size:
            joined = "".join(pending)
            end = _cut(joined)
            yield joined[:end]
            pending, length = [joined[end:]], length - end
    if length:
        yield "".join(pending)


def _cut(text: str) -> int:
    """The last place where a line ends, else white space, else what is no word."""
    if end := text.rfind("\n") + 1:
        return end
    for ends in (str.isspace, lambda c: not (c.isalnum() or c == "_")):
        for place in range(len(text), 0, -1):
            if ends(text[place - 1]):
                return place
    return len(text)


def joined(texts: Iterable[Iterable[str]]) -> Iterator[str]:
    """Texts one after the other, each beginning on a line of its own."""
    last = "\n"
    for text in texts:
        begun = False
        for piece in text:
            if not piece:
                continue
            if not begun and last != "\n":
                yield "\n"
            begun, last = True, piece[-1]
            yield piece


def _refuse_binary(path: Path, block: bytes, offset: int) -> None:
    if offset == 0 and block.startswith(_UTF16):
        raise UserError(f"{path} is UTF-16, not UTF-8; convert it: {_conversion(path, 'UTF-16')}")
    nul = block.find(b"\0")
    if nul >= 0:
        raise UserError(f"{path} is binary, not text (byte {offset + nul} is NUL); give a UTF-8 text file")
    controls = len(block) - len(block.translate(None, _CONTROL))
    if controls > len(block) // 10:
        raise UserError(
            f"{path} is binary, not text ({controls} of {len(block)} bytes from byte {offset} on are control "
            "characters); give a UTF-8 text file"
        )


def _conversion(path: Path, encoding: str) -> str:
    return f"iconv -f {encoding} -t UTF-8 {path.name} > {path.stem}.utf8{path.suffix}"


def _unreadable(path: Path, error: OSError) -> UserError:
    if isinstance(error, PermissionError):
        return UserError(f"{path}: permission denied; make it readable (chmod u+r), or give another file")
    return UserError(f"cannot read {path}: {error.strerror or error}")
