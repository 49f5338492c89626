"""`tinygpt data`: what a text is, in whose tokens, and what the cache holds."""

import json

import pytest

from tinygpt.data import list_cache, prepare
from tinygpt.tokenizers import known_tokenizers


def test_sizes_split_and_first_tokens_are_shown_and_the_picture_drawn(cli, text, tmp_path):
    answer = cli("data", text)
    content = text.read_text()
    assert answer.code == 0
    assert f"{len(content.encode()):,} bytes" in answer.out
    assert f"{len(content):,} characters, {len(set(content))} distinct; {len(content.splitlines())} lines" in answer.out
    assert "the first 90 % train" in answer.out
    assert f"char, {len(set(content))} tokens" in answer.out
    first = sorted(set(content)).index(content[0])
    assert f"{first} {content[0]!r}" in answer.out
    for name in set(known_tokenizers()) - {"gpt2"}:
        assert name in answer.out
    assert (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG")
    assert max(map(len, answer.out.splitlines())) <= 80


def test_json_agrees_with_the_tokenizers_themselves(cli, text, tmp_path):
    answer = cli("data", text, "--json", "--tokenizer", "bpe", "--vocab-size", 290)
    values = json.loads(answer.out)
    content = text.read_text()
    assert values["bytes"] == values["sample"]["bytes"] == len(content)
    assert values["sample"]["whole"]
    assert not (tmp_path / "tokens.png").exists()
    first = "".join(piece for _, piece in values["tokenizer"]["first_tokens"])
    assert content.startswith(first)
    assert len(first) > 48
    [char] = [row for row in values["tokenizers"] if row["tokenizer"] == "char"]
    assert char["tokens"] == len(content)
    _, tokenizer = prepare([str(text)], "bpe", vocab_size=290)
    [bpe] = [row for row in values["tokenizers"] if row["tokenizer"] == "bpe" and row["vocab_size"] == 290]
    assert bpe["tokens"] == len(tokenizer.encode(content))
    assert bpe["bytes_per_token"] == len(content) / bpe["tokens"]
    by_size = [row["tokens"] for row in values["tokenizers"] if row["tokenizer"] == "bpe"]
    assert by_size == sorted(by_size, reverse=True)


def test_of_a_long_text_the_beginning_is_looked_at_and_that_is_said(cli, tmp_path):
    file = tmp_path / "long.txt"
    file.write_text("to be or not to be\n" * 10_000)
    answer = cli("data", file, "--sample", "0.02", "--plot", "here.png")
    assert "long: 190,000 bytes; looked at: the first 20,000" in answer.out
    assert "20,000 characters" in answer.out
    assert "wrote here.png" in answer.out
    assert (tmp_path / "here.png").exists()


def test_what_the_cache_holds_is_listed_and_cleared(cli, text, monkeypatch, tmp_path):
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "own"))
    assert "holds nothing" in cli("data", "--list").out
    prepare([str(text)])
    listed = cli("data", "--list")
    assert "tokens" in listed.out
    assert "char" in listed.out
    assert str(tmp_path / "own") in listed.out.replace("\n", "")
    assert len(json.loads(cli("data", "--list", "--json").out)) == 2
    assert "removed" in cli("data", "--clear").out
    assert list_cache() == []


@pytest.mark.parametrize("content", [b"", b"caf\xe9 \xe9", b"\0\0"])
def test_what_is_no_text(cli, tmp_path, content):
    (tmp_path / "bad.txt").write_bytes(content)
    answer = cli("data", "bad.txt")
    assert "bad.txt" in answer.error()
    assert answer.code in (1, 2)


def test_one_character_over_and_over(cli, tmp_path):
    (tmp_path / "a.txt").write_text("a" * 5000)
    answer = cli("data", "a.txt")
    assert answer.code == 0
    assert "char, 1 token" in answer.out
