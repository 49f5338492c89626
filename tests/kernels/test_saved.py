"""What a user measured: kept by what it holds for, followed by `auto` where it holds and nowhere else, forgotten on request."""

import json
from dataclasses import replace

import pytest
import torch

from tinygpt_kernels import dispatch, ops, preferences, saved
from tinygpt_kernels.dispatch import Call
from tinygpt_kernels.op import BoundOp

CALL = Call("layer_norm", "cpu", torch.float32, grad=True, dims=(("C", 64), ("R", 100)))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path))
    monkeypatch.setattr(preferences, "RULES", ())
    saved.forget()
    yield
    saved.forget()


def keep(*order, call=CALL, ratio=1.5):
    saved.save("cpu", [saved.entry(call, order, ratio)])


def chosen(R=100, C=64, dtype=torch.float32, grad=True):
    x = torch.zeros(R, C, dtype=dtype)
    return BoundOp(ops.layer_norm, ("auto",)).choose(x, torch.ones(C, dtype=dtype), grad=grad).backend


def test_auto_follows_what_was_measured_here():
    assert chosen() == "torch"
    keep("cpp")
    assert chosen() == "cpp"
    x = torch.zeros(100, 64, requires_grad=True)
    bound = BoundOp(ops.layer_norm, ("auto",))
    bound(x, torch.ones(64))
    assert list(bound.served) == ["cpp"]


@pytest.mark.parametrize(
    ("call", "follows"),
    [
        ({"R": 200, "C": 64}, True),
        ({"R": 50, "C": 128}, True),
        ({"R": 201}, False),
        ({"R": 49}, False),
        ({"C": 20}, False),
        ({"R": 0}, False),
        ({"dtype": torch.bfloat16}, False),
        ({"grad": False}, False),
    ],
)
def test_a_measurement_speaks_of_its_kind_of_call_and_sizes_within_a_factor_of_two(call, follows):
    keep("cpp")
    assert chosen(**call) == ("cpp" if follows else "torch")


def test_the_nearest_of_several_measurements_decides():
    keep("cpp")
    keep(call=replace(CALL, dims=(("C", 64), ("R", 190))))
    assert chosen(R=120) == "cpp"
    assert chosen(R=160) == "torch"


def test_the_shipped_rules_hold_where_nothing_was_measured_and_yield_where_it_was(monkeypatch):
    rule = preferences.Rule(
        "layer_norm", "cpu", frozenset({preferences.cpu_isa()}), frozenset({torch.float32}), ("cpp",)
    )
    monkeypatch.setattr(preferences, "RULES", (rule,))
    assert chosen() == "cpp"
    keep()
    assert chosen() == "torch"
    assert chosen(R=1000) == "cpp"


def test_features_are_part_of_the_kind():
    call = Call("attention", "cpu", torch.float32, True, (("D", 8), ("H", 1), ("K", 1), ("T", 4), ("S", 4), ("B", 1)))
    keep("cpp", call=call)
    assert saved.nearest(call)
    assert saved.nearest(replace(call, features=("causal",))) is None


def test_what_was_measured_with_other_threads_torch_or_kernels_is_not_followed(monkeypatch):
    keep("cpp")
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert chosen() == "torch"
    finally:
        torch.set_num_threads(before)
    assert chosen() == "cpp"
    monkeypatch.setattr(saved, "_hash", lambda device: "another build")
    saved.forget()
    assert chosen() == "torch"


def test_another_machine_is_not_spoken_of():
    keep("cpp")
    assert saved.nearest(replace(CALL, device="mps")) is None
    assert saved.nearest(replace(CALL, device="meta")) is None
    if not torch.cuda.is_available():
        assert saved.nearest(replace(CALL, device="cuda:0", sm=90)) is None


def test_a_new_measurement_replaces_the_old_one_of_the_same_call_alone():
    other = replace(CALL, dims=(("C", 64), ("R", 7)))
    keep("cpp")
    keep("cpp", call=other)
    keep()
    assert {e.dims: e.order for e in saved.here("cpu")} == {CALL.dims: (), other.dims: ("cpp",)}
    assert list(saved.path().parent.iterdir()) == [saved.path()]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"x": 3}', b'{"IDENTITY": [null, 3, {}, {"op": "layer_norm"}]}'],
)
def test_a_damaged_file_is_as_good_as_none(content):
    saved.path().write_bytes(content.replace(b"IDENTITY", saved.identity("cpu").encode()))
    assert chosen() == "torch"
    keep("cpp")
    assert chosen() == "cpp"


@pytest.mark.parametrize(
    ("field", "value"),
    [("dims", [["C", "wide"]]), ("dims", 3), ("dims", [["C", -64], ["R", 100]]), ("order", None), ("grad", "yes"), ("ratio", "fast")],
)  # fmt: skip
def test_an_entry_that_is_none_is_left_out(field, value):
    keep("cpp")
    everything = json.loads(saved.path().read_text())
    everything[saved.identity("cpu")][0][field] = value
    saved.path().write_text(json.dumps(everything))
    saved.forget()
    assert chosen() == "torch"


@pytest.mark.parametrize("name", ["gone", "reference"])
def test_a_backend_that_is_gone_or_never_picked_is_passed_over(name):
    keep(name, "cpp")
    assert chosen() == "cpp"


def test_a_backend_that_can_no_longer_serve_yields_to_the_next(monkeypatch):
    keep("cpp")
    monkeypatch.setitem(dispatch.backends, "cpp", dispatch.Backend("cpp", lambda device: "broken"))
    assert chosen() == "torch"


def test_the_file_is_read_once(monkeypatch):
    keep("cpp")
    assert chosen() == "cpp"
    monkeypatch.setattr(saved, "load", lambda: pytest.fail("read again"))
    assert chosen(R=101) == "cpp"


def test_nothing_is_hashed_where_nothing_was_saved(monkeypatch):
    monkeypatch.setattr(saved, "identity", lambda device: pytest.fail("hashed the extension"))
    assert chosen() == "torch"


def test_measurements_can_be_deleted():
    assert not saved.clear()
    keep("cpp")
    assert saved.clear()
    assert chosen() == "torch"
