"""The references say what the contract says: facts that no other implementation here is needed for."""

import pytest
import torch
import torch.nn.functional as F

from tinygpt_kernels import ops
from tinygpt_kernels.philox import keep_mask, philox


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers of Salmon et al.'s test vectors
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    found = philox(tuple(torch.tensor([c]) for c in counter), torch.tensor([key]))
    assert tuple(int(w) for w in found) == words


def test_the_mask_depends_on_place_alone_and_keeps_the_right_share():
    seed = torch.tensor([77])
    mask = keep_mask(seed, 0.3, (2, 3, 65, 130))
    assert torch.equal(mask[..., :17, :63], keep_mask(seed, 0.3, (2, 3, 17, 63)))
    assert abs(mask.float().mean().item() - 0.7) < 0.01
    assert not torch.equal(mask, keep_mask(torch.tensor([78]), 0.3, (2, 3, 65, 130)))


def test_causal_aligns_the_last_query_with_the_last_valid_key():
    q, k, v = torch.randn(2, 3, 1, 8), torch.randn(2, 5, 1, 8), torch.randn(2, 5, 1, 8)
    out = ops.attention.on("reference")(q, k, v, causal=True, kv_lengths=torch.tensor([5, 2]))
    # row 0: query t sees keys up to t + 2; row 1: two valid keys, so query 0 sees none
    weights = torch.softmax(q[0, 1, 0] @ k[0, :4, 0].T / 8**0.5, -1)
    torch.testing.assert_close(out[0, 1, 0], weights @ v[0, :4, 0])
    assert out[1, 0].abs().max() == 0
    torch.testing.assert_close(out[1, 1, 0], v[1, 0, 0])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_query_that_sees_nothing_gives_zero_and_no_gradient(backend):
    q, k, v = (torch.randn(1, n, 2, 8, requires_grad=True) for n in (4, 2, 2))
    out = ops.attention.on(backend)(q, k, v, causal=True)
    assert out[:, :2].abs().max() == 0
    out.square().sum().backward()
    assert q.grad[:, :2].abs().max() == 0
    for t in (q, k, v):
        assert torch.isfinite(t.grad).all()
    assert ops.attention.reference(q, k, v, causal=True)[1][0, 0, 0] == -torch.inf


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_losses_over_split_batches_add_up_exactly_with_a_denominator(backend):
    logits, targets = torch.randn(20, 9), torch.randint(9, (20,))
    targets[3:11] = -100
    loss = ops.cross_entropy.on(backend)
    whole = loss(logits, targets)
    parts = sum(loss(logits[i : i + 5], targets[i : i + 5], denominator=torch.tensor(12.0)) for i in range(0, 20, 5))
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_padding_columns_do_not_exist(backend):
    logits = torch.randn(7, 16)
    logits[:, 11:] = 1e4
    logits.requires_grad_()
    targets = torch.randint(11, (7,))
    loss = ops.cross_entropy.on(backend)(logits, targets, vocab=11, label_smoothing=0.1)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, :11], targets, label_smoothing=0.1))
    loss.backward()
    assert logits.grad[:, 11:].abs().max() == 0


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_adamw_is_pytorchs_adamw_over_many_steps(backend):
    shapes = [(5, 7), (7,), (1,)]
    mine = [torch.randn(s) for s in shapes]
    theirs = [torch.nn.Parameter(p.clone()) for p in mine]
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.3, foreach=False)
    m, v = ([torch.zeros_like(p) for p in mine] for _ in range(2))
    for step in range(1, 21):
        grads = [torch.randn(s) for s in shapes]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        ops.adamw_.on(backend)(mine, grads, m, v, step=step, lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.3)
    for p, t in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, t.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_clipping_reports_a_norm_that_is_not_finite(backend):
    grads = [torch.ones(3), torch.tensor([float("nan")])]
    assert torch.isnan(ops.clip_grad_norm_.on(backend)(grads, 1.0))
