"""`tinygpt backends` says what the dispatcher says."""

import json

import pytest
import torch

from tinygpt_kernels import dispatch, interpreter, native
from tinygpt_kernels.spec import known_backends


@pytest.fixture(scope="module")
def answers():
    """The JSON, asked once: it takes seconds."""
    import contextlib
    import io

    from tinygpt.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["backends", "--json"]) == 0
    return json.loads(out.getvalue())


def test_json_holds_every_op_and_backend(answers):
    assert set(answers) == {*dispatch.all_ops(), "auto", "measured here", "backends"}
    for op in dispatch.all_ops():
        assert tuple(answers[op]) == known_backends()
        for name, cell in answers[op].items():
            assert cell["serves"] == (cell["reason"] is None)
            if (op, name) not in dispatch.impls:
                assert cell == {"serves": False, "reason": f"has no {op}"}
        assert answers[op]["reference"]["serves"]


def test_a_backend_that_cannot_run_here_has_its_reason(answers, monkeypatch, cli):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in known_backends():
        assert answers["backends"][name] is None or answers["backends"][name].strip()
    monkeypatch.setitem(
        dispatch.backends, "cpp", dispatch.Backend("cpp", lambda device: "its compiler is broken; mend it")
    )
    now = json.loads(cli("backends", "--json").out)
    assert now["backends"]["cpp"] == "its compiler is broken; mend it"
    if device == "cpu":
        assert now["layer_norm"]["cpp"] == {"serves": False, "reason": "its compiler is broken; mend it"}


def test_what_auto_picks_is_asked_of_the_dispatcher(answers):
    for device in ("cpu", "cuda"):
        assert set(answers["auto"][device]) == set(dispatch.all_ops())
    x = torch.ones(65, 384, requires_grad=True)
    chosen = dispatch.all_ops()["layer_norm"].auto.choose(x, torch.ones(384), None)
    assert chosen.backend in answers["auto"]["cpu"]["layer_norm"]


def test_the_table_fits_80_columns_and_explains_every_mark(cli):
    answer = cli("backends")
    assert answer.code == 0
    assert answer.err == ""
    assert max(map(len, answer.out.splitlines())) <= 80
    for op in dispatch.all_ops():
        assert f"│ {op} " in answer.out
    for mark in {mark for mark in ("✓ ", "–", "✗ 1", "✓*") if mark in answer.out}:
        assert any(line.startswith(f" {mark.strip()} ") for line in answer.out.splitlines()), mark
    assert "What auto picks" in answer.out
    assert torch.backends.cpu.get_cpu_capability() in answer.out
    if native.isa():
        assert f"cpp computes with its {native.isa()} kernels" in " ".join(answer.out.split())


def test_nothing_is_decided_for_triton_and_its_reason_says_what_to_do(process):
    answer = process("-m", "tinygpt", "backends", "--json")
    assert answer.code == 0
    assert answer.err == ""
    if not interpreter.gpu_present():
        cell = json.loads(answer.out)["layer_norm"]["triton"]
        assert not cell["serves"]
        assert f"set {interpreter.VARIABLE}=1" in cell["reason"]
