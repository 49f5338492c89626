"""`tinygpt check` finds what is wrong, and says what it looked at."""

import json
from dataclasses import replace

import pytest
import torch

from tinygpt_kernels import dispatch, interpreter
from tinygpt_kernels.cases import cases
from tinygpt_kernels.parity import FLOORS

here = pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of a machine without a GPU")


@pytest.fixture
def broken(monkeypatch):
    """layer_norm on torch, its results put through a function."""

    def replaced(change):
        right = dispatch.impls["layer_norm", "torch"]
        monkeypatch.setattr(dispatch, "impls", dict(dispatch.impls))
        monkeypatch.setitem(dispatch.BUILTIN, "wrong", "wrong")
        monkeypatch.setitem(dispatch.backends, "wrong", dispatch.Backend("wrong"))
        dispatch.impls["layer_norm", "wrong"] = replace(right, backend="wrong", call=change(right.call))
        dispatch.all_ops()["layer_norm"]._bound.pop("wrong", None)

    yield replaced
    dispatch.all_ops()["layer_norm"]._bound.pop("wrong", None)


def checked(cli, *more):
    return cli("check", "--op", "layer_norm", "--device", "cpu", *more)


def test_a_right_backend_passes_and_every_case_is_counted(cli):
    answer = checked(cli, "--backend", "torch", "--dtype", "float32")
    assert answer.code == 0
    assert f"all {len(cases('layer_norm'))} cases are right" in answer.out
    assert max(map(len, answer.out.splitlines())) <= 80


@pytest.mark.parametrize(
    "change",
    [
        lambda call: lambda *a: call(*a) * 1.0001,
        lambda call: lambda x, w, b, eps: call(x, w.detach(), b, eps) + 0 * w.sum(),  # no gradient of weight
        lambda call: lambda *a: call(*a)[..., :1],
        lambda call: lambda *a: call(*a) * float("nan"),
    ],
    ids=["off", "no gradient", "shape", "nan"],
)
def test_a_wrong_backend_fails_with_its_figures(cli, broken, change):
    broken(change)
    answer = checked(cli, "--backend", "wrong", "torch", "--dtype", "float32")
    assert answer.code == 1
    total = len(cases("layer_norm"))
    assert f"{total} ✓" in answer.out
    assert "✗ layer_norm on wrong, float32, case" in answer.out
    assert "allowed, worst element" in answer.out
    count = int(answer.out.rstrip().splitlines()[-1].split()[0])
    assert total - 3 <= count <= total  # a case without rows, or of one number, has nothing to be wrong in


def test_what_a_backend_raises_is_a_failure_of_that_case_alone(cli, broken):
    def change(call):
        def run(x, *rest):
            if x.shape[-1] == 384:
                raise IndexError("no such tile")
            return call(x, *rest)

        return run

    broken(change)
    answer = checked(cli, "--backend", "wrong", "--dtype", "float32")
    assert answer.code == 1
    assert "IndexError: no such tile" in answer.out
    assert f"1 of {len(cases('layer_norm'))} cases are wrong" in answer.out


def test_json_holds_every_tensor_with_pytorchs_error_and_the_bound(cli):
    answer = checked(cli, "--backend", "cpp", "--json")
    found = json.loads(answer.out)
    assert answer.code == 0
    assert found["ok"]
    assert found["machine"]["torch"] == torch.__version__
    assert len(found["results"]) == 3 * len(cases("layer_norm"))
    for result in found["results"]:
        floor = FLOORS[getattr(torch, result["dtype"])]
        assert {t["name"] for t in result["tensors"]} >= {"output 0", "gradient of x", "gradient of weight"}
        for tensor in result["tensors"]:
            assert tensor["allowed"] == pytest.approx(2 * tensor["torch"] + floor)
            assert tensor["error"] <= tensor["allowed"]


def test_json_of_a_wrong_backend_is_json_and_says_so(cli, broken):
    broken(lambda call: lambda *a: call(*a) * float("nan"))
    answer = checked(cli, "--backend", "wrong", "--dtype", "float32", "--json")
    found = json.loads(answer.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert answer.code == 1
    assert not found["ok"]


@here
def test_every_backend_but_interpreted_ones_is_checked_unless_named(cli):
    answer = cli("check", "--op", "clip_grad_norm_", "--dtype", "float32", "--json")
    assert {r["backend"] for r in json.loads(answer.out)["results"]} == {"reference", "torch", "cpp"}
    assert answer.err.count("\n") == 1
    assert "`--backend triton` checks them" in answer.err


@pytest.mark.skipif(interpreter.gpu_present(), reason="speaks of a machine without a GPU")
def test_triton_is_interpreted_when_it_is_named(process):
    answer = process("-m", "tinygpt", "check", "--backend", "triton", "--op", "clip_grad_norm_", "--dtype", "float32")
    assert answer.code == 0, answer.err
    assert "kernels run in Triton's interpreter" in answer.err
    assert "all 2 cases are right" in answer.out


@here
def test_a_backend_that_cannot_run_here_is_no_success(cli):
    answer = cli("check", "--backend", "cuda")
    assert "backend cuda serves nothing on cpu: " in answer.error()
    assert answer.code == 1


def test_an_op_a_backend_has_not_is_no_success(cli, broken):
    broken(lambda call: call)
    answer = cli("check", "--backend", "wrong", "--op", "gelu", "--device", "cpu")
    assert "nothing was checked: wrong refuses every case: has no gelu" in answer.error()
    assert answer.code == 1


def test_an_unknown_op_is_named(cli):
    answer = cli("check", "--op", "layernorm")
    assert "unknown op 'layernorm'; did you mean 'layer_norm'?" in answer.error()
    assert answer.code == 2
