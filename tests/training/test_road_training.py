"""Every model of the road trains: alike on every backend, on after a stop, and to what it is there for."""

import math

import numpy as np
import pytest
import torch
from small import corpus

from tinygpt import models
from tinygpt.checkpoint import Run
from tinygpt.data.batches import IGNORED
from tinygpt.optim import learning_rate
from tinygpt.training.display import Display
from tinygpt.training.tasks import open_task
from tinygpt.training.tasks.counted import counts, entropy
from tinygpt.training.tasks.lines import rows
from tinygpt.training.trainer import Trainer, train

DATA = {"transformer": "reverse", "encoder": "opinions"}
BLOCKS = ["model.layers=1", "model.heads=2", "model.width=32"]
SHAPE = {"bigram": [], "average": ["model.width=16", "model.hidden=32"]}


def config(name, folder, *assignments, backend="torch"):
    data = DATA.get(name) or corpus(folder)
    return models.configure(
        models.kind(name).defaults,
        [f"data.sources={data}", "device=cpu", f"backend={backend}", "training.batch_size=4", "training.eval_batches=2",
         "training.sample_tokens=10", *([] if name == "average" else ["optim.warmup=2"]), *SHAPE.get(name, BLOCKS),
         *assignments],
    )  # fmt: skip


def without_dropout(name):
    return ["model.dropout=0"] if "dropout" in models.kind(name).options else []


def losses(settings, steps):
    trainer = Trainer(settings, Display(), None)
    found = []
    for _ in range(steps):
        loss, _ = trainer.train_step(learning_rate(settings.optim, trainer.step, 20))
        trainer.step += 1
        found.append(loss.item())
    return found, trainer


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize(
    ("backend", "steps"), [("cpp", 10), ("torch", 10), pytest.param("triton", 2, marks=pytest.mark.slow)]
)
def test_backends_train_every_model_alike(tmp_path, name, backend, steps):
    plain = without_dropout(name)
    ours, trainer = losses(config(name, tmp_path, *plain, f"strict={backend != 'cpp'}", backend=backend), steps)
    reference, _ = losses(config(name, tmp_path, *plain, backend="reference"), steps)
    assert max(abs(a - b) for a, b in zip(ours, reference, strict=True)) < 1e-4
    assert len(set(ours)) == steps
    assert {served for op in trainer.kernels.served().values() for served in op} == {backend}


@pytest.mark.parametrize("name", models.MODELS)
def test_a_run_that_was_stopped_is_the_run_that_was_not(tmp_path, name):
    short = ["training.steps=6", "training.accumulate=2", "training.eval_every=3", "training.checkpoint_every=3",
             "training.log_every=1", "training.final_evaluation=false"]  # fmt: skip
    settings = config(name, tmp_path, *short, backend="auto")
    train(settings, tmp_path / "whole")
    train(settings, tmp_path / "half")
    run = Run.open(tmp_path / "half")
    run.sweep(3)
    train(settings, tmp_path / "half", resume=True)
    one, other = (Run.open(tmp_path / name) for name in ("whole", "half"))
    for key, value in one.load_weights(6).items():
        assert torch.equal(other.load_weights(6)[key], value), key
    kept = [[(m["step"], m["loss"]) for m in run.metrics() if "loss" in m] for run in (one, other)]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 6


@pytest.mark.parametrize("name", ["minilm", "transformer"])
def test_accumulated_microbatches_weigh_every_target_alike_whatever_the_padding(tmp_path, name):
    plain = [*without_dropout(name), "model.label_smoothing=0"] if name == "transformer" else without_dropout(name)
    accumulated = Trainer(config(name, tmp_path, "training.accumulate=3", *plain), Display(), None)
    loss, _ = accumulated.train_step(0.0)
    one = Trainer(config(name, tmp_path, *plain), Display(), None)
    total = targets = 0
    for micro in range(3):
        batch = one.task.batch(0, micro)
        count = int((batch[-1] != IGNORED).sum())
        total += one.model(*batch, None).item() * count
        targets += count
    assert loss.item() == pytest.approx(total / targets, rel=1e-5)


def test_rows_are_lines_and_hold_every_token_but_the_first_once(tmp_path):
    tokens = np.array([5, 1, 2, 0, 3, 0, 0, 4, 1, 2, 3, 4, 1], np.uint16)  # 0 ends a line
    assert rows(tokens, 0, 3).tolist() == [1, 4, 6, 7, 10, 13]
    assert rows(tokens, None, 5).tolist() == [1, 6, 11, 13]
    assert rows(tokens[:1], 0, 3).tolist() == [1]
    task = open_task(config("minilm", tmp_path, "model.block_size=7"), torch.device("cpu"))
    seen = []
    for x, y in task.validation(3):
        real = y != IGNORED
        assert (real.long().diff(dim=1) <= 0).all()  # padding stands at the end
        assert (x[:, 1:][real[:, 1:]] == y[:, :-1][real[:, 1:]]).all()
        assert not (y[:, :-1][real[:, 1:]] == task.line_end).any()
        seen += y[real].tolist()
    assert seen == task.corpus.validation[1:].tolist()
    assert (task.batch(0)[1] == IGNORED).any()


def test_counting_is_what_it_says():
    tokens = np.array([0, 1, 1, 2, 1, 1], np.uint16)
    table = counts(tokens, 3)
    assert table.tolist() == [[0, 1, 0], [0, 2, 1], [0, 1, 0]]
    expected = (
        -sum(math.log((table[a, b] + 1) / (table[a].sum() + 3)) for a, b in [(0, 1), (1, 1), (1, 2), (2, 1), (1, 1)])
        / 5
    )
    assert entropy(table, table) == pytest.approx(expected)


def trained(settings):
    trainer = Trainer(settings, Display(), None)
    while trainer.step < settings.training.steps:
        trainer.train_step(learning_rate(settings.optim, trainer.step, settings.training.steps))
        trainer.step += 1
    return trainer, trainer.task.evaluate(trainer.model, torch.float32)


def test_a_trained_bigram_is_the_counted_one(tmp_path):
    settings = models.configure(
        models.kind("bigram").defaults, ["data.sources=python", "device=cpu", "training.steps=600"]
    )
    trainer, found = trained(settings)
    assert abs(found.loss - found.closed_form) < 0.02
    table = torch.log((torch.from_numpy(counts(trainer.corpus.train, trainer.task.vocab_size)) + 1).double())
    distance = (torch.softmax(table, 1) - torch.softmax(trainer.model.table.detach().double(), 1)).abs().sum(1)
    share = table.exp().sum(1) / table.exp().sum()
    assert (distance * share).sum() < 0.1  # of 2 at most
    assert any("closed form" in line for line in found.details())


def test_a_reversal_of_short_words_is_learned(tmp_path):
    pairs = tmp_path / "pairs.tsv"
    words = ["".join(w) for n in (1, 2, 3) for w in __import__("itertools").product("abcdef", repeat=n)]
    order = np.random.default_rng(0).permutation(len(words))
    pairs.write_text("".join(f"{words[i]}\t{words[i][::-1]}\n" for i in order))
    settings = models.configure(
        models.kind("transformer").defaults, [f"data.sources={pairs}", "device=cpu", "training.steps=250", "model.layers=1",
                                              "model.width=32", "training.batch_size=32", "optim.warmup=40", "optim.lr=6e-3"]
    )  # fmt: skip
    trainer, found = trained(settings)
    assert found.exact_match > 0.9, found
    assert found.bleu > 90
    trainer.task.beams = 3
    assert trainer.task.evaluate(trainer.model, torch.float32).exact_match >= found.exact_match - 0.05


def test_opinions_are_told_apart_and_negations_understood():
    settings = models.configure(
        models.kind("encoder").defaults,
        ["device=cpu", "data.sources=opinions", "training.steps=400"],
    )
    trainer, found = trained(settings)
    assert found.accuracy > 0.95, found.details()
    assert sum(map(sum, found.confusion)) == found.tokens == 1000
    from tinygpt.training.tasks.labelled import classify_text

    for text, label in (("the plot was great", "positive"), ("the plot was not great", "negative"),
                        ("the cast was awful but the music was superb", "positive")):  # fmt: skip
        assert classify_text(trainer.model, trainer.tokenizer, text, trainer.task.labels)[0] == label


@pytest.mark.slow
@pytest.mark.parametrize(("data", "least"), [("reverse", 1.0), ("dates", 0.99)])
def test_the_default_transformer_learns_its_made_up_tasks(data, least):
    """With one command's settings; beside exactness, this holds that held-out inputs were never seen in training."""
    settings = models.configure(models.kind("transformer").defaults, [f"data.sources={data}", "device=cpu"])
    trainer, found = trained(settings)
    train_set, held_out = ({trainer.tokenizer.decode(half.first[i]) for i in range(len(half))}
                           for half in (trainer.corpus.train, trainer.corpus.validation))  # fmt: skip
    assert len(held_out) == found.translated == 1000
    assert not train_set & held_out
    assert found.exact_match >= least, found.summary()
