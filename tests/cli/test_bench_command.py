"""`tinygpt bench`: what it measures, what it keeps, what `auto` makes of it."""

import json
from dataclasses import replace

import pytest
import torch

from tinygpt_kernels import dispatch, interpreter, ops, saved, timing
from tinygpt_kernels.op import BoundOp

SHAPE = ("--op", "layer_norm", "--shape", "R=40,C=32", "--device", "cpu")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path):
    """A cache of the test's own, and a clock by which cpp takes half of torch's time."""
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "cache"))
    saved.forget()

    def interleaved(candidates, **options):
        for run in candidates.values():
            run()
        return {name: [1e-6 if name.endswith("cpp") else 2e-6] * 8 for name in candidates}

    monkeypatch.setattr(timing, "interleaved", interleaved)
    monkeypatch.setattr(timing, "busy", lambda: None)
    yield
    saved.forget()


def auto(R=40, C=32):
    x = torch.zeros(R, C, requires_grad=True)
    return BoundOp(ops.layer_norm, ("auto",)).choose(x, torch.ones(C)).backend


def test_the_table_names_winner_and_choice_and_keeps_nothing_unasked(cli):
    answer = cli("bench", *SHAPE)
    assert answer.code == 0
    assert answer.err == ""
    assert max(map(len, answer.out.splitlines())) <= 80
    assert "fastest: forward cpp; forward+backward cpp; kernels alone cpp" in answer.out.replace("\n", " ")
    assert "auto picks torch forward, torch with gradients" in answer.out
    assert "ceiling: a copy of as many bytes" in answer.out
    assert "2.00" in answer.out
    assert not saved.path().exists()
    assert auto() == "torch"


def test_save_makes_auto_follow_and_backends_show_it(cli):
    assert "kept in" in cli("bench", *SHAPE, "--save").out
    assert auto() == "cpp"
    assert auto(R=81) == "torch"
    shown = cli("backends").out
    assert "measured here: layer_norm float32 C=32 R=40 with grad: cpp x2.00" in " ".join(shown.split())
    measured = json.loads(cli("backends", "--json").out)["measured here"]["cpu"]
    assert [(e["op"], e["grad"], e["order"]) for e in measured] == [
        ("layer_norm", False, ["cpp"]), ("layer_norm", True, ["cpp"])]  # fmt: skip
    assert "layer_norm float32 C=32 R=40: cpp x2.00" in cli("bench", "--list").out
    assert len(json.loads(cli("bench", "--list", "--json").out)[saved.identity("cpu")]) == 2
    assert "deleted" in cli("bench", "--clear").out
    assert auto() == "torch"
    assert "nothing was measured yet" in cli("bench", "--list").out
    assert "nothing was measured yet" in cli("bench", "--clear").out


def test_json_holds_figures_ceilings_winner_and_choice(cli):
    answer = cli("bench", *SHAPE, "--shape", "R=8,C=16", "--dtype", "float32", "bfloat16", "--json")
    found = json.loads(answer.out)
    assert [(m["shape"], m["dtype"]) for m in found["measurements"]] == [
        (shape, dtype) for shape in ("R=40,C=32", "R=8,C=16") for dtype in ("float32", "bfloat16")]  # fmt: skip
    figures = found["measurements"][0]["passes"]["forward+backward"]
    assert figures["backends"]["cpp"]["ratio_to_torch"] == 2.0
    assert figures["backends"]["cpp"]["rate"] == pytest.approx(5 * 40 * 32 * 4 / 1e-6)
    assert (figures["winner"], figures["auto"]) == ("cpp", "torch")
    assert found["machine"]["identity"] == saved.identity("cpu")
    assert not found["saved"]


def test_a_backend_that_is_wrong_is_named_not_timed_and_not_saved(cli, monkeypatch):
    right = dispatch.impls["layer_norm", "cpp"]
    monkeypatch.setattr(dispatch, "impls", dict(dispatch.impls))
    dispatch.impls["layer_norm", "cpp"] = replace(
        right, fwd=lambda *a: tuple(2 * t for t in right.fwd(*a)), refuse=lambda call: None
    )
    monkeypatch.setattr(ops.layer_norm, "_bound", {})
    answer = cli("bench", *SHAPE, "--save")
    assert answer.code == 1
    assert "cpp is wrong and was not timed: output 0" in " ".join(answer.out.split())
    assert auto() == "torch"


def test_on_a_busy_machine_nothing_is_saved(cli, monkeypatch):
    monkeypatch.setattr(timing, "busy", lambda: "an addition takes a day")
    answer = cli("bench", *SHAPE, "--save")
    assert answer.code == 1
    assert "an addition takes a day" in answer.err
    assert "nothing was saved" in answer.err
    assert not saved.path().exists()
    assert cli("bench", *SHAPE).code == 0


def test_threads_are_those_asked_for(cli):
    before = torch.get_num_threads()
    try:
        answer = cli("bench", *SHAPE, "--threads", 3, "--save", "--json")
        assert json.loads(answer.out)["measurements"][0]["threads"] == 3
        assert "3 threads" in next(iter(saved.load()))
    finally:
        torch.set_num_threads(before)
    assert auto() == "torch"


def test_torch_is_timed_too_when_something_is_to_be_saved(cli):
    cli("bench", *SHAPE, "--backend", "cpp", "--save")
    assert auto() == "cpp"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--op layernorm", "unknown op 'layernorm'; did you mean 'layer_norm'?"),
        ("--op layer_norm --shape R=3", "--shape R=3: layer_norm needs C too; layer_norm takes R=,C="),
        ("--op layer_norm gelu attention --shape R=3,C=4", "attention has no size 'R'"),
    ],
)
def test_wrong_arguments_are_one_message_with_the_remedy(cli, arguments, says):
    answer = cli("bench", *arguments.split())
    assert says in answer.error()
    assert answer.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of a machine without a GPU")
@pytest.mark.parametrize(
    ("backend", "says"), [("triton", "its times would say nothing"), ("cuda", "backend cuda serves nothing on cpu: ")]
)
def test_a_backend_whose_times_would_say_nothing_is_refused(cli, backend, says):
    answer = cli("bench", "--op", "gelu", "--backend", backend)
    assert says in answer.err
    assert answer.code == 1


@pytest.mark.skipif(interpreter.gpu_present(), reason="speaks of a machine without a GPU")
def test_where_no_rule_speaks_backends_says_that_this_machine_can_be_measured(cli, monkeypatch):
    from tinygpt_kernels import preferences

    monkeypatch.setattr(preferences, "RULES", ())
    shown = " ".join(cli("backends").out.split())
    assert "nothing has been measured on such a device yet; `tinygpt bench --save` will measure this one" in shown
