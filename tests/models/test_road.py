"""The models of the road: their mathematics against loops and PyTorch's own modules; padding that nobody sees."""

import math

import pytest
import torch
from torch import nn

from tinygpt import models
from tinygpt.config import ModelConfig, OptimConfig
from tinygpt.errors import UserError
from tinygpt.models.block import Block, sinusoids, through
from tinygpt.optim import learning_rate, make_optimizer
from tinygpt_kernels import bind

TINY = {"layers": 2, "heads": 2, "width": 16, "block_size": 12, "bias": True}
CONFIGS = {
    "average": ModelConfig(name="average", width=16, block_size=12),
    "bigram": ModelConfig(name="bigram", block_size=12),
    "minilm": ModelConfig(name="minilm", norm="post", activation="relu", **TINY),
    "gpt": ModelConfig(**TINY),
    "transformer": ModelConfig(name="transformer", norm="post", activation="relu", positions="sinusoidal", **TINY),
    "encoder": ModelConfig(name="encoder", **TINY),
}
V, L = 11, 3


def build(name, backend="torch", **changes):
    from dataclasses import replace

    config = replace(CONFIGS[name], **changes)
    generator = torch.Generator().manual_seed(1)
    classes = L if name == "encoder" else None
    model = models.build(config, V, bind(backend), classes=classes, generator=generator)
    for p in model.parameters():  # norms, biases and the bigram's table as they are after some training
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def batch(name, B=4, T=12, S=9):
    g = torch.Generator().manual_seed(5)
    x, y, source = (torch.randint(V, (B, n), generator=g) for n in (T, T, S))
    lengths = torch.tensor([S, 1, 4, 6])
    y[1, 5:] = y[2, 1:] = -100
    if name == "transformer":
        return source, lengths, x, y
    if name == "encoder":
        return source, lengths, torch.tensor([0, 2, 1, 1])
    return x, y


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("backend", ["cpp", "torch", "auto"])
def test_loss_and_every_gradient_are_the_references(name, backend):
    found = []
    for spec in ("reference", backend):
        model = build(name, spec)
        loss = model(*batch(name), None)
        loss.backward()
        found.append({"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()})
    for key, truth in found[0].items():
        torch.testing.assert_close(found[1][key], truth, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def copied(ours, theirs, attention="self_attn"):
    """Put one of our attentions' weights into PyTorch's."""
    theirs = getattr(theirs, attention)
    if hasattr(ours, "qkv"):
        theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    else:
        theirs.in_proj_weight.data = torch.cat([ours.q.weight.data, ours.kv.weight.data])
        theirs.in_proj_bias.data = torch.cat([ours.q.bias.data, ours.kv.bias.data])
    theirs.out_proj.load_state_dict(ours.proj.state_dict())


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("cross", [False, True])
def test_the_block_is_pytorchs_layer(norm, activation, cross):
    config = ModelConfig(norm=norm, activation=activation, **TINY)
    generator = torch.Generator().manual_seed(3)
    block = Block(config, bind("cpp"), causal=cross, cross=cross)
    for p in block.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator) + (p.dim() == 1)
    kind = nn.TransformerDecoderLayer if cross else nn.TransformerEncoderLayer
    plain = kind(16, 2, 64, dropout=0.0, activation=activation, batch_first=True, norm_first=norm == "pre")
    copied(block.attention, plain)
    norms = [block.attention_norm, block.feed_forward_norm]
    if cross:
        copied(block.cross_attention, plain, "multihead_attn")
        norms.insert(1, block.cross_norm)
    for i, ours in enumerate(norms, 1):
        getattr(plain, f"norm{i}").load_state_dict(ours.state_dict())
    plain.linear1.load_state_dict(block.feed_forward.up.state_dict())
    plain.linear2.load_state_dict(block.feed_forward.down.state_dict())

    x, memory = torch.randn(3, 7, 16, generator=generator), torch.randn(3, 5, 16, generator=generator)
    lengths = torch.tensor([7, 2, 5]) if not cross else torch.tensor([5, 1, 3])
    if cross:
        hidden = torch.arange(5) >= lengths[:, None]
        mask = nn.Transformer.generate_square_subsequent_mask(7)
        truth = plain(x, memory, tgt_mask=mask, memory_key_padding_mask=hidden, tgt_is_causal=True)
        found = through([block], None, x, memory=memory, memory_lengths=lengths)
        stream, branch = block(x, memory=memory, memory_lengths=lengths)
    else:
        hidden = torch.arange(7) >= lengths[:, None]
        truth = plain(x, src_key_padding_mask=hidden)
        found = through([block], None, x, lengths=lengths)
        stream, branch = block(x, lengths=lengths)
    assert (branch is None) == (norm == "post")
    total = stream if branch is None else stream + branch
    real = torch.ones(3, 7, dtype=torch.bool) if cross else ~hidden
    torch.testing.assert_close(total[real], truth[real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, stream)


def test_the_average_is_that_of_the_real_tokens_of_the_context():
    model = build("average")
    x, _ = batch("average")
    means = model.means(x)
    for b in range(4):
        for t in range(12):
            total, real = torch.zeros(16), 0
            for place in range(12):  # the window is padded up to its length; padding is not counted
                if place <= t:
                    total, real = total + model.token[x[b, place]], real + 1
            torch.testing.assert_close(means[b, t], total / real)
    torch.testing.assert_close(model.eval()(x[:, :5]), model.head(model._inner(means[:, 4])))


def test_the_bigrams_gradient_is_softmax_minus_counts():
    model = build("bigram")
    x, y = torch.tensor([[1, 1, 2]]), torch.tensor([[2, 3, 1]])
    model(x, y, None).backward()
    expected = torch.zeros(V, V)
    for a, b in zip(x[0], y[0], strict=True):
        expected[a] += torch.softmax(model.table[a], -1).detach() / 3
        expected[a, b] -= 1 / 3
    torch.testing.assert_close(model.table.grad, expected)


def test_sinusoids_are_the_papers():
    table = sinusoids(50, 16)
    for p, i in ((0, 0), (3, 0), (49, 7), (17, 3)):
        assert table[p, 2 * i].item() == pytest.approx(math.sin(p / 10000 ** (2 * i / 16)), abs=1e-6)
        assert table[p, 2 * i + 1].item() == pytest.approx(math.cos(p / 10000 ** (2 * i / 16)), abs=1e-6)
    assert "position" not in dict(build("transformer").named_parameters())


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_padding_is_seen_by_none_and_padded_ids_take_part_in_nothing(name, backend):
    model = build(name, backend).eval()
    wide = build(name, backend, vocab_multiple=16).eval()
    state = wide.state_dict()
    for key, value in model.state_dict().items():
        old = state[key]
        state[key] = torch.full(old.shape, 9.0)
        state[key][tuple(slice(n) for n in value.shape)] = value
    wide.load_state_dict(state)
    first = batch(name)
    other = tuple(part.clone() for part in first)
    if name in ("transformer", "encoder"):
        other[0][1, 1:] = 3
        other[0][2, 4:] = 8
    if name != "encoder":
        inputs = other[-2]
        inputs[1, 5:] = 7
        inputs[2, 1:] = 2
    losses = [m(*b, None) for m in (model, wide) for b in (first, other)]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-6, atol=1e-6)
    outputs = [m(*first[:-1]) for m in (model, wide)]
    assert outputs[1].shape == (4, L if name == "encoder" else V)
    torch.testing.assert_close(*outputs)
    losses[2].backward()
    table = getattr(wide, "token", getattr(wide, "table", None))
    assert table.grad[V:].abs().max() == 0


@pytest.mark.parametrize("name", ["transformer", "encoder"])
def test_label_smoothing_is_of_training_alone(name):
    plain, smooth = build(name), build(name, label_smoothing=0.2)
    data = batch(name)
    assert plain(*data, None).item() != pytest.approx(smooth(*data, None).item(), abs=1e-3)
    assert plain.eval()(*data, None).item() == smooth.eval()(*data, None).item()


def test_the_decoder_does_not_see_its_future_and_sees_the_source():
    model = build("transformer").eval()
    source, lengths, x, _ = batch("transformer")
    memory = model.encode(source, lengths)
    changed = x.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % V
    one, other = model.decode(x, memory, lengths), model.decode(changed, memory, lengths)
    torch.testing.assert_close(one[:, :7], other[:, :7], rtol=0, atol=0)
    source = source.clone()
    source[:, 0] = (source[:, 0] + 1) % V
    assert not torch.allclose(model.decode(x, model.encode(source, lengths), lengths)[:, 0], one[:, 0])


@pytest.mark.parametrize("name", models.MODELS)
def test_every_model_is_one_graph(name):
    model = build(name, "auto")
    data = batch(name)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*data, None), model(*data, None))


@pytest.mark.parametrize("name", models.MODELS)
def test_defaults_are_named_after_their_model_and_survive_json(name):
    from tinygpt.config import from_dict, to_dict

    defaults = models.MODELS[name].defaults
    assert defaults.model.name == name
    assert from_dict(to_dict(defaults)) == defaults
    assert name == "gpt" or defaults.preset == name


@pytest.mark.parametrize(
    ("name", "assignment", "message"),
    [
        ("bigram", "model.layers=2", r"model 'bigram' has no setting model.layers; it has model.block_size"),
        ("average", "model.heads=4", r"model 'average' has no setting model.heads"),
        ("gpt", "model.label_smoothing=0.1", r"model 'gpt' has no setting model.label_smoothing"),
        ("encoder", "model.name=gpt", r"model.name is set by --model"),
    ],
)
def test_settings_a_model_does_not_have_are_refused(name, assignment, message):
    with pytest.raises(UserError, match=message):
        models.configure(models.kind(name).defaults, [assignment])


def test_a_bigram_of_too_many_tokens_names_the_remedy():
    with pytest.raises(
        UserError, match="a bigram of 20,000 tokens has 400 million logits; take a tokenizer of at most"
    ):
        models.build(CONFIGS["bigram"], 20_000, bind("torch"))


def test_schedules():
    def rates(**settings):
        config = OptimConfig(lr=1.0, min_lr=0.01, warmup=0, **settings)
        return [learning_rate(config, step, 100) for step in range(101)]

    exponential = rates(schedule="exponential")
    assert exponential[0] == 1.0
    assert exponential[50] == pytest.approx(0.1)
    assert exponential[100] == pytest.approx(0.01)
    linear = rates(schedule="linear")
    assert linear[50] == pytest.approx(0.505)
    width, warmup = 64, 40
    paper = OptimConfig(schedule="inverse_sqrt", lr=(width * warmup) ** -0.5, min_lr=0.0, warmup=warmup)
    for step in (1, 20, 40, 41, 5000):  # counted from 1, as the paper's equation 3 does
        theirs = width**-0.5 * min(step**-0.5, step * warmup**-1.5)
        assert learning_rate(paper, step - 1, 100) == pytest.approx(theirs)
    cooled = [learning_rate(OptimConfig(lr=1.0, min_lr=0.1, warmup=4, schedule="inverse_sqrt", cooldown=0.5), s, 64)
              for s in range(65)]  # fmt: skip
    assert cooled[:33] == [learning_rate(OptimConfig(lr=1.0, min_lr=0.1, warmup=4, schedule="inverse_sqrt"), s, 64)
                           for s in range(33)]  # fmt: skip
    assert cooled[48] == pytest.approx((cooled[32] + 0.1) / 2)
    assert cooled[64] == pytest.approx(0.1)
    with pytest.raises(UserError, match=r"above 0 where optim.schedule=exponential"):
        OptimConfig(schedule="exponential", min_lr=0.0)


def test_sgd_goes_down_the_gradient_and_decays_matrices_alone():
    model = build("average")
    optimizer = make_optimizer(
        model.named_parameters(), OptimConfig(optimizer="sgd", weight_decay=0.5, clip=None), model.kernels
    )
    model(*batch("average"), None).backward()
    before = {n: (p.detach().clone(), p.grad.clone()) for n, p in model.named_parameters()}
    optimizer.clip()
    optimizer.step(0.1)
    for name, p in model.named_parameters():
        value, gradient = before[name]
        torch.testing.assert_close(p.detach(), value * (0.95 if p.dim() == 2 else 1.0) - 0.1 * gradient)
    with pytest.raises(ValueError, match=r"another optimizer's than optim.optimizer=sgd"):
        optimizer.load_state_dict({"step": 1, "exp_avgs": {}, "exp_avg_sqs": {}})
