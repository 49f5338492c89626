"""`tinygpt train`: new runs, runs that go on, and what ends them."""

import json
import re
import signal
import sys
from pathlib import Path

import pytest

from tinygpt.cli import train as train_command
from tinygpt.cli.arguments import parse
from tinygpt.cli.train import plan


def config(run):
    return json.loads((run / "config.json").read_text())["config"]


def last_step(run):
    return max(int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").glob("step-*"))


def test_a_new_run_shows_what_it_is_and_says_what_to_do_next(cli, text, tmp_path, small):
    answer = cli("train", "--data", text, "--steps", 4, "--seed", 5, "--backend", "cpp", *small)
    run = tmp_path / "runs" / "text-char-cpu"
    assert answer.code == 0
    assert answer.err == ""
    assert re.search(r"corpus +text: [\d,]+ training and [\d,]+ validation tokens, vocabulary \d+ \(char\)", answer.out)
    assert re.search(r"backend +cpp -> cpp for every op; gradients written out", answer.out)
    assert re.search(r"validation loss \d\.\d+: perplexity", answer.out)
    assert "--- sample at step 4" in answer.out
    assert "  tinygpt generate runs/text-char-cpu\n  tinygpt eval runs/text-char-cpu" in answer.out
    recorded = config(run)
    assert (recorded["training"]["steps"], recorded["seed"], recorded["backend"]) == (4, 5, "cpp")
    assert (recorded["model"]["layers"], recorded["model"]["block_size"]) == (1, 8)
    assert recorded["data"]["sources"] == [str(text)]
    assert last_step(run) == 4


def test_set_is_more_exact_than_a_flag_and_the_last_of_two_wins(cli, text, tmp_path, small):
    cli("train", "--data", text, "--steps", 9, "--out", "r", *small, "--set", "training.steps=3", "training.steps=2")
    assert config(tmp_path / "r")["training"]["steps"] == 2


def test_an_existing_run_is_kept_unless_told_otherwise(cli, text, run, small):
    before = (run / "metrics.jsonl").read_text()
    message = cli("train", "--data", text, "--out", run, *small).error()
    assert all(option in message for option in ("--resume", "--overwrite", "--out"))
    assert (run / "metrics.jsonl").read_text() == before
    answer = cli("train", "--data", text, "--out", run, "--overwrite", "--steps", 4, *small)
    assert answer.code == 0
    assert last_step(run) == 4


def test_resume_takes_the_settings_of_the_run(cli, run):
    answer = cli("train", "--resume", "--out", run, "--steps", 12, "--backend", "cpp", "--set", "training.log_every=1")
    assert answer.code == 0
    assert "resumed at step 8 of 12" in answer.out
    assert "backend auto -> cpp" in answer.out
    recorded = config(run)
    assert recorded["model"]["width"] == 32
    assert (recorded["backend"], recorded["training"]["log_every"]) == ("cpp", 1)
    assert last_step(run) == 12


def test_the_same_command_with_resume_goes_on(cli, text, tmp_path, small):
    command = ("train", "--data", text, "--preset", "char-cpu", *small)
    assert cli(*command, "--steps", 4).code == 0
    assert cli(*command, "--resume", "--steps", 6).code == 0
    assert last_step(tmp_path / "runs" / "text-char-cpu") == 6


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (("--set", "model.layers=2"), "model.layers"),
        (("--seed", "3"), "seed"),
        (("--set", "training.batch_size=4"), "training.batch_size"),
        (("--data", "python"), "data.sources"),
        (("--preset", "gpt2"), "preset"),
    ],
)
def test_resume_refuses_to_change_what_a_run_is(cli, run, change, key):
    answer = cli("train", "--resume", "--out", run, *change)
    assert answer.code == 2
    assert answer.error().startswith(f"{key} cannot change when a run goes on")


def test_the_default_preset_is_that_of_the_device(monkeypatch, text):
    planned = []
    monkeypatch.setattr(train_command, "_train", lambda args, job: planned.append(job.config.preset) or 0)
    for gpu, argv in [(False, []), (True, []), (False, ["--device", "cuda"]), (True, ["--device", "cpu"])]:
        monkeypatch.setattr(train_command, "gpu_present", lambda gpu=gpu: gpu)
        plan(parse(["train", "--data", str(text), *argv]))()
    assert planned == ["char-cpu", "char-gpu", "char-gpu", "char-cpu"]


def test_a_gpu_that_torch_cannot_use_does_not_choose_the_preset(monkeypatch, cli, text, tmp_path, small):
    monkeypatch.setattr(train_command, "gpu_present", lambda: True)
    assert cli("train", "--data", text, "--device", "cpu", "--steps", 1, *small).code == 0
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli("train", "--data", text, "--overwrite", "--steps", 1, *small).code == 0
    assert [run.name for run in (tmp_path / "runs").glob("[!.]*")] == ["text-char-cpu"]


def test_without_data_the_default_corpus_is_named_and_recorded(monkeypatch, capsys):
    jobs = []
    monkeypatch.setattr(train_command, "_train", lambda args, job: jobs.append(job) or 0)
    plan(parse(["train"]))()
    assert "no --data given: reading '" in jobs[0].notice
    (name,) = jobs[0].config.data.sources
    assert f"'{name}'" in jobs[0].notice
    assert jobs[0].out.name.startswith(f"{name}-char-")


def test_triton_runs_without_a_gpu_and_says_how(process, text, tmp_path, small):
    answer = process("-m", "tinygpt.train", "--backend", "triton", "--data", text, "--device", "cpu", "--steps", 1,
                     "--out", "r", *small)  # fmt: skip
    assert answer.code == 0, answer.err
    served = json.loads((tmp_path / "r" / "config.json").read_text())["backends"]
    from tinygpt_kernels.interpreter import gpu_present

    if not gpu_present():
        assert served["layer_norm"] == ["triton"]
        training = json.loads((tmp_path / "r" / "config.json").read_text())["config"]["training"]
        assert training["final_evaluation"] is False  # hours, through the interpreter
        assert training["eval_batches"] == 2  # what --set says stays
        assert "the whole validation split was not evaluated; `tinygpt eval` below does that" in answer.out
        assert re.fullmatch(r"triton: TRITON_INTERPRET=1 .* for correctness and not for speed\n", answer.err)


def test_a_backend_that_can_serve_nothing_says_why(cli, text, small):
    answer = cli("train", "--backend", "cuda", "--device", "cpu", "--data", text, "--steps", 1, "--out", "r", *small)
    assert answer.code == 0
    assert re.fullmatch(r"tinygpt: backend cuda will serve nothing on cpu: .+\n", answer.err)


def until_step(process, run):
    """Reads the output of a run until it trains."""
    for line in process.stdout:
        if re.match(r"step [1-9]", line):
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to handle")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(start, text, tmp_path, number, code, cli, small):
    process = start("-m", "tinygpt", "train", "--data", text, "--steps", 100_000, "--out", "my run", *small)
    until_step(process, tmp_path / "my run")
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert err == "\nfinishing this step and saving; once more to stop at once\n"
    step = int(re.search(r"stopped at step (\d+) of 100000; the run is saved", out)[1])
    assert out.endswith("  tinygpt train --resume --out 'my run'\n")
    assert last_step(tmp_path / "my run") == step


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGPIPE")
def test_a_reader_that_goes_away_is_no_error(start, run):
    process = start("-m", "tinygpt", "generate", run, "--tokens", 100_000)
    process.stdout.read(50)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""


def test_a_bug_keeps_its_traceback(monkeypatch, text):
    from tinygpt.cli import main

    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr("tinygpt.training.trainer.train", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", "--data", str(text)])


@pytest.mark.parametrize("tokenizer", ["word", "whitespace", "bpe", "unigram"])
def test_every_tokenizer_trains_resumes_generates_and_evaluates(cli, small, text, tokenizer):
    size = [] if tokenizer == "word" else ["--vocab-size", 300]
    answer = cli("train", "--data", text, "--tokenizer", tokenizer, *size, "--steps", 2, "--out", "r", *small)
    assert answer.code == 0
    assert f"({tokenizer})" in answer.out
    assert json.loads(Path("r/config.json").read_text())["config"]["data"]["vocab_size"] == (300 if size else None)
    assert cli("train", "--resume", "--out", "r", "--steps", 4).code == 0
    written = cli("generate", "r", "--prompt", "the king", "--tokens", 20, "--seed", 1)
    assert written.code == 0
    assert written.out.startswith("the king")
    assert len(written.out) > 20
    measured = json.loads(cli("eval", "r", "--json").out)
    assert 0 < measured["bits_per_char"] < 8
    changed = cli("train", "--resume", "--out", "r", "--steps", 4, "--vocab-size", 400)
    assert "data.vocab_size cannot change when a run goes on" in changed.error()
