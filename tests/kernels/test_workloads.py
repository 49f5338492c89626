"""Sizes and the work they are."""

import pytest
import torch

from tinygpt_kernels import parity, workloads
from tinygpt_kernels.dispatch import all_ops
from tinygpt_kernels.workloads import Work, default_workloads, workload


def test_every_op_has_default_sizes_that_can_be_typed_again():
    assert set(workloads.KINDS) == set(all_ops())
    for op in all_ops():
        for device in ("cpu", "cuda"):
            for found in default_workloads(op, device):
                assert workload(op, found.shape) == found
                assert found.work(4).forward > 0


@pytest.mark.parametrize("op", list(workloads.KINDS))
def test_a_workload_makes_the_call_its_sizes_say_and_passes_the_rule_itself(op):
    sizes = {"B": 2, "H": 4, "T": 5, "S": 7, "D": 8, "C": 16, "R": 6, "V": 11, "L": 1, "K": 2}
    kind = workloads.KINDS[op]
    names = [*kind.required, *(n for n in kind.optional if n in sizes)]
    found = workload(op, ",".join(f"{n}={sizes[n]}" for n in names))
    args, kwargs = found.case.build(torch.float32)
    call = all_ops()[op].call(*args, **kwargs)
    for name, size in call.dims:
        expected = sizes["B"] * sizes["T"] if (op, name) == ("embedding", "R") else sizes[name]
        if (op, name) in {("attention_qkv", "S"), ("decode_attention", "T")}:
            expected = {"S": sizes["T"], "T": 1}[name]
        assert size == expected, name
    parity.check(found.case, "torch", torch.float32)


def test_the_defaults_are_the_presets():
    assert [str(w) for w in default_workloads("attention_qkv")] == [
        "attention_qkv B=12,H=4,T=64,D=32", "attention_qkv B=8,H=6,T=256,D=64"]  # fmt: skip
    assert default_workloads("gelu", "cuda")[1].shape == "R=16384,C=1536"


def test_parameters_are_those_of_the_model():
    from tinygpt.config import ModelConfig
    from tinygpt.models.gpt import GPT

    config = ModelConfig(layers=2, width=32, heads=2, block_size=8)
    shapes = sorted(tuple(p.shape) for p in GPT(config, 11).parameters())
    assert sorted(workloads.parameter_shapes(2, 32, 11, 8)) == shapes


def test_attention_counts_only_what_is_seen():
    seen = sum(range(1, 65))
    assert workload("attention", "B=1,H=1,T=64,D=32").work(4).forward == 4 * 32 * seen
    assert workload("attention", "B=1,H=1,T=64,D=32,causal=0").work(4).forward == 4 * 32 * 64 * 64
    assert workload("attention", "B=1,H=1,T=1,S=64,D=32").work(4).forward == 4 * 32 * 64


def test_bytes_follow_the_dtype():
    assert workload("layer_norm", "R=10,C=8").work(2) == Work("B", 320, 480)
    assert workload("layer_norm", "R=10,C=8").work(4).unit == "B"


def test_options_reach_the_call():
    args, kwargs = workload("gelu", "R=2,C=3,bias=1,tanh=1").case.build()
    assert args[1].shape == (3,)
    assert kwargs == {"approximate": "tanh"}
    assert workload("attention", "B=1,H=2,T=3,D=4,dropout=0.5").case.build()[1]["dropout_p"] == 0.5
    assert "dropout=0.5" in workload("attention", "B=1,H=2,T=3,D=4,dropout=0.5").shape


def test_what_the_oracle_cannot_hold_is_cut_to_fewer_rows():
    huge = workload("cross_entropy", "R=8192,V=50304")
    assert huge.for_oracle().shape == "R=1334,V=50304"
    assert default_workloads("cross_entropy")[0].for_oracle() == default_workloads("cross_entropy")[0]


@pytest.mark.parametrize(
    ("op", "shape", "says"),
    [
        ("layer_norm", "R=8", "layer_norm needs C too; layer_norm takes R=,C= and optionally bias"),
        ("layer_norm", "8x8", "'8x8' is not of the form NAME=NUMBER"),
        ("layer_norm", "", "'' is not of the form NAME=NUMBER"),
        ("layer_norm", "r=8,C=8", "has no size 'r'; did you mean 'R'?"),
        ("layer_norm", "R=8,C=8,V=3", "has no size 'V'"),
        ("layer_norm", "R=many,C=8", "R=many is not a whole number"),
        ("layer_norm", "R=0,C=8", "R=0 is not within 1 to"),
        ("attention", "B=1,H=6,T=8,D=8,K=4", "K=4 does not divide H=6"),
        ("attention", "B=1,H=6,T=8,D=8,dropout=1", "dropout=1 is not within 0 to 0.99"),
    ],
)
def test_sizes_that_make_no_tensor_are_one_message_with_the_remedy(op, shape, says):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  matched below: the text holds what a pattern would escape
        workload(op, shape)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
