from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tinygpt import tokenizers
from tinygpt.data import Corpus, prepare, require_blocks
from tinygpt.data.sources import Files, Part, Source
from tinygpt.errors import UserError
from tinygpt.tokenizers import Tokenizer
from tinygpt.tokenizers.char import CharTokenizer


def file(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def texts(prepared: tuple[Corpus, Tokenizer]) -> tuple[str, str]:
    corpus, tokenizer = prepared
    return tokenizer.decode(corpus.train), tokenizer.decode(corpus.validation)


class Published(Source):
    """A corpus with splits of its own."""

    name = "published"

    def __init__(self, train: Path, validation: Path) -> None:
        self.files = train, validation

    def parts(self) -> list[Part]:
        train, validation = self.files
        return [
            Files("published/train", (train,), role="train"),
            Files("published/validation", (validation,), role="validation"),
        ]


@pytest.mark.parametrize("text", ["ten chars!", "to be, or not to be\n" * 33, "a\r\n€ 😀 naïve\r\n" * 40])
def test_the_first_ninety_percent_of_characters_train(text: str, tmp_path: Path) -> None:
    corpus, tokenizer = prepare([file(tmp_path / "a.txt", text)])
    read = text.replace("\r\n", "\n")
    cut = len(read) * 9 // 10
    assert texts((corpus, tokenizer)) == (read[:cut], read[cut:])
    assert corpus.train.dtype == corpus.validation.dtype == np.uint16
    assert (corpus.train_chars, corpus.train_bytes) == (cut, len(read[:cut].encode()))
    assert (corpus.validation_chars, corpus.validation_bytes) == (len(read) - cut, len(read[cut:].encode()))
    assert corpus.chars_per_token == 1.0
    assert corpus.bytes_per_token == len(read[cut:].encode()) / len(read[cut:])
    assert corpus.notices == () == tuple(corpus.unknown)
    assert not corpus.train.flags.writeable


def test_the_cut_is_exact_where_text_is_read_in_many_pieces(tmp_path: Path) -> None:
    text = "".join(f"{n} naïve lines, 漢字\n" for n in range(200_000))
    names = [file(tmp_path / "a.txt", text[:-1]), file(tmp_path / "b.txt", text)]
    cut = 2 * len(text) * 9 // 10
    assert texts(prepare(names)) == ((text * 2)[:cut], (text * 2)[cut:])


def test_a_vocabulary_beyond_uint16_takes_uint32(tmp_path: Path) -> None:
    text = "".join(chr(c) for c in range(0x20, 0x12000) if not 0xD800 <= c < 0xE000 and c not in range(0x7F, 0xA0))
    corpus, tokenizer = prepare([file(tmp_path / "many.txt", text)])
    assert tokenizer.vocab_size == len(text) > 1 << 16
    assert corpus.train.dtype == np.uint32
    assert "".join(texts((corpus, tokenizer))) == text


def test_files_are_joined_in_order_and_named_with_their_own_size_and_hash(tmp_path: Path) -> None:
    contents = [b"\xef\xbb\xbffirst, without an end", b"second\r\nwith one\r\n", b"third\n"]
    names = [file(tmp_path / f"{n}.txt", content) for n, content in zip("bac", contents, strict=True)]
    corpus, tokenizer = prepare(names)
    assert "".join(texts((corpus, tokenizer))) == "first, without an end\nsecond\nwith one\nthird\n"
    assert [(part.name, part.bytes, part.sha256) for part in corpus.parts] == [
        (name, len(content), hashlib.sha256(content).hexdigest()) for name, content in zip(names, contents, strict=True)
    ]
    assert corpus.name == "b+a+c"
    assert prepare([*names, names[0], file(tmp_path / "d.txt", "d")])[0].name == "b+3-more"
    recorded = corpus.to_json()
    assert recorded["parts"][1]["sha256"] == hashlib.sha256(contents[1]).hexdigest()
    assert recorded["fingerprint"] == corpus.fingerprint


def test_the_fingerprint_follows_content_and_order_and_nothing_else(tmp_path: Path) -> None:
    a, b = file(tmp_path / "a.txt", "one text\n" * 9), file(tmp_path / "b.txt", "another\n" * 9)
    moved = file(tmp_path / "moved.txt", "one text\n" * 9)
    first = prepare([a, b])[0]
    assert prepare([moved, b])[0].fingerprint == first.fingerprint
    assert prepare([moved, b])[0].location == first.location
    others = [prepare([b, a]), prepare([a]), prepare([a, b, b]), prepare([a, b], train_share=0.5)]
    file(tmp_path / "a.txt", "one text.\n" * 9)
    others.append(prepare([a, b]))
    assert len({first.fingerprint, *(corpus.fingerprint for corpus, _ in others)}) == 6


def test_published_splits_are_kept_and_other_text_is_cut(tmp_path: Path) -> None:
    train, validation = tmp_path / "train", tmp_path / "validation"
    file(train, "published training text")
    file(validation, "published validation text")
    published = Published(train, validation)
    assert texts(prepare([published])) == ("published training text", "published validation text")
    mixed = texts(prepare([file(tmp_path / "a.txt", "0123456789"), published]))
    assert mixed == ("published training text\n012345678", "9\npublished validation text")


def test_with_no_training_share_everything_but_published_training_text_is_evaluated(tmp_path: Path) -> None:
    train, validation = tmp_path / "train", tmp_path / "validation"
    file(train, "published training text")
    file(validation, "published validation text")
    name = file(tmp_path / "a.txt", "0123456789")
    assert texts(prepare([name], train_share=0.0)) == ("", "0123456789")
    assert texts(prepare([Published(train, validation), name], train_share=0.0)) == (
        "",
        "0123456789\npublished validation text",
    )


def test_a_prepared_corpus_is_opened_without_decoding_text_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = file(tmp_path / "a.txt", "to be or not to be\n" * 50)
    first, tokenizer = prepare([name])

    def unreadable(self: Files) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(Files, "read", unreadable)
    again, same = prepare([name])
    resumed, kept = prepare([name], tokenizers.from_json(tokenizer.to_json()))
    assert again.location == resumed.location == first.location
    assert same == kept == tokenizer
    assert np.array_equal(resumed.train, first.train)
    assert np.array_equal(resumed.validation, first.validation)


def test_characters_a_trained_tokenizer_never_saw_are_left_out_counted_and_named(tmp_path: Path) -> None:
    tokenizer = CharTokenizer.train(["abcd\n"])
    name = file(tmp_path / "a.txt", "a€b€c\n" * 20 + "😀d")
    for _ in range(2):  # prepared, and from the cache
        corpus, _ = prepare([name], tokenizer, train_share=0.0)
        assert tokenizer.decode(corpus.validation) == "abc\n" * 20 + "d"
        assert corpus.validation_chars == corpus.validation_bytes == 81
        assert corpus.unknown == "€😀"
        assert corpus.notices == ("a holds characters that the tokenizer never saw: '€', '😀'; they are left out",)
    with pytest.raises(UserError, match=r"next to nothing.*never saw \('€'\)"):
        prepare([file(tmp_path / "b.txt", "€€€€€a")], tokenizer)


def test_with_none_named_the_default_is_chosen_and_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    published = Published(tmp_path / "a", tmp_path / "b")
    file(tmp_path / "a", "training")
    file(tmp_path / "b", "validation")
    monkeypatch.setattr("tinygpt.data.corpus.default_source", lambda: (published, "no --data given: reading 'x'"))
    corpus, _ = prepare([])
    assert corpus.name == "published"
    assert corpus.notices == ("no --data given: reading 'x'",)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", r"a\.txt is empty"),
        ("\ufeff", "a holds no text"),
        ("x", "a holds 1 character; nothing can be predicted from fewer than two tokens"),
        (b"caf\xe9", "not UTF-8: byte 3"),
        (b"text\0", "byte 4 is NUL"),
    ],
)
def test_a_text_that_cannot_be_used_leaves_nothing_behind(
    content: str | bytes, complaint: str, tmp_path: Path, cache: Path
) -> None:
    name = file(tmp_path / "a.txt", content)
    for tokenizer in ("char", CharTokenizer("x")):
        with pytest.raises(UserError, match=complaint if isinstance(tokenizer, str) else None):
            prepare([name], tokenizer)
    assert not list(cache.glob("tokens/*"))
    assert not list(cache.glob("tokens/.*"))


def test_a_split_shorter_than_a_block_says_how_many_tokens_it_takes(tmp_path: Path) -> None:
    corpus, _ = prepare([file(tmp_path / "a.txt", "abcde" * 20)])
    require_blocks(corpus, 9)
    with pytest.raises(UserError) as error:
        require_blocks(corpus, 10)
    assert str(error.value) == (
        "a: the validation split holds 10 tokens, and model.block_size=10 needs at least 11; "
        "give more text, or lower model.block_size to 9 or less"
    )
    with pytest.raises(UserError, match=r"the training split holds 90 tokens.*at least 257"):
        require_blocks(corpus, 256)
    two, _ = prepare([file(tmp_path / "two.txt", "ab")])
    with pytest.raises(
        UserError, match=r"training split holds 1 token, and model\.block_size=8 needs at least 9; give"
    ):
        require_blocks(two, 8)


@pytest.mark.parametrize("moment", ["reading", "tokenising"])
@pytest.mark.parametrize("other", ["to be\n", "not to be or to be\n" * 50], ids=["shorter", "as long"])
def test_a_text_that_changes_while_it_is_read_is_not_kept(moment: str, other: str, tmp_path: Path, cache: Path) -> None:
    name = file(tmp_path / "a.txt", "to be or not to be\n" * 50)

    def meddle(doing: str, done: int, total: int | None) -> None:
        if doing == moment:
            file(tmp_path / "a.txt", other)

    with pytest.raises(UserError, match="changed while it was being read; try again"):
        prepare([name], progress=meddle)
    assert not list(cache.glob("tokens/*"))
    corpus, tokenizer = prepare([name])
    assert "".join(texts((corpus, tokenizer))) == other


def test_progress_counts_every_character_of_both_passes(tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    prepare([file(tmp_path / "a.txt", "x" * 999)], progress=lambda doing, done, total: told.append((doing, done)))
    assert [doing for doing, _ in told] == ["reading", "tokenising", "tokenising"]
    assert told[0] == ("reading", 999)
    assert told[-1] == ("tokenising", 999)


def test_every_process_prepares_the_same_bytes(run: Callable[..., str], tmp_path: Path) -> None:
    name = file(tmp_path / "a.txt", "naïve text, 漢字 😀\n" * 3000)
    code = """
import hashlib, sys
from tinygpt.data import prepare
corpus, tokenizer = prepare(sys.argv[1:])
print(corpus.location.name, hashlib.sha256(corpus.location.read_bytes()).hexdigest(), corpus.fingerprint, hash(1.5))
"""
    outputs = {run(code, name, TINYGPT_CACHE=str(tmp_path / seed), PYTHONHASHSEED=seed) for seed in ("1", "2")}
    here, _ = prepare([name])
    assert len(outputs) == 1
    assert outputs.pop().split()[:3] == [
        here.location.name,
        hashlib.sha256(here.location.read_bytes()).hexdigest(),
        here.fingerprint,
    ]


def test_memory_stays_flat_over_a_hundred_megabytes(run: Callable[..., str], tmp_path: Path) -> None:
    block = "".join(f"{n:x} the quick brown fox, {n * n}\n" for n in range(30_000))
    with (tmp_path / "big.txt").open("w") as big:
        while big.tell() < 100_000_000:
            big.write(block)
    code = """
import resource, sys, time
from tinygpt.data import prepare
prepare([sys.argv[1]])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
corpus, _ = prepare([sys.argv[2]])
seconds = time.perf_counter() - started
assert len(corpus.train) + len(corpus.validation) > 100_000_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, seconds)
"""
    growth, seconds = map(float, run(code, file(tmp_path / "small.txt", "abc" * 99), tmp_path / "big.txt").split())
    megabyte = 1 << 20 if sys.platform == "darwin" else 1 << 10  # of ru_maxrss
    assert growth / megabyte < 64
    assert seconds < 10
