from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from tinygpt import atomic
from tinygpt.data import clear_cache, list_cache, prepare
from tinygpt.errors import UserError
from tinygpt.tokenizers.char import CharTokenizer
from tinygpt_kernels.userdir import cache_directory

TEXT = "to be, or not to be: that is the question\n" * 400


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def files(directory: Path) -> list[str]:
    """Every file below `directory`, hidden ones too."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_the_cache_is_where_the_platform_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == Path(os.environ["TINYGPT_CACHE"])
    monkeypatch.setenv("TINYGPT_CACHE", "~/mine")
    assert cache_directory() == tmp_path / "mine"
    monkeypatch.setenv("TINYGPT_CACHE", "")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg/tinygpt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == tmp_path / ".cache/tinygpt"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_directory() == tmp_path / "Library/Caches/tinygpt"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_directory() == tmp_path / "local/tinygpt"


def flip(place: int) -> Callable[[bytes], bytes]:
    return lambda content: (changed := bytearray(content)).__setitem__(place, content[place] ^ 1) or bytes(changed)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:10],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: content[:64] + content[66:],
        lambda content: b"\0" * len(content),
        lambda content: content[:-16] + b"\xff" * 8 + content[-8:],
        flip(0),
        flip(-1),
        flip(-12),
        flip(-40),
        flip(-100),
    ],
    ids=[
        "empty",
        "header only",
        "half",
        "one byte short",
        "one byte more",
        "a token short",
        "zeros",
        "huge length",
        "header",
        "magic",
        "length",
        "digest",
        "description",
    ],
)
def test_a_damaged_token_file_is_made_again(damage: Callable[[bytes], bytes], text: str) -> None:
    first, tokenizer = prepare([text])
    whole = first.location.read_bytes()
    first.location.write_bytes(damage(whole))
    again, _ = prepare([text])
    assert again.location == first.location
    assert again.location.read_bytes() == whole
    assert tokenizer.decode(again.train) + tokenizer.decode(again.validation) == TEXT


def test_a_file_of_another_text_is_not_taken_for_this_one(text: str, tmp_path: Path) -> None:
    first, tokenizer = prepare([text])
    (tmp_path / "other.txt").write_text(TEXT[::-1])
    other, _ = prepare([str(tmp_path / "other.txt")])
    shutil.copy(other.location, first.location)
    again, _ = prepare([text])
    assert tokenizer.decode(again.train) + tokenizer.decode(again.validation) == TEXT


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format": "tinygpt-tokenizer", "version": 1}', b"\xff"])
def test_a_damaged_tokenizer_is_trained_again(content: bytes, text: str, cache: Path) -> None:
    first, tokenizer = prepare([text])
    [path] = (cache / "tokenizers").iterdir()
    path.write_bytes(content)
    again, same = prepare([text])
    assert same == tokenizer
    assert again.location == first.location


KILLED = """
import os, signal, sys
from tinygpt import atomic
from tinygpt.data import prepare
where, names = sys.argv[1], sys.argv[2:]
def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
def progress(doing, done, total):
    if doing == where:
        kill()
if where == "fsync":
    os.fsync = kill
elif where == "rename":
    os.replace = kill
elif where == "end":
    import tinygpt.data.corpus
    tinygpt.data.corpus.finish_tokens = kill
from tinygpt.tokenizers.char import CharTokenizer
prepare(names, CharTokenizer.train([open(names[0]).read()]), progress=progress)
"""


@pytest.mark.parametrize("where", ["reading", "tokenising", "end", "fsync", "rename"])
def test_a_killed_preparation_is_never_taken_for_a_finished_one_and_leaves_nothing(
    where: str, text: str, cache: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start(KILLED, where, text)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not list(cache.glob("tokens/*.tokens"))
    if where != "reading":
        assert [entry.kind for entry in list_cache()] == ["unfinished"]
    corpus, tokenizer = prepare([text])
    assert tokenizer.decode(corpus.train) + tokenizer.decode(corpus.validation) == TEXT
    assert not list(cache.rglob("*.partial"))


def test_processes_that_prepare_at_once_agree(
    tmp_path: Path, cache: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    paths = [tmp_path / f"{n}.txt" for n in range(5)]
    for n, path in enumerate(paths):
        path.write_text(f"{n}\n{TEXT}" * 20)
    code = """
import os, sys, time
from tinygpt.data import prepare
print("ready", flush=True)
while not os.path.exists(sys.argv[1]):  # the other process is not there yet
    time.sleep(0.001)
for path in sys.argv[2:]:
    corpus, tokenizer = prepare([path])
    assert tokenizer.decode(corpus.train) + tokenizer.decode(corpus.validation) == open(path).read()
"""
    gate = tmp_path / "gate"
    processes = [start(code, gate, *paths) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    gate.touch()
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    # One file each, and nothing unfinished.
    assert len(files(cache / "tokens")) == len(files(cache / "tokenizers")) == 5
    assert {entry.kind for entry in list_cache()} == {"tokens", "tokenizers"}


def test_sweeping_spares_what_is_being_written(tmp_path: Path) -> None:
    with atomic.replacing(tmp_path / "a") as file:
        file.write(b"half")
        file.flush()
        atomic.sweep(tmp_path)
        assert atomic.leftovers(tmp_path) == []
        assert len(files(tmp_path)) == 1
    assert (tmp_path / "a").read_bytes() == b"half"
    assert files(tmp_path) == ["a"]


def test_a_failed_write_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"before")
    with pytest.raises(TypeError), atomic.replacing(tmp_path / "a") as file:
        file.write(b"after" + None)  # type: ignore[operator]
    assert (tmp_path / "a").read_bytes() == b"before"
    assert files(tmp_path) == ["a"]
    atomic.write(tmp_path / "a", b"after")
    assert (tmp_path / "a").read_bytes() == b"after"


def test_a_full_disk_says_how_much_is_needed_and_leaves_nothing(
    text: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> tuple[Path, BinaryIO]:
        temporary, file = create(path)
        file.close()
        return temporary, open("/dev/full", "wb")  # where every write finds no space

    create = atomic._create
    tokenizer = CharTokenizer.train([TEXT])
    monkeypatch.setattr(atomic, "_create", full)
    for choice in ("char", tokenizer):
        with pytest.raises(UserError, match=r"no space left in the cache .*TINYGPT_CACHE"):
            prepare([text], choice)
        assert files(cache) == []
    monkeypatch.setattr(atomic, "_create", create)

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)  # some systems find out this late
        with pytest.raises(UserError) as error:
            prepare([text], tokenizer)
    needed = len(TEXT) * 2 / 1e6
    assert f"no space left in the cache {cache / 'tokens'}: up to {needed:.1f} MB are needed, " in str(error.value)
    assert files(cache) == []
    assert len(prepare([text], tokenizer)[0].train) == len(TEXT) * 9 // 10


def test_a_cache_that_cannot_be_written_is_named(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "occupied").write_text("a file where the cache should be")
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "occupied"))
    with pytest.raises(
        UserError, match=r"occupied/tokenizers cannot be written \(Not a directory\); set TINYGPT_CACHE"
    ):
        prepare([text])


def test_the_cache_lists_and_clears_all_it_holds(text: str, cache: Path) -> None:
    assert list_cache() == clear_cache() == []
    corpus, tokenizer = prepare([text])
    (cache / "tokens/.old.tokens.1234abcd.partial").write_bytes(b"left behind")
    (cache / "tokens/damaged.tokens").write_bytes(b"?")
    (cache / "readme").write_text("the user's own")
    entries = {(entry.kind, entry.name, entry.bytes) for entry in list_cache()}
    [trained] = (cache / "tokenizers").iterdir()
    assert entries == {
        ("tokens", "text", corpus.location.stat().st_size),
        ("tokens", "damaged", 1),
        ("tokenizers", "char", trained.stat().st_size),
        ("unfinished", ".old.tokens.1234abcd.partial", 11),
    }
    assert len(clear_cache()) == 4
    assert files(cache) == ["readme"]
    # What is mapped stays readable, and the next preparation starts anew.
    assert tokenizer.decode(corpus.train) + tokenizer.decode(corpus.validation) == TEXT
    assert np.array_equal(prepare([text])[0].train, corpus.train)


def test_clearing_spares_what_another_process_is_writing(text: str, cache: Path) -> None:
    prepare([text])
    with atomic.replacing(cache / "tokens/more.tokens") as file:
        file.write(b"being written")
        file.flush()
        clear_cache()
    assert files(cache) == ["tokens/more.tokens"]
