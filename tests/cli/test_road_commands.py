"""One command per model: train, eval, generate, and what is said where something does not fit."""

import json
import re

import pytest

from tinygpt.models import MODELS

BRIEF = ["training.batch_size=2", "training.eval_batches=2", "training.sample_tokens=20", "training.eval_every=4",
         "training.checkpoint_every=4"]  # fmt: skip
BLOCKS = ["model.layers=1", "model.width=32", "model.heads=2"]
MORE = {"bigram": ["model.block_size=8"], "average": ["model.width=16"], "minilm": ["model.block_size=8", *BLOCKS],
        "gpt": ["model.block_size=8", *BLOCKS], "transformer": BLOCKS, "encoder": BLOCKS}  # fmt: skip
FIGURES = {
    "bigram": ["loss", "perplexity", "bits_per_char", "bits_per_byte", "closed_form", "closed_form_train"],
    "transformer": ["loss", "perplexity", "exact_match", "bleu"],
    "encoder": ["loss", "accuracy"],
}


def files(folder):
    words = ["ab", "cd", "ef", "abc", "fed", "bad", "fee", "cab", "dab", "fab"] * 2
    (folder / "pairs.tsv").write_text("".join(f"{w}\t{w[::-1]}\n" for w in words))
    (folder / "lines.csv").write_text("text,label\n" + "".join(f"so {w},{w < 'cc'}\n" for w in words))


@pytest.fixture
def train(cli, text, tmp_path):
    files(tmp_path)
    data = {"transformer": tmp_path / "pairs.tsv", "encoder": tmp_path / "lines.csv"}

    def run(model, *more):
        return cli("train", "--model", model, "--data", data.get(model, text), "--steps", 8, "--out", "r", "--device", "cpu",
                   "--set", *BRIEF, *MORE[model], *more)  # fmt: skip

    return run


@pytest.mark.parametrize("model", MODELS)
def test_every_model_trains_resumes_is_measured_and_answers(cli, train, tmp_path, model):
    answer = train(model)
    assert answer.code == 0, answer.err
    assert re.search(rf"model +{model}, \d", answer.out)
    assert "validation loss" in answer.out
    assert ("sample at step 0" in answer.out) == (model == "average")
    answer = cli("eval", "r", "--json")
    assert answer.code == 0, answer.err
    figures = json.loads(answer.out)
    assert list(figures) == FIGURES.get(model, ["loss", "perplexity", "bits_per_char", "bits_per_byte"])
    final = [m["final"] for line in (tmp_path / "r/metrics.jsonl").open() if "final" in (m := json.loads(line))][-1]
    assert figures["loss"] == pytest.approx(final["loss"], rel=1e-5)
    table = cli("eval", "r").out
    assert re.search(r"loss +│ +\d+\.\d+", table)
    assert max(map(len, table.splitlines())) <= 80
    answer = cli("train", "--resume", "--out", "r", "--steps", 12)
    assert answer.code == 0, answer.err
    assert "resumed at step 8 of 12" in answer.out
    prompt = "the king"
    answer = cli("generate", "r", "--prompt", prompt, "--tokens", 9, "--seed", 1)
    assert answer.code == 0, answer.err
    assert cli("generate", "r", "--prompt", prompt, "--tokens", 9, "--seed", 1).out == answer.out
    if model == "encoder":
        assert re.fullmatch(r"(True|False) \(\d+\.\d %\)\n", answer.out)
        assert "right" in table
    elif model == "transformer":
        assert cli("generate", "r", "--prompt", "fed", "--beams", 3).code == 0
    else:
        assert answer.out.startswith(prompt)


def test_the_bigram_prints_its_closed_form_beside_its_loss(train):
    assert re.search(r"closed form \(counts of the training text plus one\): \d\.\d{4} nats", train("bigram").out)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("train --model transfomer", "unknown model 'transfomer'; did you mean 'transformer'?"),
        (
            "train --model minilm --preset char-gpu",
            "--preset char-gpu is a gpt's; --model minilm has settings of its own",
        ),
        ("train --model bigram --set model.layers=2", "model 'bigram' has no setting model.layers"),
        ("train --model transformer --data python", "'python' holds plain text, and model 'transformer' reads reverse"),
        ("train --model transformer --data {text}", "holds plain text, and model 'transformer' reads reverse"),
        ("train --data dates", "'dates' holds pairs of source and target, and model 'gpt' reads plain text"),
        ("train --model encoder --data none.csv", "no such file: none.csv"),
        ("generate x --beams 0", "--beams 0 must be at least 1"),
    ],
)
def test_what_does_not_fit_is_said_before_torch_is_imported(process, text, argv, says):
    code = "import sys; from tinygpt.cli import main; c = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(c)"
    answer = process("-c", code, *argv.format(text=text).split())
    assert says in answer.error()
    assert answer.code == 2


def test_a_run_keeps_its_model(cli, train):
    assert train("bigram").code == 0
    answer = cli("train", "--resume", "--out", "r", "--model", "average")
    assert "--model cannot change when a run goes on: r is a bigram, not a average" in answer.error()
    assert answer.code == 2
    assert "--beams is for translations" in cli("eval", "r", "--beams", 2).error()


def test_a_pair_that_is_too_long_names_its_line_and_the_setting(train):
    answer = train("transformer", "model.block_size=3")
    assert re.search(
        r"pairs\.tsv line 4: its source has 4 tokens, its end included, and model\.block_size=3", answer.error()
    )
    assert "set model.block_size to 4" in answer.err


def test_a_prompt_that_is_too_long_for_a_translation(cli, train):
    assert train("transformer", "model.block_size=4").code == 0
    assert "the prompt has 4 tokens; this run's context holds 3" in cli("generate", "r", "--prompt", "abcd").error()


def test_long_lines_are_cut_for_a_classifier_and_that_is_said(train):
    assert "20 lines are cut at model.block_size=1 tokens" in re.sub(
        r"\s+", " ", train("encoder", "model.block_size=1").out
    )


def test_labels_the_run_does_not_know(cli, train, tmp_path):
    assert train("encoder").code == 0
    (tmp_path / "other.csv").write_text("text,label\nso ab,True\nso ef,maybe\n")
    answer = cli("eval", "r", "--data", tmp_path / "other.csv")
    assert (
        "other.csv line 3: class 'maybe' has no example among those that train, which know 'False', 'True'"
        in answer.error()
    )
    (tmp_path / "other.csv").write_text("text,label\nso ab,True\nso ef,False\n")
    assert json.loads(cli("eval", "r", "--json", "--data", tmp_path / "other.csv").out)["loss"] > 0


@pytest.mark.parametrize("command", ["generate", "eval", "train --resume --out"])
def test_a_tokenizer_of_another_run(cli, train, run, tmp_path, command):
    (run / "tokenizer.json").write_text('{"format": "tinygpt-tokenizer", "version": 1, "type": "char", '
                                        '"characters": ["a", "b"], "unknown_token": false}')  # fmt: skip
    error = cli(*command.split(), run).error()
    assert "is not the tokenizer this run was trained with, but of another run" in error


def test_without_sacrebleu_the_remedy_is_named(cli, train, monkeypatch):
    assert train("transformer").code == 0
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    answer = cli("eval", "r")
    assert "BLEU needs sacrebleu: pip install 'tinygpt[bleu]'" in answer.out
    assert "bleu" not in json.loads(cli("eval", "r", "--json").out)
