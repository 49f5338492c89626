"""Choosing a backend: strictness, preference, reasons, capability data, and what a model's kernels record."""

from dataclasses import replace

import pytest
import torch

from tinygpt_kernels import BackendError, bind, dispatch, op, ops, preferences
from tinygpt_kernels.dispatch import Call, Impl

SM90 = Call("layer_norm", "cuda:0", torch.bfloat16, grad=True, dims=(("C", 768),), sm=90)


def arguments(C=16, dtype=torch.float32):
    return torch.randn(3, C, dtype=dtype), torch.ones(C, dtype=dtype), torch.zeros(C, dtype=dtype)


@pytest.fixture
def backend(monkeypatch):
    """A backend of this test's own, for layer_norm, forgotten afterwards."""
    for name in dispatch.known_backends():
        dispatch.load_backend(name)  # now: what is registered while the copies below stand is forgotten with them
    monkeypatch.setattr(dispatch, "impls", dict(dispatch.impls))
    monkeypatch.setattr(dispatch, "backends", dict(dispatch.backends))
    monkeypatch.setitem(dispatch.BUILTIN, "toy", "toy")

    def add(unavailable=None, **capabilities):
        dispatch.register_backend("toy", unavailable)
        dispatch.register(Impl("layer_norm", "toy", call=lambda x, w, b, eps: x * 0 + 42, **capabilities))
        return op.BoundOp(ops.layer_norm, ("toy", "torch")), op.BoundOp(ops.layer_norm, ("toy",))

    return add


def test_preference_takes_the_first_that_serves(backend):
    preferring, strict = backend(dims={"C": (16, 32)})
    assert preferring(*arguments(16)).unique().item() == 42
    assert preferring(*arguments(33)).abs().max() < 42
    assert list(preferring.served) == ["toy", "torch"]
    with pytest.raises(BackendError, match=r"C=33 is not within 16 to 32"):
        strict(*arguments(33))


@pytest.mark.parametrize(
    ("capabilities", "call", "why"),
    [
        ({"devices": ("cpu",)}, SM90, "runs on cpu, not cuda"),
        ({"dtypes": (torch.float32,)}, SM90, "takes float32, not bfloat16"),
        ({"min_sm": 100}, SM90, "needs compute capability 10.0; this GPU has 9.0"),
        ({"min_sm": 90}, SM90, None),
        ({"dims": {"C": frozenset({32, 64})}}, SM90, "C=768 is not one of 32, 64"),
        ({"dims": {"C": frozenset({768})}}, SM90, None),
        ({"without": {"causal": None}}, replace(SM90, features=("causal",)), "does not implement causal"),
        ({"without": {"causal": "because"}}, replace(SM90, features=("causal",)), "because"),
        (
            {"refuse": lambda call: "odd" if call.dims[0][1] % 2 else None},
            replace(SM90, dims=(("C", 7),)),
            "odd",
        ),
    ],
)
def test_capabilities_are_data_that_any_machine_can_ask(capabilities, call, why):
    assert Impl("layer_norm", "toy", call=lambda: None, **capabilities).reason(call) == why


def test_a_kernel_without_backward_serves_only_without_grad():
    impl = Impl("layer_norm", "toy", fwd=lambda: ())
    assert impl.reason(SM90) == "has no backward"
    assert impl.reason(replace(SM90, grad=False)) is None


def test_an_implementation_is_kernels_or_a_function():
    with pytest.raises(ValueError, match="either fwd"):
        Impl("layer_norm", "toy")


def test_the_error_names_the_call_each_reason_and_who_is_able(backend):
    _, strict = backend(lambda device: "the toy is broken; mend it")
    with pytest.raises(BackendError) as caught:
        strict(torch.randn(2, 8, requires_grad=True), torch.ones(8))
    lines = str(caught.value).splitlines()
    assert lines[0] == "layer_norm: backend 'toy' cannot serve this call"
    assert lines[1].split() == ["call", "cpu", "float32", "C=8", "R=2", "with", "grad"]
    assert lines[2].split(maxsplit=1) == ["toy", "the toy is broken; mend it"]
    assert lines[3].split()[0] == "able"
    assert "torch" in lines[3]
    assert lines[3].endswith("'reference' always serves")


def test_availability_is_not_asked_about_another_machine(backend):
    backend(lambda device: "not here")
    assert dispatch.reason("toy", SM90) == "not here"
    assert dispatch.reason("toy", SM90, anywhere=True) is None
    assert dispatch.choose(SM90, ("toy",), anywhere=True).backend == "toy"


def test_strict_never_falls_back_and_binding_does_so_openly():
    strict, lenient = bind("cuda", strict=True), bind("cuda")
    with pytest.raises(BackendError, match="backend 'cuda' cannot serve"):
        strict.layer_norm(*arguments())
    lenient.layer_norm(*arguments())
    assert lenient.served() == {"layer_norm": ("torch",)}


def test_kernels_bind_each_op_once_and_name_unknown_ops():
    kernels = bind("reference")
    assert kernels.gelu is kernels.gelu
    with pytest.raises(AttributeError, match="did you mean 'gelu'"):
        kernels.gelo  # noqa: B018
    with pytest.raises(ValueError, match="did you mean 'layer_norm'"):
        bind("layer_nrm=torch")
    with pytest.raises(ValueError, match="did you mean 'layer_norm'"):
        ops.gelu.on("layer_nrm=torch")


def test_auto_is_torch_where_nothing_was_measured():
    assert preferences.order(SM90) == ("torch",)
    assert preferences.order(replace(SM90, dtype=torch.float64, device="cpu")) == ("torch",)


def test_auto_is_the_measured_preference_where_there_is_one(monkeypatch):
    monkeypatch.setattr(preferences, "cpu_isa", lambda: "AVX512")
    call = replace(SM90, device="cpu", dtype=torch.float32, dims=(("C", 768), ("R", 2048)), sm=None)
    assert preferences.order(call) == ("cpp", "torch")
    assert preferences.order(replace(call, dims=(("C", 128), ("R", 768)))) == ("torch",)
    assert preferences.order(replace(call, dims=(("C", 128), ("R", 768)), dtype=torch.bfloat16)) == ("cpp", "torch")
    monkeypatch.setattr(preferences, "cpu_isa", lambda: "AVX2")
    narrow = replace(call, dims=(("C", 128), ("R", 768)))
    assert preferences.order(narrow) == ("torch",)  # under autograd; the pair by itself is faster
    assert preferences.order(replace(narrow, autograd=False)) == ("cpp", "torch")
    monkeypatch.setattr(preferences, "cpu_isa", lambda: "DEFAULT")
    assert preferences.order(call) == ("torch",)


def test_reference_serves_only_by_name():
    for rule in preferences.RULES:
        assert "reference" not in rule.order
    assert "reference" not in preferences.order(replace(SM90, device="cpu"))


def test_a_missing_package_is_a_reason_but_a_bug_is_raised(monkeypatch):
    monkeypatch.setattr(dispatch, "_absent", {})
    monkeypatch.setitem(dispatch.BUILTIN, "broken", "tests_have_no_such_module")
    with pytest.raises(ModuleNotFoundError, match="tests_have_no_such_module"):
        dispatch.load_backend("broken")

    def no_triton(name):
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(dispatch.importlib, "import_module", no_triton)
    assert "pip install triton" in dispatch.load_backend("broken")


def test_registering_an_unknown_op_is_refused():
    with pytest.raises(ValueError, match="did you mean 'layer_norm'"):
        dispatch.register(Impl("layer_norn", "toy", call=lambda: None))


def test_repeated_calls_are_not_resolved_again(backend, monkeypatch):
    preferring, _ = backend()
    preferring(*arguments())
    monkeypatch.setattr(op, "choose", lambda *a: pytest.fail("chose twice for one kind of call"))
    preferring(*arguments())


def test_the_memory_of_calls_is_bounded(backend, monkeypatch):
    monkeypatch.setattr(op, "_CACHE_LIMIT", 3)
    preferring, _ = backend()
    for C in range(1, 9):
        preferring(*arguments(C))
    assert len(preferring._runs) <= 3


@pytest.mark.parametrize(
    ("op", "args", "kwargs", "message"),
    [
        ("layer_norm", (torch.ones(2, 8), torch.ones(7)), {}, "last dimension"),
        (
            "layer_norm",
            (torch.ones(2, 8), torch.ones(8, dtype=torch.float16)),
            {},
            "must be torch.float32, as x is",
        ),
        (
            "layer_norm",
            (torch.ones(2, 8), torch.ones(8), torch.ones(8).double()),
            {},
            "bias is torch.float64; it must be",
        ),
        ("add_layer_norm", (torch.ones(2, 8), torch.ones(3, 8), torch.ones(8)), {}, "must be alike"),
        (
            "attention",
            (torch.ones(1, 4, 3, 8), torch.ones(1, 4, 2, 8), torch.ones(1, 4, 2, 8)),
            {"causal": True},
            "H a multiple of K",
        ),
        ("attention", (torch.ones(1, 4, 2, 8),) * 3, {"causal": True, "dropout_p": 1.0}, "dropout_p is 1.0"),
        (
            "attention",
            (torch.ones(1, 4, 2, 8),) * 3,
            {"causal": True, "kv_lengths": torch.ones(2)},
            r"kv_lengths must be \[B\]",
        ),
        ("attention_qkv", (torch.ones(1, 4, 5, 8), 2, 2), {}, r"2 \+ 2\*2"),
        ("gelu", (torch.ones(2), None, "fast"), {}, "'none' or 'tanh'"),
        (
            "embedding",
            (torch.ones(1, 2, dtype=torch.int64), torch.ones(5, 4), torch.ones(1, 4)),
            {},
            "position table holds 1",
        ),
        ("cross_entropy", (torch.ones(2, 5), torch.ones(3, dtype=torch.int64)), {}, r"logits \[R, V\]"),
        (
            "cross_entropy",
            (torch.ones(2, 5), torch.ones(2, dtype=torch.int64)),
            {"label_smoothing": 1.5},
            "label_smoothing is 1.5",
        ),
        ("clip_grad_norm_", ([torch.ones(2)], 0.0), {}, "above 0"),
        ("clip_grad_norm_", ([], 1.0), {}, "at least one tensor"),
    ],
)
def test_a_broken_contract_is_one_clear_message_on_every_backend(op, args, kwargs, message):
    for backend in ("auto", "reference", "torch"):
        with pytest.raises(ValueError, match=message):
            getattr(ops, op).on(backend)(*args, **kwargs)
