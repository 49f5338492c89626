"""Sampling: what temperature, top-k and a seed promise."""

import pytest
import torch

from tinygpt.config import ModelConfig
from tinygpt.errors import UserError
from tinygpt.generation import generate, next_token, sample, start
from tinygpt.models.gpt import GPT
from tinygpt.tokenizers import tokenizer_class
from tinygpt_kernels import bind


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(layers=1, heads=2, width=32, block_size=8, vocab_multiple=64)
    return GPT(config, 11, bind("torch"), generator=torch.Generator().manual_seed(0))


def test_a_seed_means_the_same_text_and_another_seed_another(model):
    one, same, other = (list(generate(model, [1], count=30, seed=s)) for s in (3, 3, 4))
    assert one == same != other
    assert set(one) <= set(range(11))


def test_greedy_takes_the_largest_whatever_the_seed(model):
    greedy = list(generate(model, [1, 2], count=12, temperature=0, seed=1))
    assert (
        greedy
        == list(generate(model, [1, 2], count=12, temperature=0, seed=2))
        == list(generate(model, [1, 2], count=12, top_k=1))
    )
    context = [1, 2]
    for token in greedy:
        assert token == model.eval()(torch.tensor([context[-8:]]))[0].argmax().item()
        context.append(token)


def test_top_k_draws_from_the_k_largest_in_proportion():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([next_token(logits, 1.0, 2, generator) for _ in range(4000)])
    assert set(drawn.tolist()) == {2, 3}
    assert (drawn == 3).float().mean().item() == pytest.approx(torch.softmax(logits[2:], 0)[1].item(), abs=0.03)


def test_the_models_mode_is_restored_even_when_the_reader_stops(model):
    model.train()
    tokens = generate(model, [1], count=10, seed=0)
    next(tokens)
    tokens.close()
    assert model.training


@pytest.mark.parametrize(
    ("options", "message"), [({"temperature": -1.0}, "--temperature -1.0"), ({"top_k": 0}, "--top-k 0")]
)
def test_values_out_of_range_are_named_before_anything_is_drawn(model, options, message):
    with pytest.raises(UserError, match=message):
        generate(model, [1], count=3, **options)


def test_an_empty_or_unknown_prompt_starts_from_a_line_break():
    tokenizer = tokenizer_class("char").train(["ab\n"])
    newline = list(tokenizer.encode("\n"))
    assert start(tokenizer, "") == start(tokenizer, "€€") == newline
    assert tokenizer.decode(start(tokenizer, "a€b")) == "ab"
    assert start(tokenizer_class("char").train(["ab"]), "") == [0]


def test_streamed_pieces_make_the_text(model):
    tokenizer = tokenizer_class("char").train(["abcdefghij\n"])
    pieces = list(sample(model, tokenizer, "abc", count=20, seed=5))
    assert len(pieces) == 20
    assert "".join(pieces) == tokenizer.decode(list(generate(model, start(tokenizer, "abc"), count=20, seed=5)))
