from __future__ import annotations

import os
from pathlib import Path

import pytest

from tinygpt.data import text
from tinygpt.data.text import check_file, chunks, joined, read_text
from tinygpt.errors import UserError

HARD = "one\r\ntwo\rthree\n\r\n\r\rnaïve € 漢字 👩‍👩‍👧\u2028end\x0c\r"


def text_of(path: Path) -> str:
    check_file(path)
    return "".join(read_text(path))


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        text_of(path)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("block", [3, 4, 5, 7, 1 << 20])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_reads_as_text_mode_does_however_blocks_cut_it(
    block: int, mark: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "hard.txt"
    path.write_bytes(mark + HARD.encode())
    monkeypatch.setattr(text, "CHUNK", block)
    read = "".join(read_text(path))
    assert read == path.read_text(encoding="utf-8-sig")
    assert "\r" not in read


@pytest.mark.parametrize("block", [4, 5, 1 << 20])
@pytest.mark.parametrize(
    ("content", "offset"),
    [
        (b"caf\xe9 au lait", 3),
        (b"\xef\xbb\xbfcaf\xe9 au lait", 6),
        ("€uro\r\n".encode() + b"and \xff", 12),
        ("ends within a €".encode()[:-1], 14),
        (b"a lone surrogate: \xed\xa0\x80", 18),
    ],
)
def test_bytes_that_are_not_utf8_are_named_by_place(
    content: bytes, offset: int, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(content)
    monkeypatch.setattr(text, "CHUNK", block)
    message = refused(path)
    assert f"not UTF-8: byte {offset} (0x{content[offset]:02x})" in message
    assert "iconv -f LATIN1 -t UTF-8 latin.txt > latin.utf8.txt" in message


def test_binary_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"some text, then\0\1\2")
    assert "byte 15 is NUL" in refused(path)
    path.write_bytes(b"\x01\x02\x03\x04" * 3 + b"text" * 20)
    assert "12 of 92 bytes from byte 0 on are control characters" in refused(path)
    path.write_bytes("wide".encode("utf-16"))
    assert "is UTF-16, not UTF-8; convert it: iconv -f UTF-16" in refused(path)
    monkeypatch.setattr(text, "CHUNK", 16)
    path.write_bytes(b"far beyond the first block there is a\0")
    assert "byte 37 is NUL" in refused(path)


def test_texts_with_tabs_escapes_and_form_feeds_are_no_binaries(tmp_path: Path) -> None:
    path = tmp_path / "terminal.log"
    path.write_text("\x1b[1mbold\x1b[0m\t\x0c\n" * 10)
    assert "".join(read_text(path)) == path.read_text()


def test_what_is_no_file_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such file" in refused(tmp_path / "absent.txt")
    assert f"is a directory; name the text files in it, for example {tmp_path}/*.txt" in refused(tmp_path)
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert refused(empty).endswith("is empty")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "is not a regular file" in refused(pipe)
    assert "no such file" in refused(tmp_path / "absent.txt" / "below")

    secret = tmp_path / "secret.txt"
    secret.write_text("secret")

    def denied(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # root may read everything
    assert "permission denied; make it readable" in refused(secret)


def test_chunks_keep_the_text_and_cut_at_line_ends() -> None:
    lines = "".join(f"line {i}\n" for i in range(200)) + "an end without one"
    for pieces in ([lines], list(lines), [lines[:7], lines[7:]]):
        cut = list(chunks(iter(pieces), 50))
        assert "".join(cut) == lines
        assert all(piece.endswith("\n") for piece in cut[:-1])
    assert max(map(len, chunks(iter(lines), 50))) <= 50
    # Without lines a piece goes on as soon as it is long enough: nothing piles up.
    assert list(chunks(["x" * 30] * 5, 50)) == ["x" * 60, "x" * 60, "x" * 30]
    assert list(chunks(["", ""], 50)) == []


def test_joined_texts_begin_on_lines_of_their_own() -> None:
    assert "".join(joined([["a", "b"], ["c\n"], [], ["", "d"], ["e"]])) == "ab\nc\nd\ne"
