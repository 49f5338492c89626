"""The step that is written out: the same loss and the same gradients as autograd's, parameter by parameter."""

import pytest
import torch

from tinygpt.config import ModelConfig, OptimConfig
from tinygpt.models import step as module
from tinygpt.models.gpt import GPT
from tinygpt.models.step import NotServed, Step
from tinygpt.optim import AdamW
from tinygpt_kernels import bind
from tinygpt_kernels.products import Products

CONFIGS = {
    "plain": ModelConfig(layers=3, heads=2, width=32, block_size=16),
    "grouped, biased, tanh, padded": ModelConfig(
        layers=2, heads=4, kv_heads=2, width=32, block_size=17, bias=True, gelu="tanh", vocab_multiple=16
    ),
    "one layer, biased": ModelConfig(layers=1, heads=1, width=24, block_size=9, bias=True),
    "dropout": ModelConfig(layers=2, heads=2, width=32, block_size=16, dropout=0.2),
}
BACKENDS = ("reference", "cpp", "triton")


def build(config, backend, vocab=11):
    kernels = bind(backend)
    model = GPT(config, vocab, kernels, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():  # norms and biases as they are after some training, not ones and zeros
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model, AdamW(model.named_parameters(), OptimConfig(), kernels)


def batch(config, B=3, vocab=11, seed=5):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(vocab, (B, config.block_size), generator=generator) for _ in range(2))
    y[0, :3] = -100
    return x, y


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def compare(found, expected, tolerance=2e-6):
    assert found.keys() == expected.keys()
    for name, truth in expected.items():
        distance = (found[name] - truth).norm() / truth.norm()
        assert distance <= tolerance, f"{name}: {distance:.2g}"


@pytest.mark.parametrize("kept", [True, False], ids=["logits kept", "logits made twice"])
@pytest.mark.parametrize(
    ("name", "backend"),
    # Without a seed the reference draws its mask from PyTorch's generator: under autograd another mask, not another gradient.
    [(name, backend) for name in CONFIGS for backend in BACKENDS if (name, backend) != ("dropout", "reference")],
)
def test_loss_and_every_gradient_are_autograds(name, backend, kept, monkeypatch):
    if not kept:
        monkeypatch.setattr(module, "_LOGITS_KEPT", 0)
    config = CONFIGS[name]
    model, optimizer = build(config, backend)
    x, y = batch(config)
    torch.manual_seed(3)
    truth = model(x, y)
    truth.backward()
    expected = gradients(model)
    step = Step(model, optimizer, 3)
    step(*batch(config, seed=6))  # what another batch left in the buffers must not matter
    torch.manual_seed(3)
    torch.testing.assert_close(step(x, y), truth.detach(), rtol=1e-6, atol=1e-7)
    compare(gradients(model), expected)


def test_a_further_microbatch_adds():
    config = CONFIGS["plain"]
    model, optimizer = build(config, "reference")
    batches = [batch(config, seed=seed) for seed in range(3)]
    denominator = torch.tensor(100.0)
    for x, y in batches:
        model(x, y, denominator).backward()
    expected = gradients(model)
    step = Step(model, optimizer, 3)
    for i, (x, y) in enumerate(batches):
        step(x, y, denominator, add=i > 0)
    compare(gradients(model), expected)


def test_the_same_batch_gives_the_same_bits_twice():
    config = CONFIGS["plain"]
    model, optimizer = build(config, "cpp,reference")
    step = Step(model, optimizer, 3)
    found = []
    for _ in range(2):
        loss = step(*batch(config)).clone()
        found.append({"loss": loss, **gradients(model)})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_recorded_step_gives_the_bits_of_the_step_itself():
    config = CONFIGS["grouped, biased, tanh, padded"]
    model, optimizer = build(config, "cpp")
    step = Step(model, optimizer, 3)
    step(*batch(config, seed=6))
    assert step._recorded is not None
    found = []
    for replay in (True, False):
        step._recorded = step._recorded if replay else None
        step._recordable = False
        loss = step(*batch(config)).clone()
        found.append({"loss": loss, **gradients(model)})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    step(*batch(config), torch.tensor(51.0 - 3))  # with a denominator it runs as it is, to the same end
    compare(gradients(model), {name: found[0][name] for name in gradients(model)})


def test_a_step_is_recorded_only_where_all_its_kernels_are_known():
    model, optimizer = build(CONFIGS["plain"], "gelu=reference,cpp")
    step = Step(model, optimizer, 3)
    step(*batch(CONFIGS["plain"]))
    assert step._recorded is None


def test_products_with_a_fused_gelu_give_the_same_gradients(monkeypatch):
    class Fused(Products):
        fuses_gelu = True

        def linear_gelu_fwd(self, x, weight, bias, approximate, *, out):
            with torch.enable_grad():
                z = torch.nn.functional.linear(x, weight, bias).detach().requires_grad_()
                y = torch.nn.functional.gelu(z, approximate=approximate)
                (slope,) = torch.autograd.grad(y.sum(), z)
            return out[0].copy_(y.detach()), out[1].copy_(slope)

        def linear_bwd_input(self, dy, weight, slope=None, *, out):
            torch.mm(dy, weight, out=out)
            return out if slope is None else out.mul_(slope)

    config = CONFIGS["grouped, biased, tanh, padded"]
    model, optimizer = build(config, "reference")
    x, y = batch(config)
    model(x, y).backward()
    expected = gradients(model)
    step = Step(model, optimizer, 3)
    step.products = Fused()
    step(x, y)
    compare(gradients(model), expected)


def test_a_backend_that_leaves_the_backward_to_autograd_is_named():
    model, optimizer = build(CONFIGS["plain"], "torch")
    with pytest.raises(NotServed, match="layer_norm is on torch, which leaves the backward to autograd"):
        Step(model, optimizer, 3)
    model(*batch(CONFIGS["plain"])).backward()
    assert optimizer.clip() > 0  # gradients are still where autograd put them


def test_other_precisions_and_batches_are_refused():
    model, optimizer = build(CONFIGS["plain"], "reference")
    with pytest.raises(NotServed, match="float32"):
        Step(model, optimizer, 3, torch.bfloat16)
    step = Step(model, optimizer, 3)
    with pytest.raises(ValueError, match="made for 3 x 16 tokens, not"):
        step(*batch(CONFIGS["plain"], B=2))


@pytest.mark.parametrize("bias", [True, False])
def test_flat_buffers_step_as_single_tensors_do(bias):
    config = ModelConfig(layers=2, heads=2, width=24, block_size=9, bias=bias)
    updated = []
    for flat in (False, True):
        model, optimizer = build(config, "reference")
        if flat:
            optimizer.flat_gradients()
        generator = torch.Generator().manual_seed(4)
        for _ in range(3):
            optimizer.zero_grad()
            for p in model.parameters():
                gradient = torch.randn(p.shape, generator=generator)
                p.grad = gradient if p.grad is None else p.grad.copy_(gradient)
            optimizer.clip()
            optimizer.step(1e-2)
        updated.append({name: p.detach().clone() for name, p in model.named_parameters()})
        updated[-1] |= {f"moment of {n}": m.clone() for n, m in optimizer.exp_avg_sqs.items()}
    compare(updated[1], updated[0], 1e-6)


def test_an_optimizer_whose_parameters_were_moved_says_so():
    model, optimizer = build(CONFIGS["plain"], "cpp")
    step = Step(model, optimizer, 3)
    step(*batch(CONFIGS["plain"]))
    model.double().float()
    with pytest.raises(RuntimeError, match=r"'token' was moved or replaced.*make the optimizer after"):
        optimizer.step(1e-3)
