"""What figures rest on: peers compute the same thing, a step's gate notices who learns otherwise, noise is called noise."""

import re
import sys

import bench_ops
import bench_train
import bench_training_step as training
import memory
import profile_step
import pytest
import report
import torch
from peers import plain_ops

from tinygpt_kernels import measure, timing
from tinygpt_kernels.dispatch import all_ops
from tinygpt_kernels.workloads import Shape, workload

TINY = Shape(layers=1, heads=2, width=16, tokens=8, batch=2, vocab=11)
SMALL = {
    "layer_norm": "R=9,C=8", "add_layer_norm": "R=9,C=8,bias=1", "attention": "B=2,H=2,T=9,D=8", "attention_qkv": "B=2,H=2,T=9,D=8",
    "gelu": "R=9,C=8,bias=1,tanh=1", "embedding": "B=2,T=5,V=7,C=8", "cross_entropy": "R=9,V=17",
    "linear_cross_entropy": "R=9,C=8,V=17", "decode_attention": "B=2,H=2,S=9,D=8", "adamw_": "L=1,C=8,V=7,T=5",
    "clip_grad_norm_": "L=1,C=8,V=7,T=5",
}  # fmt: skip


@pytest.fixture
def still(monkeypatch):
    """No time passes: candidates run once and take what they are told to."""

    def told(**seconds):
        def interleaved(candidates, **options):
            for run in candidates.values():
                run()
            return {name: [seconds.get(name.partition("/")[2] or name, 1.0)] * 8 for name in candidates}

        monkeypatch.setattr(timing, "interleaved", interleaved)

    return told


@pytest.mark.parametrize("op", list(all_ops()))
def test_the_plain_code_of_every_op_passes_the_gate(op):
    small = workload(op, SMALL[op])
    assert measure.gate(small, plain_ops.OPS[op], torch.float32, "cpu") is None
    assert op in bench_ops.SHAPES


@pytest.mark.parametrize("op", ["layer_norm", "add_layer_norm", "attention", "attention_qkv", "gelu"])
def test_plain_pairs_do_forward_and_backward(op):
    small = workload(op, SMALL[op].replace(",bias=1", ""))
    found = plain_ops.pair(small, torch.float32)()
    first = found[0] if isinstance(found, tuple) else found
    args, _ = small.case.build()
    assert first.numel() == args[0].numel()
    assert torch.isfinite(first).all()


def test_the_table_holds_every_ratio_and_their_mean(still):
    still(plain=2.0, cpp=1.0, torch=4.0)
    bench_ops.measured.cache_clear()
    found = [bench_ops.measured(workload("layer_norm", shape)) for shape in ("R=9,C=8", "R=17,C=8")]
    bench_ops.measured.cache_clear()
    table = report.op_table(found)
    rows = {(row[1], row[2]): row[3:6] for row in table.rows}
    assert rows["cpp", "R=9,C=8"] == ("2.00", "2.00", "2.00")
    assert rows["**cpp**", "**geometric mean**"] == ("**2.00**",) * 3
    assert rows["torch", "R=17,C=8"] == ("0.50", "0.50", "0.50")
    assert "| layer_norm | cpp | R=9,C=8 | 2.00 |" in table.markdown()
    assert "**" not in table.text()


def test_everybody_learns_from_the_same_weights_to_the_same_losses():
    steps = {name: training.MAKERS[name](TINY) for name in (training.PLAIN, "tinygpt, torch", "tinygpt, cpp, autograd")}
    training.gate(steps, TINY)


def test_the_gate_notices_a_step_that_learns_otherwise():
    steps = {training.PLAIN: training.plain(TINY), "lazy": training.tinygpt(TINY, "torch")}
    step, first = steps["lazy"], []

    def lazy():
        first.append(step())
        return first[0]

    steps["lazy"] = lazy
    with pytest.raises(AssertionError, match="lazy: losses"):
        training.gate(steps, TINY)


@pytest.mark.parametrize(("rate", "attempts", "noisy"), [(1.0, 1, False), (1e15, 3, True)])
def test_a_noisy_run_is_repeated_and_called_noisy(monkeypatch, still, rate, attempts, noisy):
    still()
    monkeypatch.setitem(training.CONFIGS, "tiny", (TINY, 8))
    monkeypatch.setattr(training, "names", lambda: [training.PLAIN, "tinygpt, torch"])
    monkeypatch.setattr(timing, "matmul_rate", lambda *a: rate)
    found = training.measure("tiny")
    assert len(found.shares) == attempts
    assert found.noisy == noisy
    assert found.ratio("tinygpt, torch") == 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_attention_counts_the_scores_of_the_reference():
    scores = 4 * 2 * 2048 * 2048
    plain = memory.of_op("attention", "reference", "B=1,H=2,T=2048,D=16")
    fused = memory.of_op("attention", "torch", "B=1,H=2,T=2048,D=16")
    assert plain["temporaries"] > 2 * scores
    assert fused["temporaries"] < scores
    assert plain["results"] == fused["results"] == 4 * 4 * 2 * 2048 * 16


def test_the_profile_names_every_kernel_of_a_step_and_not_its_recording(capsys):
    profile_step.main(["--steps", "2", "--backend", "cpp"])
    table = capsys.readouterr().out
    for part in (
        "attention forward",
        "attention backward",
        "linear_gelu_fwd",
        "add_layer_norm backward",
        "adamw",
        "clip",
    ):
        assert part in table
    between = float(re.search(r"between the calls.*?([\d.]+) %", table)[1])
    assert between < 50


@pytest.mark.slow
def test_whole_runs_are_compared(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_train.py", "--steps", "30", "--turns", "1", "--data", "python"])
    bench_train.main()
    assert re.search(
        r"run [\d.]+ and -?[\d.]+ ms a step: -?[\d.]+ times faster; the step alone [\d.]+", capsys.readouterr().out
    )
