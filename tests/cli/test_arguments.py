"""What is typed: help and wrong arguments are answered before anything heavy is imported, and by name."""

import json
import re

import pytest

import tinygpt
from tinygpt.cli.arguments import Generate, Train, parse

HEAVY = ("torch", "triton", "numpy", "datasets", "tokenizers")
REPORT = f"""
import json, sys
from tinygpt.cli import main
code = main(sys.argv[1:])
sys.stdout.write("\\n" + json.dumps([m for m in {HEAVY!r} if m in sys.modules]))
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        ("", 0, "usage: tinygpt [-h] COMMAND ..."),
        ("--help", 0, "usage: tinygpt [-h] COMMAND ..."),
        ("--version", 0, f"tinygpt {tinygpt.__version__}"),
        ("train --help", 0, "--set KEY=VALUE"),
        ("generate --help", 0, "--top-k K"),
        ("eval --help", 0, "--json"),
        ("backends --help", 0, "--json"),
        ("check --help", 0, "--backend NAME"),
        ("bench --help", 0, "--shape SIZES"),
        ("bench --backend ccp", 2, "unknown backend 'ccp'; did you mean 'cpp'?"),
        ("bench --dtype bf16", 2, "unknown dtype 'bf16'; did you mean 'bfloat16'?"),
        ("bench --threads 0", 2, "--threads 0 must be at least 1"),
        ("bench --list --clear", 2, "--list and --clear are not allowed together"),
        ("bench --shape R=8,C=8", 2, "--shape R=8,C=8 needs an op whose shape it is"),
        ("check --backend tritn", 2, "unknown backend 'tritn'; did you mean 'triton'?"),
        ("check --dtype float23", 2, "unknown dtype 'float23'; did you mean 'float32'?"),
        ("data --help", 0, "--vocab-size N"),
        ("data --tokenizer bep", 2, "unknown tokenizer 'bep'; did you mean 'bpe'?"),
        ("data --tokenizer bpe --vocab-size 9", 2, "--vocab-size 9 is too small: tokenizer 'bpe' needs at least 256"),
        ("data --list --clear", 2, "--list and --clear are not allowed together"),
        ("data --sample 0", 2, "--sample 0 must be above 0"),
        ("data nothing.txt", 2, "no such file: nothing.txt"),
        ("train --vocab-size 300", 2, "--vocab-size 300: tokenizer 'char' takes none"),
        ("train --tokenizer unigram --vocab-size 200", 2, "needs at least 256 tokens, one for each byte"),
        ("train --vocab-size 0 --tokenizer bpe", 2, "data.vocab_size=0 must be at least 1"),
        ("lesson --help", 0, "--notebook"),
        ("lesson", 0, "the past averaged in four ways"),
        ("lesson averagin", 2, "unknown lesson 'averagin'; did you mean 'averaging'?"),
        ("lesson averaging --all", 2, "--all and names are not allowed together"),
        ("lesson --notebook", 2, "--notebook needs names of lessons, or --all"),
        ("trian", 2, "train, generate, data, eval, backends, check, bench, gpu-report, ladder, lesson, tune"),
        ("train --step 3", 2, "--steps"),
        ("train --steps many", 2, "--steps"),
        ("train --resume --overwrite", 2, "not allowed together"),
        ("generate", 2, "RUN"),
        ("train --preset char-cup", 2, "unknown preset 'char-cup'; did you mean 'char-cpu'?"),
        ("train --backend tritn", 2, "unknown backend 'tritn'; did you mean 'triton'?"),
        ("generate x --backend ccp", 2, "unknown backend 'ccp'; did you mean 'cpp'?"),
        ("train --set model.layer=3", 2, "unknown setting 'model.layer'; did you mean 'model.layers'?"),
        ("train --set model.layers", 2, "not of the form key=value"),
        ("train --set model.layers=two", 2, "model.layers='two' is not a whole number"),
        ("train --set model.width=100 model.heads=3", 2, "model.heads=3 does not divide model.width=100"),
        ("train --steps 0", 2, "training.steps=0 must be at least 1"),
        ("train --tokenizer chars", 2, "unknown tokenizer 'chars'; did you mean 'char'?"),
        ("train --data shakespear", 2, "unknown dataset 'shakespear'; did you mean 'shakespeare'?"),
        ("train --data nothing.txt", 2, "no such file: nothing.txt"),
        ("eval x --data nothing.txt", 2, "no such file: nothing.txt"),
        ("generate x --temperature -1", 2, "--temperature -1.0 must be 0 (greedy) or above"),
        ("generate x --temperature nan", 2, "--temperature nan must be"),
        ("generate x --top-k 0", 2, "--top-k 0 must be at least 1"),
        ("generate x --tokens -1", 2, "--tokens -1 must be at least 0"),
    ],
)
def test_help_and_wrong_arguments_are_answered_without_torch_triton_numpy_or_datasets(process, argv, code, says):
    answer = process("-c", REPORT, *argv.split())
    said = answer.out if code == 0 else answer.err
    assert says in re.sub(r"\s*│?\n│?\s*", " ", said)
    assert answer.code == code
    assert "Traceback" not in answer.err
    assert json.loads(answer.out.splitlines()[-1]) == []
    if code == 2:
        assert len(re.findall(r"tinygpt: error: |^╭", answer.err, re.MULTILINE)) == 1


def test_options_that_take_several_words_may_be_repeated():
    command = parse(["train", "--set", "a=1", "b=2", "--data", "x", "y", "--set", "c=3", "--strict"])
    assert isinstance(command, Train)
    assert command.set == (("a=1", "b=2"), ("c=3",))
    assert command.data == (("x", "y"),)
    assert command.strict
    assert not command.resume


def test_a_prompt_may_begin_with_a_dash_and_a_run_stands_without_a_flag():
    command = parse(["generate", "runs/x", "--prompt=-- No!", "--top-k", "3"])
    assert isinstance(command, Generate)
    assert str(command.run) == "runs/x"
    assert command.prompt == "-- No!"
    assert command.top_k == 3


@pytest.mark.parametrize(
    "command", ["", "train", "generate", "data", "eval", "backends", "check", "bench", "gpu-report", "lesson", "tune"]
)
def test_help_fits_80_columns(process, command):
    lines = process("-m", "tinygpt", *command.split(), "--help").out.splitlines()
    assert max(map(len, lines)) <= 80
