"""GPT-2's tokenizer on a vocabulary file of the same shape; nothing here reaches the network."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tinygpt import tokenizers
from tinygpt.data import list_cache, prepare
from tinygpt.errors import UserError
from tinygpt.tokenizers._bytes import BYTE_OF
from tinygpt.tokenizers.bpe import BpeTokenizer
from tinygpt.tokenizers.gpt2 import END_OF_TEXT, Gpt2Tokenizer, vocabulary_directory

TEXT = "To be, or not to be: that is the question.\n" * 50
_CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


def vocabulary() -> dict[str, int]:
    """encoder.json as OpenAI writes it: 256 bytes, merges in order, the end of text last."""
    pieces = [*(bytes([b]) for b in range(256)), b" t", b" b", b" be", b"th", b"ti", b" the", b"es"]
    names = ["".join(_CHARACTER_OF[b] for b in piece) for piece in pieces]
    return {name: i for i, name in enumerate([*names, END_OF_TEXT])}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(url: str, timeout: float) -> None:
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)


@pytest.fixture
def there(cache: Path, offline: None) -> Path:
    file = vocabulary_directory() / "encoder.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(vocabulary()))
    return file


@pytest.mark.parametrize("name", ["encoder.json", "vocab.json"])
def test_ids_are_those_of_the_vocabulary_file(there: Path, name: str) -> None:
    there.rename(there.with_name(name))
    tokenizer = Gpt2Tokenizer.train([])
    assert tokenizer.vocab_size == 264
    names = tokenizer.tokens()
    assert [names[i] for i in tokenizer.encode("to be the best")] == ["t", "o", " be", " the", " be", "s", "t"]
    assert tokenizer.encode(" t").tolist() == [256]
    assert names[263] == END_OF_TEXT
    assert tokenizer.decode([256, 263]) == " t"
    assert 263 not in tokenizer.encode(END_OF_TEXT)


def test_its_tokens_are_bpes_where_the_merges_are(there: Path) -> None:
    """tiktoken's splitting rule is the library's: the same ids for the same merges."""
    bpe = BpeTokenizer.train([TEXT], vocab_size=280)
    ranks = [bpe.bytes_of([i]) for i in range(bpe.vocab_size)]
    text = TEXT + "it's  we'll\n\n 漢字 123abc !? \t x\u00a0y\u3000z  "
    assert Gpt2Tokenizer(ranks).encode(text).tolist() == bpe.encode(text).tolist()


def test_a_corpus_in_its_tokens_needs_the_file_no_more(there: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(TEXT)
    corpus, tokenizer = prepare([str(file)], "gpt2")
    assert tokenizer.decode(corpus.train) + tokenizer.decode(corpus.validation) == TEXT
    tokenizer.save(tmp_path / "tokenizer.json")
    there.unlink()
    assert tokenizers.load(tmp_path / "tokenizer.json") == tokenizer
    assert prepare([str(file)], "gpt2")[0].location == corpus.location
    assert {entry.kind for entry in list_cache()} == {"tokens", "tokenizers"}


def test_without_network_the_message_says_what_to_put_where(offline: None) -> None:
    with pytest.raises(UserError) as error:
        Gpt2Tokenizer.train([])
    message = str(error.value)
    assert "needs the network once" in message
    assert "Temporary failure in name resolution" in message
    assert str(vocabulary_directory()) in message
    assert "encoder.json" in message
    assert "--tokenizer bpe" in message


def test_without_tiktoken_the_message_says_how_to_install_it(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match=r"pip install 'tinygpt\[gpt2\]'"):
        Gpt2Tokenizer.train([])


def test_what_the_network_gives_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer:
        def __enter__(self) -> Answer:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def read(self) -> bytes:
            return b"<html>sign in to this network</html>"

    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Answer())
    with pytest.raises(UserError, match="is not the GPT-2 vocabulary it was"):
        Gpt2Tokenizer.train([])
    assert not vocabulary_directory().exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"a": 0}', '{"a": 5}', '{"☃": 0}', json.dumps({"a": "b"})])
def test_a_damaged_vocabulary_is_named(there: Path, content: str) -> None:
    there.write_text(content)
    with pytest.raises(UserError, match=r"encoder\.json is no GPT-2 vocabulary, or a damaged one"):
        Gpt2Tokenizer.train([])
