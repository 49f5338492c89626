"""Run directories: what is refused, what is kept, what is never run."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small import small

from tinygpt import GPT, checkpoint
from tinygpt.checkpoint import Run
from tinygpt.config import override
from tinygpt.errors import UserError
from tinygpt.training import trainer
from tinygpt.training.trainer import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    result = train(small(folder), folder / "run")
    return folder, result


@pytest.fixture
def run(finished, tmp_path):
    """A finished run of this test's own."""
    subprocess.run(["cp", "-r", finished[0] / "run", tmp_path / "run"], check=True)
    return tmp_path / "run"


def test_a_run_learns_and_leaves_all_its_files(finished):
    folder, result = finished
    names = {p.name for p in (folder / "run").iterdir()}
    assert names == {
        "config.json",
        "tokenizer.json",
        "metrics.jsonl",
        "samples.txt",
        "loss.png",
        "checkpoints",
        ".lock",
    }
    metrics = Run.open(folder / "run").metrics()
    losses = [m["val_loss"] for m in metrics if "val_loss" in m]
    assert losses[-1] < losses[0] - 0.3
    assert result.evaluation.loss == pytest.approx(losses[-1], abs=0.3)
    facts = json.loads((folder / "run/config.json").read_text())
    assert facts["backends"]["layer_norm"] == ["torch"]
    assert facts["config"]["model"]["width"] == 32
    assert facts["environment"]["torch"] == torch.__version__


def test_from_run_gives_the_trained_model(finished):
    folder, _ = finished
    model = GPT.from_run(folder / "run", backend="torch")
    assert not model.training
    saved = Run.open(folder / "run").load_weights()
    assert all(torch.equal(p, saved[name]) for name, p in model.state_dict().items())


def test_a_run_is_never_overwritten_unasked(run, finished):
    config = small(finished[0])
    before = (run / "config.json").read_bytes()
    with pytest.raises(UserError, match="--resume, replace it with --overwrite, or give another --out"):
        train(config, run)
    assert (run / "config.json").read_bytes() == before
    train(override(config, ["training.steps=5"]), run, overwrite=True)
    assert Run.open(run).checkpoints() == [0, 5]


def test_overwriting_keeps_the_old_run_until_the_new_one_stands(run, finished, monkeypatch):
    monkeypatch.setattr(trainer.Trainer, "save", lambda self, run: (_ for _ in ()).throw(UserError("no")))
    with pytest.raises(UserError, match="no"):
        train(small(finished[0]), run, overwrite=True)
    assert Run.open(run).checkpoints()[-1] == 20
    assert [p.name for p in run.parent.iterdir()] == ["run"]


def test_a_folder_that_is_no_run_is_left_alone(tmp_path, finished):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is no run of tinygpt's"):
        train(small(finished[0]), tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious/thesis.txt").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "config.json").unlink(), "not a run of tinygpt's: it has no config.json"),
        (lambda run: (run / "config.json").write_text('{"format": 1, '), "config.json is damaged"),
        (lambda run: (run / "config.json").write_text("[]"), "config.json is damaged"),
        (lambda run: (run / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda run: (run / "tokenizer.json").write_text("{"), "tokenizer.json"),
        (lambda run: [f.write_bytes(b"x") for f in run.rglob("model.safetensors")], "model.safetensors is damaged"),
        (lambda run: subprocess.run(["rm", "-r", run / "checkpoints"]), "holds no checkpoint"),
    ],
)
def test_damage_is_one_message_that_names_the_file(run, damage, message):
    damage(run)
    with pytest.raises(UserError, match=message):
        GPT.from_run(run)


def test_a_missing_run_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match=r"no run at .*nowhere.*tinygpt train --out"):
        Run.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "of format 99, this version of tinygpt reads 1; update tinygpt"),
        ({"config": {"model": {"layerz": 3}}}, "did you mean 'model.layers'"),
    ],
)
def test_a_newer_or_foreign_config_is_refused(run, change, message):
    values = json.loads((run / "config.json").read_text()) | change
    (run / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        Run.open(run)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_in_a_checkpoint_is_not_run(run, finished, tmp_path):
    for folder in (run / "checkpoints").iterdir():
        torch.save({"step": 20, "x": Malicious(tmp_path / "owned")}, folder / "training.pt")
    with pytest.raises(UserError, match="holds code, which was not run"):
        train(small(finished[0]), run, resume=True)
    for folder in (run / "checkpoints").iterdir():
        (folder / "training.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "owned")))
    with pytest.raises(UserError, match=r"holds code, which was not run|is damaged"):
        train(small(finished[0]), run, resume=True)
    assert not (tmp_path / "owned").exists()


def test_a_full_disk_loses_nothing(run, finished, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    before = (run / "checkpoints/step-20/model.safetensors").read_bytes()
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"no space left for .*what was saved before is whole"):
        train(override(small(finished[0]), ["training.steps=30"]), run, resume=True)
    assert (run / "checkpoints/step-20/model.safetensors").read_bytes() == before
    assert not list(run.rglob(".step-*"))
    monkeypatch.undo()
    assert train(override(small(finished[0]), ["training.steps=30"]), run, resume=True).step == 30


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path):
    run = Run(tmp_path, small(tmp_path, "training.keep_checkpoints=2"), None, {})
    (tmp_path / "checkpoints").mkdir()
    for step, loss in ((0, 9.0), (5, 1.0), (10, 2.0), (15, 3.0), (20, 4.0)):
        run.save(step, {"w": torch.full((2,), float(step))}, {"step": step}, loss)
    assert run.checkpoints() == [5, 15, 20]
    assert run.load_weights(best=True)["w"][0] == 5
    assert run.load_weights()["w"][0] == 20
    with pytest.raises(UserError, match="the run has checkpoints at 5, 15, 20"):
        run.load_weights(7)


def test_two_processes_cannot_train_into_one_run(run, finished):
    first = Run.open(run, lock=True)
    with pytest.raises(UserError, match="another process is training into"):
        train(small(finished[0]), run, resume=True)
    first.close()


def test_a_replacement_killed_half_way_is_undone(run):
    run.rename(run.with_name(".run.replaced"))
    assert Run.open(run).checkpoints()[-1] == 20
    assert [p.name for p in run.parent.iterdir()] == ["run"]


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(tmp_path):
    config = small(tmp_path, "optim.lr=1e30", "optim.min_lr=0", "optim.warmup=0", "optim.clip=none")
    with pytest.raises(UserError, match=r"at step \d+; the run stops.*--resume --set optim.lr"):
        train(config, tmp_path / "run")
    kept = Run.open(tmp_path / "run")
    assert all(torch.isfinite(t).all() for t in kept.load_weights().values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_the_step_saves_and_resumes_exactly(tmp_path, number):
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); from small import small;"
        "from tinygpt.training.trainer import train; from tinygpt.training.display import Lines;"
        "r = train(small(Path(sys.argv[2]), 'training.steps=100000', 'training.checkpoint_every=1000000'),"
        "Path(sys.argv[2]) / 'run', display=Lines()); print('ended', r.step, r.signal)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    time.sleep(0.2)
    os.kill(process.pid, number)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    _, step, caught = rest.splitlines()[-1].split()
    assert int(caught) == number
    assert int(step) in Run.open(tmp_path / "run").checkpoints()


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot be written|is no run"):
        train(small(tmp_path), tmp_path / "file" / "run")
