"""Whatever is wrong, a user gets one clear message and a non-zero exit code, and loses nothing."""

import errno
import json
import pickle

import pytest
import torch

from tinygpt.tokenizers import tokenizer_class


@pytest.fixture
def train(cli, small):
    def run(data, *more):
        return cli("train", "--data", data, "--out", "r", "--steps", 4, *small, *more)

    return run


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (b"", 2, "is empty"),
        (b"x", 1, "1 character"),
        (b"\x7fELF\0\0\0\1" * 100, 1, "is binary, not text"),
        ("naïve café ".encode("latin-1") * 100, 1, "is not UTF-8: byte 2 (0xef)"),
        (b"too short", 1, "the training split holds 8 tokens, and model.block_size=8 needs at least 9"),
    ],
    ids=["empty", "one character", "binary", "latin-1", "short"],
)
def test_files_that_cannot_be_trained_on(cli, tmp_path, content, code, says, train):
    file = tmp_path / "file.txt"
    file.write_bytes(content)
    answer = train(file)
    assert says in answer.error()
    assert answer.code == code
    assert not (tmp_path / "r").exists()


def test_a_directory_as_data(cli, tmp_path, train):
    answer = train(tmp_path)
    assert "is a directory" in answer.error()
    assert answer.code == 2


@pytest.mark.parametrize("command", ["generate", "eval", "train --resume --out"])
def test_a_run_that_is_not_there(cli, command):
    answer = cli(*command.split(), "runs/nowhere")
    assert "no run at runs/nowhere" in answer.error()
    assert answer.code == 1


@pytest.mark.parametrize("command", ["generate", "eval", "train --resume --out"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_truncated_run(cli, run, command, file):
    (run / file).write_bytes((run / file).read_bytes()[:40])
    answer = cli(*command.split(), run)
    assert str(run / file) in answer.error()
    assert answer.code == 1


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_truncated_weights(cli, run, command):
    file = run / "checkpoints" / "step-8" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    answer = cli(command, run)
    assert f"{file} is damaged" in answer.error()
    assert answer.code == 1


@pytest.mark.parametrize("command", ["generate", "eval", "train --resume --out"])
def test_a_run_from_a_newer_version(cli, run, command):
    values = json.loads((run / "config.json").read_text())
    values["format"] += 1
    values["config"]["model"]["experts"] = 8
    (run / "config.json").write_text(json.dumps(values))
    answer = cli(*command.split(), run)
    assert "update tinygpt" in answer.error()
    assert answer.code == 1


class Malicious:
    def __reduce__(self):
        return print, ("code of the file was run",)


def test_a_run_that_holds_code_is_refused_and_the_code_not_run(cli, run):
    for folder in (run / "checkpoints").glob("step-*"):
        torch.save({"step": Malicious()}, folder / "training.pt", pickle_module=pickle)
    answer = cli("train", "--resume", "--out", run, "--steps", 12)
    assert "holds code, which was not run" in answer.error()
    assert answer.code == 1
    assert "code of the file was run" not in answer.out


@pytest.mark.parametrize("command", ["eval", "train --resume --steps 12 --out"])
def test_a_corpus_that_changed(cli, tmp_path, text, command, train):
    file = tmp_path / "mine.txt"
    file.write_text(text.read_text())
    assert train(file).code == 0
    file.write_text(text.read_text().replace("king", "duke"))
    answer = cli(*command.split(), "r")
    assert "has changed since" in answer.error()
    assert answer.code == 1


def test_a_device_that_is_not_there(cli, text, run, train):
    absent = f"cuda:{torch.cuda.device_count()}"
    for answer in (train(text, "--device", absent), cli("generate", run, "--device", absent)):
        assert f"--device {absent}" in answer.error()
        assert answer.code == 1
    assert "unknown device 'gpu'" in train(text, "--device", "gpu").error()


def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(cli, run, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tinygpt.checkpoint.save_file", full)
    answer = cli("train", "--resume", "--out", run, "--steps", 12)
    assert "no space left" in answer.error()
    assert answer.code == 1
    monkeypatch.undo()
    assert cli("generate", run, "--tokens", 1).code == 0


def test_no_backend_can_serve_and_torch_may_not(cli, text, tmp_path, train):
    answer = train(text, "--backend", "cuda", "--strict", "--device", "cpu")
    message = answer.error()
    assert "backend 'cuda' cannot serve this call" in message
    assert "'reference' always serves" in message
    assert answer.code == 1
    assert not (tmp_path / "r").exists()


def test_an_op_that_does_not_exist(cli, text, train):
    answer = train(text, "--backend", "layernorm=torch")
    assert "unknown op 'layernorm'; did you mean 'layer_norm'?" in answer.error()
    assert answer.code == 2


def test_an_extension_that_was_not_built_says_so(process, text, small):
    code = "import sys; sys.modules['tinygpt_kernels._C'] = None; from tinygpt.cli import main; sys.exit(main(sys.argv[1:]))"
    answer = process("-c", code, "train", "--data", text, "--device", "cpu", "--backend", "layer_norm=cpp", "--strict",
                     "--out", "r", *small)  # fmt: skip
    assert "its extension is not built: install a C++ compiler" in answer.error()
    assert answer.code == 1


@pytest.mark.parametrize("command", ["generate", "eval", "train --resume --out"])
def test_a_tokenizer_file_from_another_run(cli, run, tmp_path, command):
    tokenizer_class("char").train(["another text"]).save(run / "tokenizer.json")
    answer = cli(*command.split(), run)
    assert f"{run / 'tokenizer.json'} is not the tokenizer this run was trained with" in answer.error()
    assert answer.code == 1


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_a_vocabulary_larger_than_the_embedding(cli, run, command):
    """In a run that does not say what its tokenizer was, as runs of older versions do not."""
    tokenizer_class("bpe").train(["another text"]).save(run / "tokenizer.json")
    values = json.loads((run / "config.json").read_text())
    del values["tokenizer"]
    (run / "config.json").write_text(json.dumps(values))
    answer = cli(command, run)
    assert "tokens and the model's embedding" in answer.error()
    assert answer.code == 1


def test_a_vocabulary_too_small_for_the_text(cli, tmp_path, train):
    (tmp_path / "a.txt").write_text("".join(map(chr, range(0x4E00, 0x4F00))) * 9)
    answer = train(tmp_path / "a.txt", "--tokenizer", "word", "--vocab-size", 99)
    assert "--vocab-size 99 is too small: this text has 256 distinct characters" in answer.error()
    assert answer.code == 1
    assert not (tmp_path / "r").exists()


def test_one_character_over_and_over_trains(tmp_path, train):
    (tmp_path / "a.txt").write_text("a" * 3000)
    assert train(tmp_path / "a.txt").code == 0
