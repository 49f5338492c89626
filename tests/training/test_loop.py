"""The loop's arithmetic: backends agree, accumulation is exact, evaluation and display disturb nothing."""

import math

import pytest
import torch
from small import small

from tinygpt.checkpoint import Run
from tinygpt.config import override
from tinygpt.errors import UserError
from tinygpt.models.gpt import GPT
from tinygpt.optim import LossScale
from tinygpt.training.display import Display
from tinygpt.training.evaluate import evaluate
from tinygpt.training.machine import pick_device, pick_precision
from tinygpt.training.trainer import Trainer, train
from tinygpt_kernels import bind


def losses(config, steps):
    trainer = Trainer(config, Display(), None)
    found = []
    for _ in range(steps):
        loss, _ = trainer.train_step(1e-3)
        trainer.step += 1
        found.append(loss.item())
    return found, trainer


WIDER = ("model.layers=4", "model.heads=4", "model.width=128", "model.block_size=64", "training.batch_size=12")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return losses(small(tmp_path_factory.mktemp("reference"), *WIDER, backend="reference"), 50)[0]


@pytest.mark.parametrize("backend", ["torch", "cpp", "auto"])
def test_fifty_steps_follow_the_reference(tmp_path, reference, backend):
    ours, trainer = losses(small(tmp_path, *WIDER, backend=backend), 50)
    assert max(abs(a - b) for a, b in zip(ours, reference, strict=True)) < 1e-3
    assert ours[-1] < ours[0] - 0.5
    if backend == "cpp":
        assert set(trainer.kernels.served().values()) == {("cpp",)}
    assert trainer.gradients.how == ("by autograd" if backend == "torch" else "written out")


def test_autograd_and_the_written_step_train_alike(tmp_path):
    ours, _ = losses(small(tmp_path, backend="cpp"), 20)
    theirs, trainer = losses(small(tmp_path, "training.autograd=true", backend="cpp"), 20)
    assert trainer.gradients.how == "by autograd"
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-5


def test_why_autograd_serves_is_said_once(tmp_path):
    class Noting(Display):
        def __init__(self):
            self.notes = []

        def note(self, message):
            self.notes.append(message)

    def notes(*assignments, backend):
        display = Noting()
        Trainer(small(tmp_path, *assignments, backend=backend), display, None)
        return [note for note in display.notes if "autograd" in note]

    assert notes(backend="torch") == [
        "gradients by autograd: layer_norm is on torch, which leaves the backward to autograd"
    ]
    assert notes("training.precision=bfloat16", backend="cpp") == [
        "gradients by autograd: a step that is written out computes in float32"
    ]
    assert notes(backend="cpp") == notes("training.autograd=true", backend="cpp") == []


def test_five_steps_with_nothing_but_triton_equal_the_reference(tmp_path, monkeypatch):
    from tinygpt_kernels.triton_ops import layer_norm as module

    launched = []
    for name in ("_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel"):
        kernel = getattr(module, name)

        class Counting:
            def __getitem__(self, grid, kernel=kernel, name=name):
                launched.append(name)
                return kernel[grid]

        monkeypatch.setattr(module, name, Counting())
    ours, trainer = losses(small(tmp_path, "strict=true", backend="triton"), 5)
    reference, plain = losses(small(tmp_path, backend="reference"), 5)
    assert max(abs(a - b) for a, b in zip(ours, reference, strict=True)) < 1e-4
    for (name, mine), theirs in zip(trainer.model.named_parameters(), plain.model.parameters(), strict=True):
        assert (mine - theirs).abs().max() < 1e-4, name
    assert set(trainer.kernels.served().values()) == {("triton",)}
    # five norms a pass, five steps, and the trial before them
    assert launched.count("_layer_norm_fwd_kernel") == launched.count("_layer_norm_bwd_kernel") == 5 * 6


def test_dropout_trains_on_a_strict_backend(tmp_path):
    found, trainer = losses(small(tmp_path, "strict=true", "model.dropout=0.2", backend="triton"), 2)
    again, _ = losses(small(tmp_path, "strict=true", "model.dropout=0.2", backend="triton"), 2)
    assert found == again
    assert trainer.kernels.served()["attention_qkv"] == ("triton",)


def test_accumulated_microbatches_make_the_gradient_of_their_mean(tmp_path):
    accumulated = Trainer(small(tmp_path, "training.accumulate=3"), Display(), None)
    loss, norm = accumulated.train_step(0.0)
    from tinygpt.data.batches import random_batch

    one = Trainer(small(tmp_path), Display(), None)
    batches = [random_batch(one.corpus.train, 4, 16, seed=1337, step=0, micro=m) for m in range(3)]
    whole = one.model(*(torch.cat(part) for part in zip(*batches, strict=True)))
    whole.backward()
    torch.testing.assert_close(loss, whole.detach())
    squares = sum(p.grad.square().sum() for p in one.model.parameters())
    torch.testing.assert_close(norm, squares.sqrt(), rtol=1e-4, atol=1e-6)


def test_evaluation_counts_every_token_but_the_first_once(tmp_path):
    trainer = Trainer(small(tmp_path), Display(), None)
    found = evaluate(trainer.model, trainer.corpus, torch.device("cpu"), batch_size=7)
    tokens = torch.from_numpy(trainer.corpus.validation.astype("int64"))
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, 16):
        x, y = tokens[start : start + 16], tokens[start + 1 : start + 17]
        x = x[: len(y)]
        total += trainer.model(x[None], y[None]).item() * len(y)
        count += len(y)
    assert found.tokens == count == len(tokens) - 1
    assert found.loss == pytest.approx(total / count, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_char == pytest.approx(found.loss / math.log(2))
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2))


def test_evaluating_more_often_changes_no_weight(tmp_path):
    config = small(tmp_path, "model.dropout=0.2")
    train(override(config, ["training.eval_every=5"]), tmp_path / "a")
    train(
        override(config, ["training.eval_every=1", "training.sample_every=3", "training.log_every=7"]), tmp_path / "b"
    )
    one, other = (Run.open(tmp_path / name).load_weights() for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_mixed_precision_and_compile_train_too(tmp_path):
    for assignment in ("training.precision=bfloat16", "training.compile=true"):
        result = train(small(tmp_path, assignment), tmp_path / assignment)
        assert result.evaluation.loss < 3.2


def test_loss_scale_backs_off_and_recovers():
    scale = LossScale(True)
    assert not scale.accepts(torch.tensor(float("inf")))
    assert scale.scale == 2.0**15
    for _ in range(2000):
        assert scale.accepts(torch.tensor(1.0))
    assert scale.scale == 2.0**16
    gradient = torch.full((2,), 2.0**16)
    scale.unscale([gradient, None])
    assert gradient.tolist() == [1.0, 1.0]
    assert LossScale(False).accepts(torch.tensor(float("nan")))


def test_devices_that_are_not_here_are_refused_with_the_remedy():
    for name, message in (("gpu", "unknown device 'gpu'"), ("meta", "not supported"), ("mps", "no Apple GPU")):
        with pytest.raises(UserError, match=message):
            pick_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda: there is no usable NVIDIA or AMD GPU"):
            pick_device("cuda")
        assert pick_device(None).type == "cpu"
    assert pick_precision("auto", torch.device("cpu")) == torch.float32


def test_a_text_shorter_than_a_block_says_what_would_fit(tmp_path):
    (tmp_path / "short.txt").write_text("to be or not to be, that is the question\n")
    with pytest.raises(UserError, match=r"model.block_size"):
        train(small(tmp_path, f"data.sources={tmp_path / 'short.txt'}", "model.block_size=64"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_backend_that_cannot_serve_stops_before_anything_is_written(tmp_path):
    from tinygpt_kernels import BackendError

    with pytest.raises(BackendError, match="cuda"):
        train(override(small(tmp_path, backend="cuda"), ["strict=true"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_strict_binding_serves_only_what_was_asked():
    model = GPT(small.__globals__["preset"]("char-cpu").model, 65, bind("reference", strict=True))
    model(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))
    assert set(model.kernels.served().values()) == {("reference",)}


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard", reason="extra `log` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(small(tmp_path, "training.tensorboard=true"), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    logged = {m["step"]: m["loss"] for m in Run.open(tmp_path / "run").metrics() if "loss" in m}
    assert {e.step: pytest.approx(e.value) for e in events.Scalars("loss")} == logged


def test_without_tensorboard_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'tinygpt\[log\]'"):
        train(small(tmp_path, "training.tensorboard=true"), tmp_path / "run")
