"""Killed anywhere, even inside a checkpoint, and resumed: the same bytes as a run that was not."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import corpus, small

from tinygpt.checkpoint import Run
from tinygpt.config import override
from tinygpt.errors import UserError
from tinygpt.training.display import Display
from tinygpt.training.trainer import train

DRIVER = Path(__file__).with_name("killed.py")


class Noting(Display):
    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)


def weights(run, step=20):
    return (run / f"checkpoints/step-{step}/model.safetensors").read_bytes()


def state(run, step=20):
    return torch.load(run / f"checkpoints/step-{step}/training.pt", weights_only=True)


def drive(run, folder, steps, place="never", count=0):
    command = [sys.executable, DRIVER, run, folder, str(steps), place, str(count)]
    return subprocess.run(command, capture_output=True, text=True)


def survive(tmp_path, kills, steps):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    found = drive(whole, tmp_path, steps)
    assert found.returncode == 0, found.stderr
    for place, count in kills:
        found = drive(killed, tmp_path, steps, place, count)
        assert found.returncode == -signal.SIGKILL, (place, count, found.stderr)
    found = drive(killed, tmp_path, steps)
    assert found.returncode == 0, found.stderr
    assert weights(killed, steps) == weights(whole, steps)
    mine, theirs = state(killed, steps)["optimizer"], state(whole, steps)["optimizer"]
    for moments in ("exp_avgs", "exp_avg_sqs"):
        for name, moment in theirs[moments].items():
            assert torch.equal(mine[moments][name], moment), name
    logged = [[m for m in Run.open(r).metrics() if "loss" in m] for r in (killed, whole)]
    assert [(m["step"], m["loss"]) for m in logged[0]] == [(m["step"], m["loss"]) for m in logged[1]]
    assert not list(killed.rglob(".step-*"))


def test_two_kills_leave_no_trace(tmp_path):
    survive(tmp_path, [("step", 8), ("state", 2)], 20)


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(tmp_path):
    kills = [("weights", 1), ("state", 1), ("sync", 1), ("rename", 1), ("rename", 2)]  # before the run has its name
    kills += [
        ("step", 1),
        ("step", 8),
        ("log", 2),
        ("weights", 1),
        ("state", 1),
        ("sync", 2),
        ("rename", 1),
        ("prune", 1),
    ]
    kills += [("step", 2), ("log", 4), ("weights", 2), ("rename", 1), ("prune", 1), ("step", 6), ("sync", 1)]
    assert len(kills) == 20
    survive(tmp_path, kills, 60)


def test_raising_the_number_of_steps_goes_on(tmp_path):
    config = small(tmp_path)
    train(config, tmp_path / "run")
    display = Noting()
    result = train(override(config, ["training.steps=25"]), tmp_path / "run", resume=True, display=display)
    assert result.step == 25
    assert any("steps 20 -> 25" in note for note in display.notes)
    assert Run.open(tmp_path / "run").config.training.steps == 25


def test_a_finished_run_resumed_changes_nothing(tmp_path):
    config = small(tmp_path)
    train(config, tmp_path / "run")
    before = weights(tmp_path / "run")
    assert train(config, tmp_path / "run", resume=True).step == 20
    assert weights(tmp_path / "run") == before


def test_a_changed_corpus_is_refused_by_name(tmp_path):
    config = small(tmp_path)
    train(config, tmp_path / "run")
    corpus(tmp_path).write_text("something else entirely, and long enough to train on. " * 40)
    with pytest.raises(UserError, match=r"the corpus has changed since this run began \(.*corpus"):
        train(config, tmp_path / "run", resume=True)


def test_other_threads_end_exactness_and_say_so(tmp_path):
    config = small(tmp_path)
    train(config, tmp_path / "run")
    file = tmp_path / "run/checkpoints/step-20/training.pt"
    saved = state(tmp_path / "run")
    saved["exactness"]["threads"] = 64
    torch.save(saved, file)
    display = Noting()
    train(override(config, ["training.steps=21"]), tmp_path / "run", resume=True, display=display)
    assert any("not bit for bit" in note and "threads 64 ->" in note for note in display.notes)


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    config = small(tmp_path)
    train(config, tmp_path / "run")
    right = weights(tmp_path / "run")
    for name in ("model.safetensors", "training.pt"):
        file = tmp_path / "run/checkpoints/step-20" / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        display = Noting()
        train(config, tmp_path / "run", resume=True, display=display)
        assert any(f"{name} is damaged" in note for note in display.notes)
        assert any("resumed at step 15" in note for note in display.notes)
        assert weights(tmp_path / "run") == right


def test_metrics_after_the_checkpoint_are_cut(tmp_path):
    config = small(tmp_path)
    train(config, tmp_path / "run")
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 999, "loss": 1.0}\n{"step": 1')
    train(config, tmp_path / "run", resume=True)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 20


def test_weights_load_as_plain_tensors(tmp_path):
    train(small(tmp_path), tmp_path / "run")
    loaded = load_file(tmp_path / "run/checkpoints/step-20/model.safetensors")
    assert loaded["token"].shape[1] == 32
