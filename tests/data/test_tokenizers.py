"""What every tokenizer promises, over arbitrary text."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as library
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinygpt import tokenizers
from tinygpt.errors import UserError
from tinygpt.tokenizers import END, PAD, START, UNKNOWN, Tokenizer, check_size, known_tokenizers, tokenizer_class
from tinygpt.tokenizers._workers import encode_in_processes
from tinygpt.tokenizers.bpe import BpeTokenizer
from tinygpt.tokenizers.gpt2 import Gpt2Tokenizer
from tinygpt.tokenizers.unigram import UnigramTokenizer
from tinygpt.tokenizers.word import WordTokenizer

TRAINED = ["char", "word", "whitespace", "bpe", "unigram"]
BYTES = ["bpe", "unigram", "gpt2"]
SPECIALS = (PAD, START, END)

WORDS = [
    "to",
    "be",
    "or",
    "not",
    "that",
    "is",
    "the",
    "question",
    "naïve",
    "漢字",
    "don't",
    "whether",
    "it's",
    "x_1",
    "42",
]
TEXT = " ".join(random.Random(1).choices([*WORDS, "be,", "not:\n", " ", "\n\n", "\t", "😀", "the.\r\n"], k=6000))

anything = st.text(st.characters(exclude_categories=()), max_size=60)  # lone surrogates too
prose = st.lists(st.sampled_from([*WORDS, " ", "  ", "\n", ", ", "! ", "'", "€", "\ud800", "\udc00"])).map("".join)
spaced = st.lists(st.sampled_from([*WORDS, "", "\n", "."])).map(" ".join)
texts = anything | prose | spaced
quick = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def small_gpt2() -> list[bytes]:
    """Ranks as GPT-2's are: bytes first, then merges."""
    merged = [b" t", b"he", b" the", b"no", b"not", "ï".encode(), "漢".encode(), b"\n\n", b"qu", b"st"]
    parts = [b"\xe6\xbc", *merged]  # every token must be the merger of two earlier ones
    return [*(bytes([b]) for b in range(256)), *parts]


_made: dict[tuple[str, tuple[str, ...]], Tokenizer] = {}


def make(name: str, specials: tuple[str, ...] = (), text: str = TEXT) -> Tokenizer:
    if name == "gpt2":
        return Gpt2Tokenizer(small_gpt2(), specials=specials)
    if text is not TEXT:
        return tokenizer_class(name).train([text], specials=specials)
    if (name, specials) not in _made:
        _made[name, specials] = tokenizer_class(name).train([TEXT], specials=specials)
    return _made[name, specials]


@functools.cache
def strange(kind: type[BpeTokenizer]) -> BpeTokenizer:
    """Trained where Python's white space is not the library's."""
    return kind.train([TEXT + "!\x1c!\x1c!x\u00a0y \u00a0 " * 200])


def cut(items: Any, places: Iterable[int]) -> list[Any]:
    ends = sorted({place % (len(items) + 1) for place in places})
    return [items[start:end] for start, end in zip([0, *ends], [*ends, len(items)], strict=True)]


def test_these_are_all_there_are() -> None:
    assert set(TRAINED) | set(BYTES) == set(known_tokenizers())


@pytest.mark.parametrize("specials", [(), SPECIALS], ids=["plain", "specials"])
@pytest.mark.parametrize("name", BYTES)
@quick
@given(text=texts)
def test_any_text_comes_back_from_bytes(name: str, specials: tuple[str, ...], text: str) -> None:
    tokenizer = make(name, specials)
    ids = tokenizer.encode(text, unknown="error")
    assert ids.dtype == np.int64
    assert tokenizer.decode(ids) == text
    assert tokenizer.unknown_characters(text) == ""
    assert not ids.size or ids.min() >= len(specials)


@pytest.mark.parametrize("name", ["char", "word", "whitespace"])
@quick
@given(text=texts, seen=texts, specials=st.sampled_from([(), SPECIALS]))
def test_text_of_seen_characters_comes_back(name: str, text: str, seen: str, specials: tuple[str, ...]) -> None:
    tokenizer = make(name, specials, text="x" + text[::-1] + seen * 2)
    ids = tokenizer.encode(text, unknown="error")
    assert tokenizer.decode(ids) == text
    assert not ids.size or ids.min() >= len(specials)


@pytest.mark.parametrize("name", ["char", "word", "whitespace"])
@quick
@given(text=texts)
def test_unknown_text_raises_no_key_error(name: str, text: str) -> None:
    tokenizer = make(name, (PAD, UNKNOWN))
    strange = tokenizer.unknown_characters(text)
    known = "".join(c for c in text if c not in strange)
    assert tokenizer.decode(tokenizer.encode(text)) == known
    replaced = tokenizer.decode(tokenizer.encode(text, unknown="replace"))
    assert replaced == "".join("\ufffd" if c in strange else c for c in text)
    if strange:
        with pytest.raises(UserError, match="no token for"):
            tokenizer.encode(text, unknown="error")
        with pytest.raises(UserError, match="without an unknown token"):
            make(name).encode(text, unknown="replace")


@pytest.mark.parametrize("name", [*TRAINED, "gpt2"])
@quick
@given(data=st.data())
def test_ids_that_come_bit_by_bit_decode_to_the_same(name: str, data: st.DataObject) -> None:
    tokenizer = make(name, (PAD, UNKNOWN, END))
    one = st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(one, max_size=40) | texts.map(lambda text: tokenizer.encode(text).tolist()))
    decoder = tokenizer.decoder()
    pieces = [decoder.feed(part) for part in cut(ids, data.draw(st.lists(st.integers(0, 99))))]
    assert "".join([*pieces, decoder.finish()]) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", [*TRAINED, "gpt2"])
@quick
@given(first=texts, second=texts)
def test_concatenation(name: str, first: str, second: str) -> None:
    """Promised by char always, by the bytes' where white space follows what is none; the words' only keep the text."""
    tokenizer = make(name)
    if name in BYTES and not (first and not first[-1].isspace() and second[:1] in {" ", "\n"}):
        return
    apart = [*tokenizer.encode(first).tolist(), *tokenizer.encode(second).tolist()]
    if name == "char" or name in BYTES:
        assert tokenizer.encode(first + second).tolist() == apart


@pytest.mark.parametrize("specials", [(), (PAD, UNKNOWN)], ids=["plain", "specials"])
@pytest.mark.parametrize("name", [*TRAINED, "gpt2"])
def test_saved_and_loaded_it_is_equal(name: str, specials: tuple[str, ...], tmp_path: Path) -> None:
    tokenizer = make(name, specials)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = tokenizers.load(tmp_path / "tokenizer.json")
    assert loaded == tokenizer
    assert hash(loaded) == hash(tokenizer)
    assert loaded.specials == specials
    assert loaded.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_a_score_is_saved_as_it_is() -> None:
    """The library reads back no number of 17 digits as it wrote it."""
    described = json.loads(make("unigram")._library.to_str())  # type: ignore[attr-defined]
    draw = random.Random(0)
    scored = [(piece, -20 * draw.random()) for piece, _ in described["model"]["vocab"]]
    trained = library.Tokenizer(library.models.Unigram(scored))
    trained.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = UnigramTokenizer(UnigramTokenizer._finish(trained))
    assert tokenizers.from_json(json.loads(json.dumps(tokenizer.to_json()))) == tokenizer


@quick
@given(text=texts)
def test_characters_and_words_survive_json(text: str) -> None:
    for name in ("char", "word", "whitespace"):
        tokenizer = make(name, text="x" + text * 2)
        assert tokenizers.from_json(json.loads(json.dumps(tokenizer.to_json()))) == tokenizer


@pytest.mark.parametrize("name", [*TRAINED, "gpt2"])
def test_special_tokens_come_first_are_never_encoded_and_never_shown(name: str) -> None:
    plain, special = make(name), make(name, SPECIALS)
    assert special.vocab_size == plain.vocab_size + 3
    assert [special.special_id(s) for s in SPECIALS] == [0, 1, 2]
    assert special.tokens()[:3] == list(SPECIALS)
    assert len(special.tokens()) == special.vocab_size
    written = special.encode("the <pad> </s> not<s>")
    assert written.min() >= 3
    ids = special.encode("to be or not")
    assert special.decode([1, *ids[:3], 0, *ids[3:], 2, 0, 0]) == "to be or not"
    with pytest.raises(UserError, match="has no special token '<unk>'"):
        special.special_id(UNKNOWN)
    with pytest.raises(ValueError, match="distinct names"):
        make(name, (PAD, PAD))


@pytest.mark.parametrize("name", [*TRAINED, "gpt2"])
def test_ids_out_of_range_are_refused(name: str) -> None:
    tokenizer = make(name)
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {wrong} is not one"):
            tokenizer.decode([0, wrong])
        with pytest.raises(ValueError, match=f"token id {wrong} is not one"):
            tokenizer.decoder().feed([wrong])


def test_a_character_appears_when_its_last_byte_does() -> None:
    tokenizer = make("gpt2")
    decoder = tokenizer.decoder()
    euro = [list("€".encode())[i] for i in range(3)]
    assert [decoder.feed([i]) for i in euro] == ["", "", "€"]
    assert decoder.feed(euro[:2]) == ""
    assert decoder.finish() == "\ufffd" == tokenizer.decode(euro[:2])


def test_words_apart_from_punctuation_and_spelled_where_they_are_rare() -> None:
    tokenizer = WordTokenizer.train(["be be, or or. tea"])
    assert tokenizer.words == ("be", "or")
    assert [tokenizer.tokens()[i] for i in tokenizer.encode("be or be, tea")] == [
        "be", "or", "be", ",", " ", "t", "e", "a",
    ]  # fmt: skip
    assert [make("whitespace", text="be, be,").tokens()[i] for i in make("whitespace", text="be, be,").encode("be, be,")] == [
        "be,", "be,",
    ]  # fmt: skip


def test_words_beyond_the_vocabulary_are_spelled() -> None:
    full = make("word")
    few = WordTokenizer.train([TEXT], vocab_size=len(full.tokens()) - len(full.words) + 2)  # type: ignore[attr-defined]
    assert few.words == full.words[:2]  # type: ignore[attr-defined]
    assert few.decode(few.encode(TEXT)) == TEXT
    assert len(few.encode(TEXT)) > len(full.encode(TEXT))


@pytest.mark.parametrize("name", [*TRAINED])
def test_one_repeated_character(name: str) -> None:
    for text in ("a" * 300_000, " " * 300_000, "漢" * 100_000):
        tokenizer = tokenizer_class(name).train([text[:100_000], text[100_000:]])
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["word", "whitespace", "bpe", "unigram"])
def test_no_text_trains_nothing(name: str) -> None:
    with pytest.raises(UserError, match=f"no text to train a {name} tokenizer"):
        tokenizer_class(name).train(["", ""])


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_a_vocabulary_has_the_size_asked_for(name: str) -> None:
    for size, specials in ((270, ()), (270, SPECIALS)):
        tokenizer = tokenizer_class(name).train([TEXT], vocab_size=size, specials=specials)
        assert tokenizer.vocab_size == size
    small = tokenizer_class("bpe").train([TEXT], vocab_size=256)
    assert small.vocab_size == 256
    assert small.decode(small.encode("all bytes: €")) == "all bytes: €"


def test_a_smaller_bpe_is_the_beginning_of_a_larger_one() -> None:
    large = BpeTokenizer.train([TEXT], vocab_size=340)
    for size in (256, 257, 280, 320, 340, 1000):
        assert large.smaller(size) == BpeTokenizer.train([TEXT], vocab_size=min(size, large.vocab_size))


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("bpe", 255, "needs at least 256 tokens, one for each byte"),
        ("unigram", 1, "needs at least 256"),
        ("bpe", 1 << 25, "is more than"),
        ("word", 1, "needs at least 2"),
        ("char", 100, "takes none, it has as many tokens as the text has characters; leave it out"),
        ("gpt2", 50257, "takes none, its vocabulary is GPT-2's"),
    ],
)
def test_impossible_sizes_are_refused(name: str, size: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_size(name, size)
    with pytest.raises(UserError, match=says):
        tokenizer_class(name).train([TEXT], vocab_size=size)


def test_more_characters_than_tokens_says_how_many_it_takes() -> None:
    with pytest.raises(UserError, match=r"--vocab-size 5 is too small: this text has 26 .*2 special.*give at least 28"):
        WordTokenizer.train(["abcdefghijklmnopqrstuvwxyz"], vocab_size=5, specials=(PAD, END))
    with pytest.raises(UserError, match="needs at least 258 tokens, one for each byte and 2 special ones"):
        BpeTokenizer.train([TEXT], vocab_size=257, specials=(PAD, END))


@pytest.mark.parametrize("kind", [BpeTokenizer, UnigramTokenizer])
@quick
@given(
    text=texts
    | st.lists(texts | st.sampled_from(["\x1c", "\u3000", "\u00a0 ", " \r\n", "\v\n x", "!\x1c!", "\x1c!"])).map(
        "".join
    )
)
def test_ids_are_the_librarys_own_for_the_whole_text(kind: type[BpeTokenizer], text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    tokenizer = strange(kind)
    whole = tokenizer._library.encode(text).ids  # type: ignore[attr-defined]
    assert tokenizer.encode(text).tolist() == whole
    assert (
        tokenizer.encode(text + (" x" * 50 + text)).tolist() == tokenizer._library.encode(text + (" x" * 50 + text)).ids
    )  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_what_is_remembered_changes_no_ids(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, used = tokenizers.from_json(make(name).to_json()), make(name)
    text = TEXT * 3 + "\n \n  x" * 9000 + "y" * 2000
    assert used.encode(text).tolist() == used._library.encode(text).ids  # type: ignore[attr-defined]
    numbers = " ".join(map(str, range(20_000)))
    long = "y" * 9000 + " " + " " * 7000 + "to be" + "!" * 2048
    for piece in (numbers, numbers[:100], long, long + numbers, TEXT, numbers + TEXT * 5):
        monkeypatch.setattr("tinygpt.tokenizers._subword._MOST_KEPT", len(piece) // 2)
        assert tokenizers.from_json(make(name).to_json()).encode(piece).tolist() == used.encode(piece).tolist()
        assert fresh.encode(piece).tolist() == used.encode(piece).tolist()
        assert used.decode(used.encode(piece)) == piece
        assert sum(map(len, used._ids_of)) <= max(len(piece), len(TEXT * 8) + 70_000)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["word", "whitespace", "bpe"])
def test_processes_encode_what_this_one_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinygpt.tokenizers._workers.ALONE", 1000)
    tokenizer = make(name, (PAD,))
    pieces = [TEXT[start : start + 700] for start in range(0, len(TEXT), 700)]
    encoded = list(encode_in_processes(tokenizer, iter(pieces), processes=2))
    assert [piece for piece, _ in encoded] == pieces
    for piece, ids in encoded:
        assert ids.tolist() == tokenizer.encode(piece).tolist()
    unfinished = encode_in_processes(tokenizer, iter(pieces), processes=2)
    for _ in range(5):
        next(unfinished)
    unfinished.close()


def damaged(name: str) -> list[tuple[dict[str, object], str]]:
    good = make(name, (PAD,)).to_json()
    cases: list[tuple[dict[str, object], str]] = [
        (good | {"extra": 1}, "extra"),
        (good | {"specials": "x"}, "'specials' must be"),
        (good | {"specials": ["x", "x"]}, "'specials' must be"),
    ]
    if name in ("word", "whitespace"):
        words = good["words"]
        assert isinstance(words, list)
        cases += [(good | {"words": wrong}, "'words'") for wrong in (None, [1], ["a", "a"])]
        cases += [
            (good | {"words": [*words, "two words"]}, "'two words' is no word"),
            (good | {"characters": []}, "at least one"),
        ]
    elif name == "gpt2":
        cases += [(good | {"ranks": wrong}, "damaged gpt2") for wrong in (None, ["!"], ["QQ==", "QQ=="], ["QQ=="], [1])]
    else:
        inner = good["tokenizers"]
        assert isinstance(inner, dict)
        other = make("unigram" if name == "bpe" else "bpe").to_json()["tokenizers"]
        few = (
            {**inner, "model": {**inner["model"], "vocab": dict(list(inner["model"]["vocab"].items())[:9])}}
            if name == "bpe"
            else None
        )
        cases += [
            (good | {"tokenizers": wrong}, f"damaged {name} tokenizer")
            for wrong in (None, 5, {}, "{}", other, {**inner, "model": {}}, {**inner, "normalizer": {"type": "NFC"}}, few,
                          {**inner, "pre_tokenizer": None}, {**inner, "added_tokens": [{"id": 0}]})
        ]  # fmt: skip
    return cases


@pytest.mark.parametrize("name", ["word", "whitespace", "bpe", "unigram", "gpt2"])
def test_damaged_descriptions_are_told_apart(name: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for values, says in damaged(name):
        path.write_text(json.dumps(values))
        with pytest.raises(UserError) as error:
            tokenizers.load(path)
        assert str(error.value).startswith(f"{path}: ")
        assert says in str(error.value)
    make(name).save(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="damaged tokenizer file"):
        tokenizers.load(path)
