"""Timing: who is wrong is not timed, who is not clearly faster is not called faster, and turns are taken."""

import pytest
import torch
import torch.nn.functional as F

from tinygpt_kernels import dispatch, measure, ops, saved, timing
from tinygpt_kernels.measure import BOTH, FORWARD, KERNELS
from tinygpt_kernels.workloads import default_workloads, workload

SMALL = workload("layer_norm", "R=9,C=8")


@pytest.fixture
def clock(monkeypatch):
    """Seconds by name of candidate, in place of any clock."""

    def set_to(**seconds):
        def interleaved(candidates, **options):
            for run in candidates.values():
                run()
            times = {name: seconds.get(name.partition("/")[2] or "copy", 1.0) for name in candidates}
            return {name: list(t) if isinstance(t, tuple) else [t] * 8 for name, t in times.items()}

        monkeypatch.setattr(timing, "interleaved", interleaved)

    return set_to


def norm(x, weight, bias=None, eps=1e-5):
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def test_a_function_that_is_wrong_is_not_timed(clock):
    clock()

    def off(x, weight, bias=None, eps=1e-5):
        return norm(x, weight, bias, eps) * 1.001

    found = measure.measure(SMALL, ["torch"], others={"off": off, "right": norm})
    assert list(found.wrong) == ["off"]
    assert "output 0" in found.wrong["off"]
    assert "allowed" in found.wrong["off"]
    assert {name for times in found.seconds.values() for name in times} == {"torch", "right"}


def test_who_cannot_serve_is_refused_with_the_reason(clock):
    clock()
    found = measure.measure(SMALL, ["cuda", "torch"])
    assert list(found.refused) == ["cuda"]
    assert found.refused["cuda"]


def test_rates_ratios_and_ceilings_are_those_of_the_times(clock):
    clock(torch=2e-6, cpp=1e-6, copy=5e-7)
    found = measure.measure(SMALL, ["torch", "cpp"])
    moved = 4 * 2 * 9 * 8
    assert found.rate(FORWARD, "cpp") == pytest.approx(moved / 1e-6)
    assert found.ceiling(FORWARD) == pytest.approx(moved / 5e-7)
    assert found.rate(BOTH, "torch") == pytest.approx(2.5 * moved / 2e-6)
    assert found.ratio(BOTH, "cpp") == 2.0
    assert found.winner(BOTH) == "cpp"


@pytest.mark.parametrize(
    ("cpp", "winner"),
    [
        ((1.0,) * 8, "cpp"),
        ((1.99,) * 8, "torch"),  # within the tie
        ((1.0,) * 5 + (3.0,) * 3, "torch"),  # faster in the median, slower in more than a quarter of the rounds
        ((1.0,) * 7 + (3.0,), "cpp"),
    ],
)
def test_only_who_is_clearly_faster_than_torch_wins(clock, cpp, winner):
    clock(torch=2.0, cpp=cpp)
    assert measure.measure(SMALL, ["torch", "cpp"]).winner(BOTH) == winner


def test_reference_never_wins(clock):
    clock(torch=2.0, reference=1.0)
    found = measure.measure(SMALL, ["torch", "reference"])
    assert found.winner(BOTH) == "torch"
    assert [entry.order for entry in found.findings()] == [(), ()]


def test_of_calls_with_gradients_the_kernels_alone_decide(monkeypatch):
    def interleaved(candidates, **options):
        seconds = {f"{BOTH}/cpp": 3.0, f"{KERNELS}/cpp": 1.0}
        return {name: [seconds.get(name, 2.0)] * 8 for name in candidates}

    monkeypatch.setattr(timing, "interleaved", interleaved)
    found = measure.measure(SMALL, ["torch", "cpp"])
    assert (found.winner(FORWARD), found.winner(BOTH), found.winner(KERNELS)) == ("torch", "torch", "cpp")
    assert found.ratio(KERNELS, "cpp") == 2.0
    assert [(entry.grad, entry.order) for entry in found.findings()] == [(False, ()), (True, ("cpp",))]


@pytest.mark.parametrize("op", ["layer_norm", "add_layer_norm", "gelu", "embedding"])
def test_kernels_alone_compute_what_the_op_does(op):
    small = {
        "layer_norm": "R=9,C=8,bias=1",
        "add_layer_norm": "R=9,C=8",
        "gelu": "R=9,C=8,bias=1",
        "embedding": "B=2,T=3,V=7,C=8",
    }
    found = workload(op, small[op])
    run = measure.kernels(found, "cpp", torch.float32, "cpu")
    cells = dict(zip(run.__code__.co_freevars, (cell.cell_contents for cell in run.__closure__), strict=True))
    for tensor in (*cells["results"], *(g for g in cells["gradients"] if g is not None)):
        tensor.fill_(float("nan"))
    run()
    args, kwargs = measure.unseeded(found, torch.float32, "cpu")
    op = dispatch.all_ops()[op]
    flat = [
        t.requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for t in op.flatten(*args, **kwargs)
    ]
    outputs = op.on("torch")(**dict(zip(op.order, flat, strict=True)))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [t for t in flat if isinstance(t, torch.Tensor) and t.requires_grad]
    expected = torch.autograd.grad(outputs, leaves, cells["upstream"])
    for ours, theirs in zip(cells["results"], outputs):  # noqa: B905  results hold what is saved, too
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip((g for g in cells["gradients"] if g is not None), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_findings_speak_of_the_call_a_model_makes(clock):
    clock(torch=3.0, cpp=2.0)
    found = measure.measure(SMALL, ["torch", "cpp"])
    x = torch.zeros(9, 8)
    for grad, entry in zip((False, True), found.findings(), strict=True):
        assert entry == saved.entry(ops.layer_norm.call(x, torch.ones(8), grad=grad), ("cpp",), 1.5)


def test_dropout_is_timed_without_a_seed_and_gated_with_one(clock):
    clock()
    found = measure.measure(workload("attention", "B=1,H=1,T=5,D=8,dropout=0.5"), ["torch", "reference"])
    assert not found.wrong
    assert set(found.seconds[BOTH]) == {"torch", "reference"}
    assert found.call(BOTH).features == ("causal", "dropout")


@pytest.mark.parametrize("op", ["adamw_", "linear_cross_entropy", "embedding", "decode_attention", "add_layer_norm"])
def test_every_kind_of_op_can_be_timed(clock, op):
    clock()
    found = measure.measure(default_workloads(op)[0], ["torch"])
    assert not found.wrong
    assert set(found.seconds) == ({FORWARD} if op in ("adamw_", "decode_attention") else {FORWARD, BOTH})


def test_candidates_take_turns_and_every_other_round_runs_backwards():
    seen = []
    times = timing.interleaved({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, rounds=4, seconds=0.0)
    assert {name: len(found) for name, found in times.items()} == {"a": 4, "b": 4}
    assert "".join(seen)[8:] == "abbaabba"


def test_a_budget_cuts_rounds_but_leaves_enough_for_a_median():
    times = timing.interleaved({"": lambda: sum(range(10_000))}, rounds=1000, seconds=0.001, budget=0.001)
    assert len(times[""]) == 7


def test_medians_ratios_and_spreads():
    assert timing.ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == 2.0
    assert timing.spread([1.0] * 8) == 0.0
    assert timing.spread([0.9, 0.9, 1.0, 1.0, 1.1, 1.1]) == pytest.approx(0.1)
    assert timing.geometric_mean([4.0, 0.25]) == pytest.approx(1.0)


def test_one_thread_is_never_called_busy():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert timing.busy() is None
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
