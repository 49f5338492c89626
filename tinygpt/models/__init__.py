"""Models, all on `tinygpt_kernels` ops: what each is called, what it reads, and the settings it starts from.

The road: `bigram` and `average` look at the past without attention, `minilm` and `gpt` with it; `transformer` reads one
sequence and writes another, `encoder` reads one and names its class. One module per model, named after it; this one imports
none of them, and no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tinygpt_kernels.spec import unknown

from ..config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainingConfig, override
from ..errors import UserError

if TYPE_CHECKING:
    import torch

    from tinygpt_kernels import Kernels

    from ..checkpoint import Run
    from ._base import Model

Reads = Literal["text", "pairs", "labelled"]
"""What a model is trained on: plain text, pairs of source and target, or lines with a label."""

_BLOCKS = frozenset({"layers", "heads", "kv_heads", "width", "hidden", "block_size", "norm", "activation", "positions", "bias",
                     "dropout", "gelu", "vocab_multiple"})  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One model. Attributes:

    class_name: of its class, in the module named after the model.
    about: what it is, in one line.
    reads: its kind of data. task: the module of `training/tasks` that makes batches of it.
    extra_tokens: ids behind the tokenizer's that its task needs.
    options: the settings of `ModelConfig` it has.
    defaults: what `tinygpt train --model NAME` starts from; `gpt` has presets instead.
    """

    class_name: str
    about: str
    reads: Reads
    task: str
    options: frozenset[str]
    defaults: RunConfig
    extra_tokens: int = 0


MODELS: dict[str, Kind] = {
    "average": Kind(
        "Average",
        "the next token from the mean of the context's embeddings",
        "text",
        "stream",
        frozenset({"width", "hidden", "block_size", "dropout", "vocab_multiple"}),
        RunConfig(
            preset="average",
            model=ModelConfig(name="average", width=128, hidden=256, block_size=8, dropout=0.1),
            optim=OptimConfig(optimizer="sgd", schedule="exponential", lr=0.45, min_lr=0.02, warmup=0, weight_decay=0.0,
                              clip=None),
            training=TrainingConfig(batch_size=96, sample_before=True),
        ),
    ),
    "bigram": Kind(
        "Bigram",
        "the next token from the last one alone",
        "text",
        "counted",
        frozenset({"block_size", "vocab_multiple"}),
        RunConfig(
            preset="bigram",
            model=ModelConfig(name="bigram", block_size=64),
            optim=OptimConfig(lr=0.1, min_lr=0.001, warmup=0, weight_decay=0.0, clip=None),
            training=TrainingConfig(batch_size=32),
        ),
    ),
    "minilm": Kind(
        "MiniLM",
        "a post-norm decoder over padded lines of whitespace tokens",
        "text",
        "lines",
        _BLOCKS,
        RunConfig(
            preset="minilm",
            model=ModelConfig(name="minilm", block_size=20, norm="post", activation="relu", bias=True, dropout=0.1),
            data=DataConfig(tokenizer="whitespace"),
            training=TrainingConfig(batch_size=36, sample_tokens=60),
        ),
    ),
    "gpt": Kind("GPT", "the pre-norm decoder of GPT-2", "text", "stream", _BLOCKS, RunConfig()),
    "transformer": Kind(
        "Transformer",
        "the encoder-decoder of 'Attention Is All You Need', for pairs",
        "pairs",
        "pairs",
        _BLOCKS | {"label_smoothing"},
        RunConfig(
            preset="transformer",
            model=ModelConfig(name="transformer", layers=2, width=64, block_size=48, norm="post", activation="relu",
                              positions="sinusoidal", bias=True, label_smoothing=0.1),
            optim=OptimConfig(schedule="inverse_sqrt", lr=2e-3, min_lr=0.0, warmup=100, cooldown=0.3, beta2=0.98, eps=1e-9,
                              weight_decay=0.0),
            training=TrainingConfig(steps=1200, batch_size=64, eval_every=200, checkpoint_every=200),
        ),
        extra_tokens=2,
    ),
    "encoder": Kind(
        "Encoder",
        "attention in both directions and a classifier, for labelled lines",
        "labelled",
        "labelled",
        _BLOCKS | {"label_smoothing"},
        RunConfig(
            preset="encoder",
            model=ModelConfig(name="encoder", layers=2, width=64, block_size=64, bias=True, dropout=0.1),
            data=DataConfig(tokenizer="whitespace"),
            optim=OptimConfig(warmup=50),
            training=TrainingConfig(steps=500, batch_size=32, eval_every=100, checkpoint_every=100),
        ),
    ),
}  # fmt: skip


def kind(name: str) -> Kind:
    """The model of that name.

    Raises:
        UserError: no such model; offers the nearest name.
    """
    if name not in MODELS:
        raise UserError(unknown("model", name, MODELS))
    return MODELS[name]


def configure(base: RunConfig, assignments: Iterable[str]) -> RunConfig:
    """`config.override`, which refuses settings of `model.` that this model does not have.

    Raises:
        UserError: such a setting, or whatever `override` refuses.
    """
    assignments = list(assignments)
    config = override(base, assignments)
    options = kind(config.model.name).options
    for assignment in assignments:
        section, _, name = assignment.partition("=")[0].partition(".")
        if section == "model" and name == "name":
            raise UserError("model.name is set by --model, which brings the model's own settings with it")
        if section == "model" and name not in options:
            raise UserError(
                f"model {config.model.name!r} has no setting model.{name}; it has "
                f"{', '.join('model.' + option for option in sorted(options))}"
            )
    return config


def describe(config: ModelConfig) -> str:
    """A model's shape in a few words."""
    options = kind(config.name).options
    shape = {"layers": f"{config.layers} layers", "heads": f"{config.heads} heads", "width": f"width {config.width}",
             "block_size": f"context {config.block_size}"}  # fmt: skip
    words = [text for option, text in shape.items() if option in options]
    if "layers" not in options and "hidden" in options:
        words.insert(1, f"hidden {config.inner}")
    return ", ".join(words)


def build(
    config: ModelConfig, vocab_size: int, kernels: Kernels, *, classes: int | None = None,
    generator: torch.Generator | None = None,
) -> Model:  # fmt: skip
    """The model that `config.name` names, with initial weights.

    Args:
        vocab_size: tokens of the tokenizer, and the model's `extra_tokens`.
        classes: of a classifier; None for other models.
    """
    found = kind(config.name)
    cls: type[Any] = getattr(importlib.import_module(f".{config.name}", __name__), found.class_name)
    more = {} if classes is None else {"classes": classes}
    model: Model = cls(config, vocab_size, kernels, generator=generator, **more)
    return model


def load(run: Run, *, backend: str = "auto", strict: bool = False, device: str = "cpu") -> Model:
    """The model of a training run, in evaluation mode, with the weights of its newest checkpoint.

    Raises:
        UserError: the run is damaged, or its weights are of another model or tokenizer.
    """
    from tinygpt_kernels import bind

    labels = run.facts.get("labels")
    vocab_size = run.tokenizer.vocab_size + kind(run.config.model.name).extra_tokens
    model = build(run.config.model, vocab_size, bind(backend, strict=strict), classes=labels and len(labels))
    restore(model, run.load_weights(), run)
    return model.to(device).eval()


def restore(model: Model, weights: dict[str, torch.Tensor], run: Run) -> None:
    """Put a checkpoint's weights into a model.

    Raises:
        UserError: they are of another model, or of another vocabulary; says which.
    """
    for name in ("token", "table"):
        mine, theirs = getattr(model, name, None), weights.get(name)
        if mine is not None and theirs is not None and len(mine) != len(theirs):
            raise UserError(
                f"{run.path / 'tokenizer.json'} makes a vocabulary of {len(mine)} tokens, and the model's table holds "
                f"{len(theirs)}: it is the tokenizer of another run; put this run's own back, or train anew"
            )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise UserError(f"{run.path}: its checkpoint is of another model: {' '.join(lines[:2])}") from None
