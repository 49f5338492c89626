"""A whole model on the CUDA kernels, which run on the CPU: trained by them, it is the model that the reference trains."""

import pytest
import simulation
import torch

from tinygpt.config import ModelConfig, OptimConfig
from tinygpt.models.gpt import GPT
from tinygpt.models.step import Step
from tinygpt.optim import AdamW
from tinygpt_kernels import bind
from tinygpt_kernels.dispatch import all_ops, impls

CONFIGS = {
    "plain": ModelConfig(layers=2, heads=2, width=64, block_size=24),
    "grouped, biased, tanh, padded": ModelConfig(
        layers=2, heads=4, kv_heads=2, width=128, block_size=33, bias=True, gelu="tanh", vocab_multiple=16
    ),
}
STEPS, VOCAB = 3, 65


def trained(config, backend, written_out):
    """(losses, weights) after STEPS steps; strict: no op may be served by another backend."""
    kernels = bind(backend, strict=True)
    model = GPT(config, VOCAB, kernels, generator=torch.Generator().manual_seed(1))
    optimizer = AdamW(model.named_parameters(), OptimConfig(lr=1e-3), kernels)
    step = Step(model, optimizer, 2, torch.float32) if written_out else None
    generator, losses = torch.Generator().manual_seed(2), []
    for _ in range(STEPS):
        x, y = (torch.randint(VOCAB, (2, config.block_size), generator=generator) for _ in range(2))
        if step is not None:
            loss = step(x, y)
        else:
            loss = model(x, y)
            loss.backward()
        losses.append(loss.item())
        optimizer.clip()
        optimizer.step(1e-3)
        if step is None:
            optimizer.zero_grad()
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


def ways():
    """Every configuration both ways; one of each by default."""
    for name, config in CONFIGS.items():
        for how, written_out in (("autograd", False), ("written out", True)):
            slow = written_out == (name == "plain")
            yield pytest.param(config, written_out, id=f"{name}, {how}", marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(("config", "written_out"), list(ways()))
def test_three_steps_are_the_references(simt, config, written_out):
    expected, truth = trained(config, "reference", False)
    with simulation.simulated(simt, "fast") as simulated, simulation.serving_the_cpu():
        losses, weights = trained(config, "cuda", written_out)
    assert {name.split("_fwd")[0].split("_bwd")[0] for name in simulated.launches} >= {
        "cuda_attention", "cuda_layer_norm", "cuda_gelu", "cuda_embedding", "cuda_cross_entropy", "cuda_adamw_",
        "cuda_clip_grad_norm_"}  # fmt: skip
    assert losses == pytest.approx(expected, abs=1e-4)
    assert losses[-1] != losses[0]
    for name, weight in truth.items():
        assert (weights[name] - weight).abs().max() <= 1e-4, name


def test_every_op_has_kernels():
    assert {op for op in all_ops() if (op, "cuda") not in impls} == set()
