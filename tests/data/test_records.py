"""Pairs and labelled lines: what is read, what is held out, and what a line that is wrong is told."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tinygpt.data.examples import Rows, prepare_examples
from tinygpt.data.generated import GENERATORS
from tinygpt.data.records import HubPairs, RecordFile, find_for, record_corpora
from tinygpt.errors import UserError


def read(path, holds="pairs"):
    source = RecordFile(path, holds)
    return [(r.first, r.second) for part in source.parts() for r in source.records(part)]


def write(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    return tmp_path / name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", 'ab c\tba\n\né, x\t"y"\n'),
        ("a.csv", 'note,target,source\n1,ba,ab c\n2,"""y""","é, x"\n'),
        ("a.jsonl", '{"source": "ab c", "target": "ba", "n": 1}\n["é, x", "\\"y\\""]'),
    ],
)
def test_three_formats_hold_the_same(tmp_path, name, text):
    assert read(write(tmp_path, name, text)) == [("ab c", "ba"), ("é, x", '"y"')]


def test_csv_fields_may_hold_line_ends(tmp_path):
    path = write(tmp_path, "a.csv", 'text,label\n"two\nlines",1\none,0\n')
    assert read(path, "labelled") == [("two\nlines", "1"), ("one", "0")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "a\tb\nc\n", r"a\.tsv line 2 holds 1 column, not 2: text, a tab, label"),
        ("a.csv", "text,lable\na,b\n", r"a\.csv: the first line names 'text', 'lable'; 'label' must be there too"),
        ("a.csv", "text,label\na\n", r"a\.csv line 2 has fewer columns"),
        ("a.csv", "text,label\nnice,\n", r"a\.csv line 2: its label is empty"),
        ("a.csv", 'text,label\n"nice" film,x\n', r"a\.csv line 2 is no CSV"),
        ("a.jsonl", '{"text": "a"}\n', r"a\.jsonl line 1 has 'text'; 'label' must be there too"),
        ("a.jsonl", '{"text": "a", "label": null}\n', r"a\.jsonl line 1: label must be text, not None"),
        ("a.jsonl", "text\n", r"a\.jsonl line 1 is no JSON"),
        ("a.jsonl", "3\n", r"a\.jsonl line 1 must be an object with text and label, or a list of two"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path, name, text), "labelled")


def labelled(tmp_path, labels):
    text = "text,label\n" + "".join(f"word{i},{label}\n" for i, label in enumerate(labels))
    return [RecordFile(write(tmp_path, "l.csv", text), "labelled")]


def test_sorted_files_keep_every_class_in_both_halves(tmp_path):
    corpus, _ = prepare_examples(labelled(tmp_path, ["a"] * 50 + ["b"] * 50), "char")
    assert corpus.labels == ("a", "b")
    assert (len(corpus.train), len(corpus.validation)) == (90, 10)
    assert np.bincount(corpus.train.labels).tolist() == [45, 45]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a"] * 20, r"every line is labelled 'a'; a classifier needs two classes"),
        (
            ["a"] * 9 + ["b"] + ["c"] * 10,
            r"line 11: class 'b' has no example among those that train, which know 'a', 'c'",
        ),
        (["a", "b"] * 3, r"leaves no validation examples: it holds 6 lines, of which every 10th is held out"),
    ],
)
def test_classes_that_cannot_be_learned(tmp_path, labels, message):
    with pytest.raises(UserError, match=message):
        prepare_examples(labelled(tmp_path, labels), "char")


@pytest.mark.parametrize("name", GENERATORS)
def test_what_is_made_up_is_always_the_same_and_never_twice(name):
    records = list(GENERATORS[name][1]())
    assert records == list(GENERATORS[name][1]())
    inputs = [first for first, _ in records]
    assert len(set(inputs)) == len(inputs)
    check = {"reverse": lambda a, b: b == a[::-1] and len(a) <= 10, "sort": lambda a, b: list(b) == sorted(a),
             "dates": lambda a, b: len(b) == 10 and b[:4] in a, "opinions": lambda a, b: b in ("positive", "negative")}  # fmt: skip
    assert all(check[name](*record) for record in records)
    if name == "reverse":  # held-out words are of the lengths that train
        lengths = [
            np.bincount([len(w) for w in part], minlength=11) / len(part) for part in (inputs[:1000], inputs[1000:])
        ]
        assert np.abs(lengths[0] - lengths[1]).max() < 0.05


def test_opinions_cannot_be_told_by_their_adjectives_alone():
    labels = {}
    for text, label in GENERATORS["opinions"][1]():
        if " and " not in text and " but " not in text:
            labels.setdefault(text.split()[-1], []).append(label)
    assert len(labels) == 20
    for adjective, found in labels.items():  # negated about a third of the time
        assert 0.2 < found.count("positive") / len(found) < 0.8, adjective


@pytest.mark.parametrize(
    ("names", "holds", "model", "message"),
    [
        (
            ["python"],
            "pairs",
            "transformer",
            "'python' holds plain text, and model 'transformer' reads reverse, sort, dates",
        ),
        (
            ["reverse"],
            "text",
            "gpt",
            "'reverse' holds pairs of source and target, and model 'gpt' reads plain.*--model transformer",
        ),
        (["opinions"], "pairs", "transformer", "'opinions' holds labelled lines.*train --model encoder"),
        (["revers"], "pairs", "transformer", "no dataset 'revers' for model 'transformer', which reads reverse"),
    ],
)
def test_data_of_the_wrong_kind_names_who_reads_it(names, holds, model, message):
    with pytest.raises(UserError, match=message):
        find_for(names, holds, model)


def test_rows_are_cut_and_padded():
    r = Rows.of([np.array([1, 2, 3]), np.array([], np.int64), np.array([4])])
    ids, lengths = r.padded(np.array([0, 1, 2, 0]), 2, fill=-100)
    assert ids.tolist() == [[1, 2], [-100, -100], [4, -100], [1, 2]]
    assert lengths.tolist() == [2, 0, 1, 2]


def test_pairs_through_datasets(tmp_path):
    for split, rows in (("train", [("ein Hund", "a dog"), ("zwei", "two")]), ("validation", [("drei", "three")])):
        (tmp_path / "hub/data").mkdir(parents=True, exist_ok=True)
        table = pa.table({"de": [a for a, _ in rows], "en": [b for _, b in rows]})
        pq.write_table(table, tmp_path / f"hub/data/{split}-00000-of-00001.parquet")
    source = HubPairs("mine", str(tmp_path / "hub"), column="de,en")
    corpus, tokenizer = prepare_examples([source], "char")
    decoded = [[tokenizer.decode(side[i]) for side in (half.first, half.second)] for half in (corpus.train, corpus.validation)
               for i in range(len(half))]  # fmt: skip
    assert decoded == [["ein Hund", "a dog"], ["zwei", "two"], ["drei", "three"]]
    assert "multi30k" in record_corpora()
    with pytest.raises(UserError, match="has no column 'de,fr'"):
        prepare_examples([HubPairs("mine", str(tmp_path / "hub"), column="de,fr")], "char")
