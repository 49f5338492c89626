"""Greedy and beam search: against a plain loop, and against every sequence there is."""

import itertools

import pytest
import torch

from tinygpt import models
from tinygpt.config import ModelConfig
from tinygpt.decoding import search
from tinygpt_kernels import bind

V, START, END = 5, 3, 4


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(name="transformer", layers=1, heads=2, width=16, block_size=4, positions="sinusoidal", norm="post",
                         activation="relu", vocab_multiple=8)  # fmt: skip
    model = models.build(config, V, bind("torch"), generator=torch.Generator().manual_seed(2))
    model.token.data[V:] = 50.0  # padding of the table would win every softmax it took part in
    return model.eval()


@pytest.fixture(scope="module")
def sources():
    source = torch.tensor([[0, 1, 2, 4], [2, 2, 4, 0], [4, 0, 0, 0], [1, 0, 2, 4]])
    return source, torch.tensor([4, 3, 1, 4])


def log_p(model, source, lengths, target):
    """Of a target that may have ended."""
    tokens = torch.tensor([[START, *target]])
    hidden = model.decode(tokens[:, :-1], model.encode(source[None], lengths[None]), lengths[None])
    logits = model.logits(hidden)
    logits[..., START] = -torch.inf
    return torch.log_softmax(logits, -1)[0].gather(1, tokens[0, 1:, None]).sum().item()


def test_one_beam_is_the_likeliest_token_at_each_step(model, sources):
    found = search(model, *sources, start=START, end=END)
    for (target, score), source, length in zip(found, *sources, strict=True):
        expected = []
        while len(expected) < 4 and END not in expected:
            logits = model(source[None], length[None], torch.tensor([[START, *expected]]))[0]
            logits[START] = -torch.inf
            expected.append(int(logits.argmax()))
        assert target == [t for t in expected if t != END]
        assert score == pytest.approx(log_p(model, source, length, expected), abs=1e-4)


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_enough_beams_find_the_best_of_all_sequences(model, sources, penalty):
    found = search(model, *sources, start=START, end=END, beams=80, penalty=penalty)
    every = [[*body, END] for n in range(4) for body in itertools.product(range(3), repeat=n)]
    every += [list(body) for body in itertools.product(range(3), repeat=4)]
    for (target, score), source, length in zip(found, *sources, strict=True):
        ranked = [(log_p(model, source, length, s) / ((5 + len(s)) / 6) ** penalty, s) for s in every]
        best = max(ranked)[1]
        assert target == [t for t in best if t != END]
        assert score == pytest.approx(log_p(model, source, length, best), abs=1e-4)


def test_the_models_mode_is_restored(model, sources):
    model.train()
    search(model, *sources, start=START, end=END, beams=2)
    assert model.training
    model.eval()
