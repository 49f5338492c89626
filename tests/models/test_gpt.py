"""The decoder: its mathematics against plain PyTorch modules, its initialisation, its edges."""

import math
import sys
from pathlib import Path

import pytest
import torch

from tinygpt.config import ModelConfig, OptimConfig
from tinygpt.models.gpt import GPT
from tinygpt.optim import AdamW, learning_rate
from tinygpt_kernels import bind

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from peers.plain_gpt import PlainGPT

SMALL = ModelConfig(layers=2, heads=2, width=32, block_size=16)


def build(config=SMALL, vocab=11, backend="torch", seed=1):
    return GPT(config, vocab, bind(backend), generator=torch.Generator().manual_seed(seed))


def batch(vocab=11, shape=(3, 16)):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(vocab, shape, generator=generator), torch.randint(vocab, shape, generator=generator)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto", "cpp"])
def test_loss_and_every_gradient_equal_plain_pytorchs(backend):
    ours, plain = build(backend=backend), PlainGPT(11, 2, 2, 32, 16)
    names = {"token": "token.weight", "position": "position.weight", "norm.weight": "norm.weight"}
    for i in range(2):
        for mine, theirs in (("attention_norm", "norm1"), ("feed_forward_norm", "norm2"), ("attention.qkv", "qkv"),
                             ("attention.proj", "proj"), ("feed_forward.up", "up"), ("feed_forward.down", "down")):  # fmt: skip
            names[f"blocks.{i}.{mine}.weight"] = f"blocks.{i}.{theirs}.weight"
    assert names.keys() == dict(ours.named_parameters()).keys()
    plain.load_state_dict(
        {names[n]: p.detach() for n, p in ours.named_parameters()} | {"head.weight": ours.token.detach()}
    )
    x, y = batch()
    losses = ours(x, y), plain(x, y)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    for loss in losses:
        loss.backward()
    theirs = dict(plain.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(
            p.grad, theirs[names[name]].grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_initial_weights_follow_gpt2():
    model = build(ModelConfig(layers=8, heads=4, width=256, block_size=64, bias=True), 1000)
    for name, p in model.named_parameters():
        if name.endswith(("proj.weight", "down.weight")):
            assert p.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05), name
        elif p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
        elif name.endswith("bias"):
            assert p.abs().max() == 0, name
        else:
            assert (p == 1).all(), name
    x, y = batch(1000, (4, 64))
    assert model(x, y).item() == pytest.approx(math.log(1000), abs=0.1)


def test_initial_weights_are_a_function_of_the_seed():
    for a, b, c in zip(build(seed=1).parameters(), build(seed=1).parameters(), build(seed=2).parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dim() < 2 or not torch.equal(a, c)


def test_the_future_is_not_seen():
    model = build().eval()
    x, _ = batch()
    changed = x.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 11
    torch.testing.assert_close(model.hidden(x)[:, :9], model.hidden(changed)[:, :9], rtol=0, atol=0)
    assert not torch.allclose(model.hidden(x)[:, 9:], model.hidden(changed)[:, 9:])


def test_padding_of_the_vocabulary_changes_nothing():
    plain = build()
    padded = build(ModelConfig(layers=2, heads=2, width=32, block_size=16, vocab_multiple=64))
    assert padded.token.shape[0] == 64
    state = {n: p.detach().clone() for n, p in plain.named_parameters()}
    state["token"] = torch.cat([state["token"], torch.full((53, 32), 9.0)])
    padded.load_state_dict(state)
    x, y = batch()
    torch.testing.assert_close(plain(x, y), padded(x, y))
    torch.testing.assert_close(plain(x), padded(x))
    padded(x, y).backward()
    assert padded.token.grad[11:].abs().max() == 0


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_share_keys_and_values(kv_heads):
    config = ModelConfig(layers=1, heads=4, kv_heads=kv_heads, width=32, block_size=16)
    model = build(config)
    assert model.blocks[0].attention.qkv.weight.shape == ((4 + 2 * kv_heads) * 8, 32)
    x, y = batch()
    torch.testing.assert_close(model(x, y), build(config, backend="reference")(x, y), rtol=1e-5, atol=1e-6)


def test_dropout_acts_in_training_only():
    model = build(ModelConfig(layers=1, heads=2, width=32, block_size=16, dropout=0.5))
    x, y = batch()
    assert model(x, y).item() != model(x, y).item()
    model.eval()
    assert model(x, y).item() == model(x, y).item()


def test_too_long_a_context_names_the_limit():
    with pytest.raises(ValueError, match="17 tokens a row; this model's context is 16"):
        build()(torch.zeros(1, 17, dtype=torch.int64))


def test_the_model_compiles_into_one_graph():
    model = build(backend="auto")
    x, y = batch()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), model(x, y))


def test_the_schedule_warms_up_and_ends_at_its_minimum():
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup=10)
    rates = [learning_rate(config, step, 100) for step in range(101)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10] == max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.55)


def test_vectors_do_not_decay_and_matrices_do():
    model = build(ModelConfig(layers=1, heads=2, width=32, block_size=16, bias=True))
    optimizer = AdamW(model.named_parameters(), OptimConfig(lr=0.1, min_lr=0.0, weight_decay=0.5), model.kernels)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.1)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.dim() == 2 else 1.0))


def test_the_optimizer_refuses_another_models_state():
    optimizer = AdamW(build().named_parameters(), OptimConfig(), bind("torch"))
    other = AdamW(
        build(ModelConfig(layers=1, heads=2, width=32, block_size=16)).named_parameters(),
        OptimConfig(),
        bind("torch"),
    )
    with pytest.raises(ValueError, match="belongs to another model"):
        optimizer.load_state_dict(other.state_dict())
