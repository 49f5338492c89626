"""The smaller Triton kernels beyond the shared cases: tiles of a GPU, splits, tables of addresses, bad targets."""

import math

import pytest
import torch
import torch.nn.functional as F

from tinygpt_kernels import ops, parity
from tinygpt_kernels.cases import cases
from tinygpt_kernels.triton_ops import cross_entropy, decode, embedding, gelu, optimizer


def test_the_normal_distribution_is_right_everywhere():
    z = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([-1e30, -300.0, 300.0, 1e30, 0.0, -0.0])])
    own = ops.gelu.on("triton")(z)
    exact = F.gelu(z.double())
    inside = z.abs() < 100
    assert ((own - exact).abs()[inside] <= 6e-8 * z.abs().clamp(min=1)[inside] + 6e-8 * exact.abs()[inside]).all()
    assert own[-6:].tolist() == [0.0, 0.0, 300.0, z[-3].item(), 0.0, 0.0]
    x = z[:4801].clone().requires_grad_()
    ops.gelu.on("triton")(x).sum().backward()
    exact_x = x.detach().double().requires_grad_()
    F.gelu(exact_x).sum().backward()
    assert (x.grad - exact_x.grad).abs().max() < 4e-7


@pytest.mark.parametrize("op", ["gelu", "cross_entropy", "embedding", "linear_cross_entropy"])
def test_the_tiles_of_a_gpu_run_and_agree(op, monkeypatch):
    # In the interpreter tiles are larger; here the shipped ones.
    for module in (gelu, cross_entropy, embedding):
        monkeypatch.setattr(module, "INTERPRETING", False)
    for case in cases(op):
        if max([a.numel() for a in case.build()[0] if isinstance(a, torch.Tensor)], default=0) < 60_000:
            parity.check(case, "triton", torch.float32)
            parity.check(case, "triton", torch.bfloat16)


@pytest.mark.parametrize("target", [65, 1000, -1])
def test_a_target_that_is_no_column_makes_the_loss_nan_and_reads_nothing(target):
    logits, targets = torch.randn(5, 65), torch.tensor([1, 2, target, -100, 3])
    assert math.isnan(ops.cross_entropy.on("triton")(logits, targets))


@pytest.mark.parametrize("V", [1, 7, 8, 9, 15, 16, 17, 63, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_begin_wherever_they_like(V, dtype):
    generator = torch.Generator().manual_seed(V)
    logits = (torch.randn(11, V, generator=generator, dtype=torch.float64) * 3).to(dtype)
    targets = torch.randint(V, (11,), generator=generator)
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss, truth = ops.cross_entropy.on("triton")(ours, targets), F.cross_entropy(exact, targets)
    loss.backward()
    truth.backward()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        ours.grad.double(), exact.grad, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )


def test_the_gradient_may_take_the_place_of_the_logits():
    logits, targets = torch.randn(9, 33), torch.arange(9)
    _, lse = cross_entropy.cross_entropy_fwd(logits, targets, None, -100, 0.0, None)
    arguments = (targets, None, lse, -100, 0.0, None)
    apart, _, _ = cross_entropy.cross_entropy_bwd(torch.ones(()), logits, *arguments)
    cross_entropy.cross_entropy_bwd(torch.ones(()), logits, *arguments, out=(logits, None, None))
    assert torch.equal(logits, apart)


def test_blocks_of_logits_stay_as_small_as_the_hidden_states():
    assert cross_entropy.block_rows(16384, 768, 50304) == 256
    assert cross_entropy.block_rows(10, 64, 50304) == 10
    assert cross_entropy.block_rows(768, 128, 65) == 768
    for case in cases("linear_cross_entropy"):
        hidden, weight, targets = case.build()[0]
        whole = ops.linear_cross_entropy.on("triton")(hidden, weight, targets, **case.build()[1])
        torch.testing.assert_close(
            whole, ops.linear_cross_entropy.on("reference")(hidden, weight, targets, **case.build()[1])
        )


@pytest.mark.parametrize("pieces", [1, 2, 3, 7])
def test_a_cache_in_pieces_is_the_cache(pieces, monkeypatch):
    monkeypatch.setattr(decode, "splits", lambda device, pairs, S, BLOCK_S: pieces)
    for case in cases("decode_attention"):
        parity.check(case, "triton", torch.float32)


def test_pieces_follow_the_processors(monkeypatch):
    monkeypatch.setattr(decode, "processors", lambda device: 108)
    device = torch.device("cpu")
    assert decode.splits(device, 1, 4096, 64) == 64  # no more than tiles, and no more than 64
    assert decode.splits(device, 1, 100, 64) == 2
    assert decode.splits(device, 64, 4096, 64) == 4
    assert decode.splits(device, 10_000, 4096, 64) == 1


def optimizer_state(*shapes, dtype=torch.float32, offset=0):
    generator = torch.Generator().manual_seed(0)

    def make(shape, scale=1.0):
        flat = torch.randn(math.prod(shape) + offset, generator=generator) * scale
        return flat[offset:].view(shape).to(dtype) if offset == 0 else flat[offset:].view(shape)

    return [[make(s) for s in shapes], [make(s) for s in shapes], [make(s, 0.1) for s in shapes],
            [make(s).square() for s in shapes]]  # fmt: skip


HYPER = {"step": 3, "lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("offset", [0, 1])
def test_tensors_of_any_size_and_alignment_in_one_launch(offset, monkeypatch):
    monkeypatch.setattr(optimizer, "BLOCK", 64)  # whole blocks, tails, and many programs
    ours, truth = (optimizer_state((17, 5), (1,), (64,), (128, 3), (0,), offset=offset) for _ in range(2))
    optimizer.adamw_(*ours, *HYPER.values(), 1.0)
    ops.adamw_.on("reference")(*truth, **HYPER)
    for mine, theirs in zip(ours, truth, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_strided_and_mixed_tensors_are_updated_in_place():
    ours, truth = (optimizer_state((6, 4), (5,)) for _ in range(2))
    for state in (ours, truth):
        state[0][0] = state[0][0].t()  # a parameter that is not contiguous
        for column in state[1:]:
            column[0] = column[0].t().contiguous()
        state[0][1], state[1][1] = state[0][1].bfloat16(), state[1][1].bfloat16()
    kept = [t.data_ptr() for column in (0, 2, 3) for t in ours[column]]
    optimizer.adamw_(*ours, *HYPER.values(), 1.0)
    ops.adamw_.on("reference")(*truth, **HYPER)
    assert [t.data_ptr() for column in (0, 2, 3) for t in ours[column]] == kept
    for mine, theirs in zip(ours, truth, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_the_table_of_addresses_is_made_once(monkeypatch):
    made = []
    tensor = torch.tensor
    monkeypatch.setattr(optimizer.torch, "tensor", lambda *a, **k: made.append(1) or tensor(*a, **k))
    grads = [torch.randn(9), torch.randn(3, 3)]
    for _ in range(3):
        optimizer.clip_grad_norm_(grads, 1.0)
    assert len(made) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_returned_and_spreads(bad):
    grads = [torch.ones(3), torch.tensor([1.0, bad])]
    norm = optimizer.clip_grad_norm_(grads, 1.0)
    assert not torch.isfinite(norm)
    assert not torch.isfinite(torch.cat(grads)).all()


def test_a_rare_token_and_an_unused_one():
    table = torch.randn(5, 8, requires_grad=True)
    tokens = torch.tensor([[0, 0, 0, 3]])
    ops.embedding.on("triton")(tokens, table).sum().backward()
    assert table.grad[:, 0].tolist() == [3.0, 0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("bad", [5, -1, 1 << 40])
def test_an_index_that_is_no_row_gives_nan_and_reads_nothing(bad):
    table, position = torch.randn(5, 8), torch.randn(3, 8)
    tokens, places = torch.tensor([[1, bad, 2]]), torch.tensor([[0, bad, 2]])
    good = torch.tensor([[1, 0, 2]])
    for x in (ops.embedding.on("triton")(tokens, table), ops.embedding.on("triton")(good, table, position, places)):
        assert torch.isnan(x[0, 1]).all()
        assert torch.isfinite(x[0, [0, 2]]).all()
