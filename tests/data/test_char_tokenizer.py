from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from tinygpt import tokenizers
from tinygpt.errors import UserError
from tinygpt.tokenizers import name_characters, tokenizer_class
from tinygpt.tokenizers.char import CharTokenizer

HARD = "plain\r\n\ttabs\x0b, ñ é, 漢字, 👩‍👩‍👧, \x00, \ud83d\ude00 lone: \udcff \udbff\udc00"


def train(text: str, **settings: bool) -> CharTokenizer:
    return CharTokenizer.train([text], **settings)


@pytest.mark.parametrize("text", ["a", "to be or not to be", HARD], ids=["one", "plain", "hard"])
def test_decode_inverts_encode_also_after_a_round_through_json(text: str, tmp_path: Path) -> None:
    trained = train(text)
    trained.save(tmp_path / "tokenizer.json")
    loaded = tokenizers.load(tmp_path / "tokenizer.json")
    assert loaded == trained
    for tokenizer in (trained, loaded):
        ids = tokenizer.encode(text, unknown="error")
        assert ids.dtype == np.int64
        assert tokenizer.vocab_size == len(set(text)) == ids.max() + 1
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([int(i) for i in ids]) == text


def test_ids_follow_code_points_however_the_text_is_cut() -> None:
    text = "zebra €, abba 😀"
    whole = train(text)
    assert whole.characters == "".join(sorted(set(text)))
    assert CharTokenizer.train(iter(text)) == whole
    assert CharTokenizer.train([text[:5], "", text[5:]]) == whole
    assert hash(CharTokenizer.train(iter(text))) == hash(whole)
    assert train(text + "!") != whole


def test_characters_never_seen_are_dropped_replaced_or_named() -> None:
    tokenizer = train("abc")
    # However far beyond: also those that are "a" modulo the length of a table that ends with "c".
    strange = "a€b😀c€" + "".join(chr(ord("a") + 50 * length) for length in (98, 99, 100, 101))
    assert tokenizer.unknown_characters(strange) == "€😀" + strange[-4:]
    assert tokenizer.unknown_characters("cab") == ""
    assert tokenizer.decode(tokenizer.encode(strange)) == "abc"
    assert tokenizer.encode("€").size == 0
    with pytest.raises(UserError, match="no token for '€', '😀'"):
        tokenizer.encode(strange, unknown="error")
    with pytest.raises(UserError, match=r"without an unknown token.*unknown='drop'"):
        tokenizer.encode(strange, unknown="replace")

    replacing = train("abc", unknown_token=True)
    assert replacing.vocab_size == 4
    assert replacing.encode(strange, unknown="replace").tolist() == [0, 3, 1, 3, 2, 3, 3, 3, 3, 3]
    assert replacing.decode([0, 3, 1]) == "a\ufffdb"
    assert tokenizers.from_json(replacing.to_json()) == replacing


@pytest.mark.parametrize(("ids", "wrong"), [([3], 3), ([-1], -1), ([0, 7, 1], 7)])
def test_ids_out_of_range_are_refused_by_number(ids: list[int], wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"token id {wrong} is not one of this tokenizer's 0 \.\. 2"):
        train("abc").decode(ids)


def test_empty_texts() -> None:
    assert train("abc").encode("").size == 0
    assert train("abc").decode([]) == ""
    assert train("abc").unknown_characters("") == ""
    with pytest.raises(UserError, match="no text"):
        CharTokenizer.train(["", ""])


def test_five_megabytes_encode_and_decode_in_well_under_a_second() -> None:
    text = "It was the best of times, it was the worst of times;\n" * 100_000
    tokenizer = train(text)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        ids = tokenizer.encode(text)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.4
    assert tokenizer.decode(ids) == text


def good() -> dict[str, object]:
    return train("ab").to_json()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "damaged tokenizer file"),
        (json.dumps(good()).encode()[:-9], "damaged tokenizer file"),
        (b"\xff\xfe{}", "damaged tokenizer file"),
        (b"[1, 2]", "holds no JSON object"),
        (b"{}", "'format' is None"),
        (
            json.dumps(good() | {"version": 99}).encode(),
            "format version 99; this tinygpt reads up to version 1: upgrade",
        ),
        (json.dumps(good() | {"version": "1"}).encode(), "'version' is '1'"),
        (json.dumps(good() | {"type": "chars"}).encode(), "unknown tokenizer 'chars'; did you mean 'char'"),
        (json.dumps(good() | {"type": None}).encode(), "unknown tokenizer 'None'"),
        (json.dumps(good() | {"characters": []}).encode(), "at least one"),
        (json.dumps(good() | {"characters": ["a", "a"]}).encode(), "distinct"),
        (json.dumps(good() | {"characters": "ab"}).encode(), "list of single characters"),
        (json.dumps(good() | {"characters": ["a", 5]}).encode(), "list of single characters"),
        (json.dumps(good() | {"characters": ["ab"]}).encode(), "list of single characters"),
        (json.dumps(good() | {"unknown_token": 1}).encode(), "true or false"),
        (json.dumps(good() | {"extra": 1}).encode(), "extra"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(content: bytes, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        tokenizers.load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert complaint in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.json: no such tokenizer file"):
        tokenizers.load(tmp_path / "absent.json")
    with pytest.raises(UserError, match="cannot read the tokenizer: Is a directory"):
        tokenizers.load(tmp_path)


def test_the_registry_knows_its_modules_and_offers_the_nearest() -> None:
    assert "char" in tokenizers.known_tokenizers()
    assert all(tokenizer_class(name).name == name for name in tokenizers.known_tokenizers())
    with pytest.raises(UserError, match="unknown tokenizer 'cahr'; did you mean 'char'"):
        tokenizer_class("cahr")


def test_characters_are_named_readably() -> None:
    assert name_characters("€\x07") == "'€', '\\x07'"
    assert name_characters("abcdefghij", limit=8).endswith("'h' and 2 more")
