"""`tinygpt generate` and `tinygpt eval`."""

import json
import math
import os
import re

import pytest


def test_the_prompt_is_echoed_and_continued(cli, run):
    answer = cli("generate", run, "--prompt", "the king", "--tokens", 40, "--seed", 3)
    assert answer.code == 0
    assert answer.err == ""
    assert answer.out.startswith("the king")
    assert len(answer.out) == len("the king") + 40 + 1
    assert answer.out.endswith("\n")


def test_a_seed_repeats_the_text_and_none_does_not(cli, run):
    def text(*options):
        return cli("generate", run, "--tokens", 40, *options).out

    assert text("--seed", 3) == text("--seed", 3) != text("--seed", 4)
    assert len({text() for _ in range(3)}) == 3
    assert text("--temperature", 0) == text("--temperature", 0, "--seed", 9)
    assert text("--top-k", 1) == text("--temperature", 0)


def test_characters_never_seen_are_named_and_left_out(cli, run):
    answer = cli("generate", run, "--prompt", "the €king₿", "--tokens", 5)
    assert answer.code == 0
    assert answer.out.startswith("the king")
    assert answer.err == "tinygpt: the prompt holds characters this run never saw: '€', '₿'; they are left out\n"


def test_a_named_backend_says_what_it_served(cli, run):
    answer = cli("generate", run, "--tokens", 2, "--backend", "cpp", "--device", "cpu")
    assert re.fullmatch(r"tinygpt: backend cpp: .*\blayer_norm\b.* on cpp\n", answer.err)


def test_text_streams(start, run):
    process = start("-m", "tinygpt", "generate", run, "--tokens", 1_000_000, "--prompt", "the")
    arrived = b""
    while len(arrived) < 60:
        piece = os.read(process.stdout.fileno(), 1 << 16)
        assert 0 < len(piece) < 1000  # what is not flushed comes in blocks of 8192
        arrived += piece
    assert arrived.startswith(b"the")
    assert process.poll() is None


def test_evaluation_as_json_agrees_with_what_training_said(cli, run):
    answer = cli("eval", run, "--json")
    assert answer.code == 0
    values = json.loads(answer.out)
    assert list(values) == ["loss", "perplexity", "bits_per_char", "bits_per_byte"]
    (final,) = [m["final"] for line in (run / "metrics.jsonl").open() if "final" in (m := json.loads(line))]
    assert values["loss"] == pytest.approx(final["loss"], rel=1e-5)
    assert values["perplexity"] == pytest.approx(math.exp(values["loss"]))
    assert values["bits_per_char"] == pytest.approx(values["loss"] / math.log(2))


def test_evaluation_as_a_table(cli, run):
    answer = cli("eval", run)
    for name in ("loss", "perplexity", "bits per char", "bits per byte"):
        assert re.search(rf"{name} +│ +\d+\.\d+", answer.out)
    assert max(map(len, answer.out.splitlines())) <= 80


def test_other_text_is_evaluated_whole_in_the_tokens_of_the_run(cli, run, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("the king hath love. €")
    answer = cli("eval", run, "--data", other, "--json")
    assert answer.code == 0
    assert "'€'; they are left out" in answer.err
    assert json.loads(answer.out)["loss"] != json.loads(cli("eval", run, "--json").out)["loss"]
    table = cli("eval", run, "--data", text).out
    assert f"{len(text.read_text()) - 1:,} tokens" in table


def test_evaluation_on_a_named_backend_gives_the_same_figure_and_says_who_computed(cli, run):
    answer = cli("eval", run, "--json", "--backend", "cpp", "--device", "cpu")
    assert re.fullmatch(r"tinygpt: backend cpp: .*\blayer_norm\b.* on cpp\n", answer.err)
    reference = cli("eval", run, "--json", "--backend", "reference")
    assert "on reference" in reference.err
    assert json.loads(answer.out)["loss"] == pytest.approx(json.loads(reference.out)["loss"], rel=1e-5)
    assert "did you mean" in cli("eval", run, "--backend", "cp").err
