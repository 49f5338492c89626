"""Attention in Triton beyond the shared cases: every shipped tile runs, descriptors too, and faults do not go unnoticed."""

import importlib.util
import itertools

import pytest
import torch

from tinygpt_kernels import dispatch, ops, parity
from tinygpt_kernels.autograd import eager
from tinygpt_kernels.cases import cases
from tinygpt_kernels.op import BoundOp
from tinygpt_kernels.triton_ops import attention, attention_bwd, attention_fwd, tiles


def by_name(name, op="attention"):
    return next(case for case in cases(op) if case.name == name)


def test_the_kernels_themselves_run(monkeypatch):
    ran = []
    for module, name in ((attention_fwd, "_attention_fwd_kernel"), (attention_bwd, "_attention_bwd_dq_kernel"),
                         (attention_bwd, "_attention_bwd_dkdv_kernel")):  # fmt: skip
        kernel = getattr(module, name)
        monkeypatch.setattr(
            module, name, type("", (), {"__getitem__": lambda _, grid, k=kernel, n=name: ran.append(n) or k[grid]})()
        )
    qkv = torch.randn(1, 17, 6, 16, requires_grad=True)
    ops.attention_qkv.on("triton")(qkv, 2, 2).sum().backward()
    assert ran == ["_attention_fwd_kernel", "_attention_bwd_dq_kernel", "_attention_bwd_dkdv_kernel"]


def shipped():
    """One setting per different triple of tiles in the tables."""
    seen = {}
    for arch, itemsize, D, T, plain in itertools.product(
        (80, 90, "gfx942"), (2, 4), (16, 64, 128, 256), (64, 1024), (True, False)
    ):
        triple = tuple(tiles.shipped(k, arch, itemsize, D, T, plain) for k in tiles.KERNELS)
        seen.setdefault((triple, tiles.block_d(D)), (triple, D))
    return list(seen.values())


@pytest.mark.parametrize(("triple", "D"), shipped(), ids=lambda v: str(v) if isinstance(v, int) else " ".join(
    f"{t.BLOCK_T}x{t.BLOCK_S}{'d' * t.tma}" for t in v))  # fmt: skip
def test_every_shipped_tile_runs_and_agrees(triple, D):
    T = 1 + max(max(t.BLOCK_T, t.BLOCK_S) for t in triple) + min(t.BLOCK_T for t in triple)  # whole tiles and a tail
    generator = torch.Generator().manual_seed(D)
    qkv = torch.randn(1, T, 3, D, generator=generator, requires_grad=True)
    upstream = torch.randn(1, T, 1, D, generator=generator)
    truth = ops.attention_qkv.on("reference")(qkv, 1, 1, causal=True)
    (theirs,) = torch.autograd.grad(truth, qkv, upstream)
    with tiles.forced(dict(zip(tiles.KERNELS, triple, strict=True))):
        ours = ops.attention_qkv.on("triton")(qkv, 1, 1, causal=True)
        (mine,) = torch.autograd.grad(ours, qkv, upstream)
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)


def test_descriptors_are_used_only_where_they_can_stand():
    x = torch.zeros(2, 8, 6, 64, dtype=torch.bfloat16)
    assert tiles.describable(x, x[:, :, 2:4])
    assert not tiles.describable(x[..., 3:], x)  # not aligned
    assert not tiles.describable(torch.zeros(2, 8, 6, 80))  # padded
    assert not tiles.describable(x.expand(2, 8, 6, 64)[:, :1].expand(2, 8, 6, 64))  # a stride of 0
    assert tiles.shipped("attention_fwd", 90, 2, 64, 1024, True).tma
    assert not tiles.shipped("attention_fwd", 90, 2, 64, 1024, False).tma
    assert not tiles.shipped("attention_fwd", 80, 2, 64, 1024, True).tma


@pytest.mark.parametrize("D", [16, 32, 48, 64, 80, 96, 128, 192, 256])
def test_tiles_of_one_call_fit_each_other(D):
    for arch, itemsize, T, plain in itertools.product((80, 86, 90, 100, "gfx942"), (2, 4), (1, 64, 65), (True, False)):
        dq, dkdv = (tiles.shipped(k, arch, itemsize, D, T, plain) for k in tiles.KERNELS[1:])
        assert dq.BLOCK_T % dkdv.BLOCK_T == 0  # dkdv reads what dq wrote, in whole tiles


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 200), (17, 64), (63, 63), (64, 17), (65, 129), (129, 65), (200, 200)])
def test_lengths_around_the_tiles(T, S, causal):
    generator = torch.Generator().manual_seed(T * S)
    q, k, v = (torch.randn(2, n, h, 32, generator=generator, requires_grad=True) for n, h in ((T, 2), (S, 1), (S, 1)))
    lengths = torch.tensor([S, S // 2])
    upstream = torch.randn(2, T, 2, 32, generator=generator)
    ours, truth = (ops.attention.on(b)(q, k, v, causal=causal, kv_lengths=lengths) for b in ("triton", "reference"))
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(*(torch.autograd.grad(y, (q, k, v), upstream) for y in (ours, truth)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)


def test_nothing_is_read_beyond_a_rows_length():
    q, k, v = torch.randn(2, 9, 1, 32), torch.randn(2, 70, 1, 32), torch.randn(2, 70, 1, 32)
    lengths = torch.tensor([40, 66])
    clean = ops.attention.on("triton")(q, k, v, causal=False, kv_lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        k[b, n:], v[b, n:] = float("nan"), float("nan")
    assert torch.equal(ops.attention.on("triton")(q, k, v, causal=False, kv_lengths=lengths), clean)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "kv", "qk"])
def test_only_gradients_that_are_wanted_are_returned(wanted):
    tensors = {name: torch.randn(1, 33, 2, 16, requires_grad=name in wanted) for name in "qkv"}
    ours, truth = (ops.attention.on(b)(**tensors, causal=True) for b in ("triton", "reference"))
    leaves = [tensors[name] for name in wanted]
    for mine, theirs in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (ours, truth)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_buffers_are_filled_whole():
    qkv = torch.randn(2, 33, 4, 32)
    nan = float("nan")
    out = torch.full((2, 33, 2, 32), nan), torch.full((2, 2, 33), nan)
    y, lse = attention.attention_qkv_fwd(qkv, None, None, 2, 1, True, None, 0.0, out=out)
    assert y is out[0]
    assert lse is out[1]
    packed = (torch.full_like(qkv, nan), None, None)
    dqkv, *_ = attention.attention_qkv_bwd(
        torch.ones_like(y), qkv, None, None, y, lse, 2, 1, True, None, 0.0, out=packed
    )
    assert dqkv is packed[0]
    assert all(torch.isfinite(t).all() for t in (*out, dqkv))


def test_dropout_without_a_seed_follows_pytorchs_generator():
    q = torch.randn(1, 33, 2, 16)

    def run(seed):
        torch.manual_seed(seed)
        return ops.attention.on("triton")(q, q, q, causal=True, dropout_p=0.5)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


# Faults a kernel writer could make; each must turn a shared case red. (file, what stands there, the fault, the case)
FAULTS = {
    "causal mask off by one": ("fwd", "<= place[:, None]", "< place[:, None]", "causal 17"),
    "no causal mask": ("fwd", "if CAUSAL:\n                visible", "if False:\n                visible", "causal 17"),
    "missing rescale of the sum": ("fwd", "acc * rescale[:, None]", "acc", "full 17x300"),
    "missing rescale of the total": ("fwd", "total = total * rescale +", "total = total +", "full 17x300"),
    "accumulated in bfloat16": (
        "fwd", "        top = new\n", "        top = new\n        acc = acc.to(tl.bfloat16).to(tl.float32)\n", "full 17x300"),
    "swapped strides": ("fwd", "*q.stride()[:3], *k", "*q.stride()[1::-1], q.stride(2), *k", "causal 17"),
    "a length too long by one": ("fwd", "b).to(tl.int32), S)", "b).to(tl.int32) + 1, S)", "kv_lengths full"),
    "wrong key head of a group": ("fwd", "kv_head = h // GROUP", "kv_head = h % GROUP", "grouped causal 129"),
    "dropout keeps what it should drop": ("fwd", ">= threshold", "< threshold", "dropout causal 65"),
    "no delta": ("bwd", "ds = p * (dp - delta[:, None])", "ds = p * dp", "causal 17"),
    "no scale in dq": ("bwd", "dq = (dq * scale)", "dq = (dq)", "causal 17"),
    "no scale in dk": ("bwd", "dk * scale", "dk", "causal 17"),
    "backward mask off by one": ("bwd", "start + col)[:, None] <= place", "start + col)[:, None] < place", "causal 17"),
    "only the first head of a group": ("bwd", "(kv_head + 1) * GROUP)", "kv_head * GROUP + 1)", "grouped causal 129"),
    "queries skipped": ("bwd", "first - offset, 0), T)", "first - offset + BLOCK_T, 0), T)", "grouped causal 129"),
    "keys beyond the length kept": ("bwd", "tl.where((col < last)[:, None], dv, 0.0)", "dv", "kv_lengths full"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_turns_its_case_red(fault, tmp_path, monkeypatch):
    which, correct, wrong, name = FAULTS[fault]
    original = {"fwd": attention_fwd, "bwd": attention_bwd}[which]
    with open(original.__file__) as file:
        source = file.read()
    assert source.count(correct) == 1, f"{correct!r} stands {source.count(correct)} times in {original.__file__}"
    path = tmp_path / f"{which}.py"
    path.write_text(source.replace(correct, wrong))
    spec = importlib.util.spec_from_file_location(f"{original.__package__}.faulty", path)
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    forward, backward = (
        (faulty.attention_fwd, attention.attention_bwd) if which == "fwd" else (attention_fwd.attention_fwd, None)
    )
    if backward is None:
        monkeypatch.setattr(attention, "backward", faulty)
        backward = attention.attention_bwd
    op, case = dispatch.all_ops()["attention"], by_name(name)
    impl = dispatch.Impl("attention", "faulty", fwd=forward, bwd=backward)
    bound = BoundOp(op, ("faulty",))
    monkeypatch.setattr(bound, "_resolve", lambda *a: eager(op, impl, True))
    with pytest.raises(AssertionError, match="allowed"):
        parity.check(case, bound, torch.float32)


def test_offsets_need_more_than_32_bits():
    T, apart = 17, (1 << 31) + 64  # elements between the two rows of the batch; only the pages that are touched exist
    memory = torch.empty(apart + T * 3 * 32, dtype=torch.float16)
    qkv = memory.as_strided((2, T, 3, 32), (apart, 3 * 32, 32, 1))
    qkv.copy_(torch.randn(2, T, 3, 32, generator=torch.Generator().manual_seed(0)))
    ours, truth = (ops.attention_qkv.on(backend)(qkv, 1, 1) for backend in ("triton", "torch"))
    torch.testing.assert_close(ours, truth, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize(("setting", "dtype", "expected"), [
    ("ieee", torch.float32, "ieee"), ("tf32", torch.float32, "tf32"), ("tf32", torch.bfloat16, "ieee")])  # fmt: skip
def test_float32_is_multiplied_as_pytorchs_own_setting_says(setting, dtype, expected):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = setting
    try:
        assert tiles.precision(dtype) == expected
    finally:
        matmul.fp32_precision = before
