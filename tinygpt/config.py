"""Configuration: frozen dataclasses, presets, and `key=value` overrides. Imports no torch.

`None` means "not set"; every value that was derived from the machine is written into the run, not into the config.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

from tinygpt_kernels.spec import unknown

from .errors import UserError


def _require(condition: bool, key: str, value: object, rule: str) -> None:
    if not condition:
        raise UserError(f"{key}={value} must be {rule}")


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and its shape. One flat set of options; `tinygpt.models.MODELS` says which of them each model has."""

    name: str = "gpt"
    """gpt, average, bigram, minilm, transformer or encoder."""
    layers: int = 4
    """Transformer blocks; of an encoder-decoder as many in each half."""
    heads: int = 4
    """Query heads; width must be a multiple of it."""
    kv_heads: int | None = None
    """Key and value heads (Ainslie et al. 2023); None: as many as heads."""
    width: int = 128
    """Channels of an embedding, and of the residual stream."""
    hidden: int | None = None
    """Channels inside feed-forward layers; None: four times the width."""
    block_size: int = 64
    """Tokens of context; of an encoder-decoder on each side."""
    norm: Literal["pre", "post"] = "pre"
    """Where layer norm stands: before each sublayer (GPT-2), or after each addition (Vaswani et al. 2017)."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Inside feed-forward layers."""
    positions: Literal["learned", "sinusoidal"] = "learned"
    """A trained table, or the sines and cosines of Vaswani et al. 2017, section 3.5."""
    bias: bool = False
    """Biases in linear layers and norms."""
    dropout: float = 0.0
    """Dropout of attention weights, residual branches, embeddings and hidden layers."""
    gelu: Literal["none", "tanh"] = "none"
    """GELU itself, or its tanh approximation (GPT-2's)."""
    label_smoothing: float = 0.0
    """Weight of the uniform distribution among the targets of training (Szegedy et al. 2016, section 7)."""
    vocab_multiple: int = 1
    """The tables are padded to a multiple of this many rows; padding takes part in no loss and no sample."""

    def __post_init__(self) -> None:
        kv_heads = self.kv_heads or self.heads
        _require(self.layers >= 1, "model.layers", self.layers, "at least 1")
        _require(self.heads >= 1, "model.heads", self.heads, "at least 1")
        _require(self.width >= 1, "model.width", self.width, "at least 1")
        _require(self.block_size >= 1, "model.block_size", self.block_size, "at least 1")
        _require(self.vocab_multiple >= 1, "model.vocab_multiple", self.vocab_multiple, "at least 1")
        _require(0.0 <= self.dropout < 1.0, "model.dropout", self.dropout, "at least 0 and below 1")
        _require(self.hidden is None or self.hidden >= 1, "model.hidden", self.hidden, "at least 1, or none")
        smoothing = self.label_smoothing
        _require(0.0 <= smoothing < 1.0, "model.label_smoothing", smoothing, "at least 0 and below 1")
        if self.width % self.heads:
            below = self.width // self.heads * self.heads
            raise UserError(
                f"model.heads={self.heads} does not divide model.width={self.width}; set a width of "
                f"{f'{below} or ' if below else ''}{below + self.heads}, or other heads"
            )
        if kv_heads < 1 or self.heads % kv_heads:
            raise UserError(f"model.kv_heads={self.kv_heads} must divide model.heads={self.heads}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def inner(self) -> int:
        """Channels inside feed-forward layers."""
        return 4 * self.width if self.hidden is None else self.hidden


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it is cut into tokens."""

    sources: tuple[str, ...] = ()
    """Names of corpora or files; none: the model's default (of text: the plays if installed, else Python's own source)."""
    tokenizer: str = "char"
    vocab_size: int | None = None
    """Tokens at most, of a tokenizer that is trained on the text; None: the tokenizer's default."""

    def __post_init__(self) -> None:
        _require(self.vocab_size is None or self.vocab_size >= 1, "data.vocab_size", self.vocab_size, "at least 1")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, and its learning rate over time: linear warm-up, then a decay."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or plain stochastic gradient descent."""
    schedule: Literal["cosine", "linear", "exponential", "inverse_sqrt"] = "cosine"
    """The decay. inverse_sqrt: that of Vaswani et al. 2017, section 5.3, with lr its peak (theirs: (width · warmup)^-0.5)."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 1e-4
    """Learning rate at the last step; of inverse_sqrt the least one."""
    warmup: int = 100
    """Steps of linear warm-up."""
    cooldown: float = 0.0
    """Share of the steps, the last ones, in which the rate falls in a line to min_lr from what it was."""
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Decay of matrices; vectors are never decayed."""
    clip: float | None = 1.0
    """Largest 2-norm of all gradients together; None: not clipped."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optim.lr", self.lr, "above 0")
        _require(0 <= self.min_lr <= self.lr, "optim.min_lr", self.min_lr, f"between 0 and optim.lr={self.lr}")
        _require(self.warmup >= 0, "optim.warmup", self.warmup, "at least 0")
        _require(0 <= self.cooldown <= 1, "optim.cooldown", self.cooldown, "between 0 and 1")
        _require(0 <= self.beta1 < 1, "optim.beta1", self.beta1, "at least 0 and below 1")
        _require(0 <= self.beta2 < 1, "optim.beta2", self.beta2, "at least 0 and below 1")
        _require(self.clip is None or self.clip > 0, "optim.clip", self.clip, "above 0, or none")
        if self.schedule == "exponential":
            _require(self.min_lr > 0, "optim.min_lr", self.min_lr, "above 0 where optim.schedule=exponential")


@dataclass(frozen=True)
class TrainingConfig:
    """Length, batches, and what is done along the way."""

    steps: int = 2000
    """Optimizer steps."""
    batch_size: int = 12
    """Sequences per microbatch."""
    accumulate: int = 1
    """Microbatches per step."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on a GPU that has it, float16 on one that has not, float32 on a CPU."""
    compile: bool = False
    """Run the model through torch.compile."""
    autograd: bool = False
    """Let autograd make the backward, where a step could be written out over buffers allocated once."""
    eval_every: int = 250
    """Steps between evaluations."""
    eval_batches: int = 20
    """Batches of the fixed validation subset."""
    final_evaluation: bool = True
    """Measure the whole validation split at the end, and nanoGPT's estimate beside it."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept, the newest first; the best is kept beside them."""
    sample_every: int = 500
    """Steps between text samples; 0: only at the end."""
    sample_before: bool = False
    """Sample before the first step too."""
    sample_tokens: int = 200
    """Tokens per sample."""
    log_every: int = 10
    """Steps between lines of metrics."""
    tensorboard: bool = False
    """Write metrics for TensorBoard too, into the run's folder `tensorboard`."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "eval_every", "eval_batches", "checkpoint_every",
                     "keep_checkpoints", "sample_tokens", "log_every"):  # fmt: skip
            _require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "at least 1")
        _require(self.sample_every >= 0, "training.sample_every", self.sample_every, "at least 0")


@dataclass(frozen=True)
class RunConfig:
    """All that defines a run, stored whole in its directory."""

    preset: str = "char-cpu"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    backend: str = "auto"
    """Backend spec: auto, a name, a preference `cuda,triton`, or per op `attention=triton`."""
    strict: bool = False
    """Refuse to fall back to torch for an op the backend does not have."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; None: a GPU if there is one."""
    seed: int = 1337


PRESETS: dict[str, RunConfig] = {
    "char-cpu": RunConfig(),
    "char-gpu": RunConfig(
        preset="char-gpu",
        model=ModelConfig(layers=6, heads=6, width=384, block_size=256, dropout=0.2),
        training=TrainingConfig(steps=5000, batch_size=64, eval_batches=50),
    ),
    "gpt2": RunConfig(
        preset="gpt2",
        model=ModelConfig(layers=12, heads=12, width=768, block_size=1024, bias=True, gelu="tanh", vocab_multiple=64),
        optim=OptimConfig(lr=6e-4, min_lr=6e-5, warmup=2000, beta2=0.95),
        training=TrainingConfig(
            steps=600_000,
            batch_size=12,
            accumulate=40,
            eval_every=2000,
            checkpoint_every=2000,
            eval_batches=100,
            sample_every=2000,
        ),
    ),
}


def preset(name: str) -> RunConfig:
    """The preset of that name.

    Raises:
        UserError: no such preset; offers the nearest name.
    """
    if name not in PRESETS:
        raise UserError(unknown("preset", name, PRESETS))
    return PRESETS[name]


def override(config: RunConfig, assignments: Iterable[str]) -> RunConfig:
    """`config` with assignments such as `model.layers=2` or `seed=7` applied, in order, and checked once at the end.

    Raises:
        UserError: not of the form key=value, an unknown key (the nearest is offered), a value of the wrong type, or a
            combination that cannot be (heads that do not divide the width).
    """
    changes: dict[str, Any] = {}
    types_by_key = dict(_leaves(RunConfig))
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment!r} is not of the form key=value, for example model.layers=2")
        if key not in types_by_key:
            raise UserError(unknown("setting", key, types_by_key))
        changes[key] = _parse(key, text, types_by_key[key])
    sections: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for key, value in changes.items():
        section, dot, name = key.partition(".")
        if dot:
            sections.setdefault(section, {})[name] = value
        else:
            top[key] = value
    return replace(config, **top, **{s: replace(getattr(config, s), **values) for s, values in sections.items()})


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain values, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any], *, where: str = "config") -> RunConfig:
    """The inverse of `to_dict`.

    Raises:
        UserError: unknown keys, with the nearest name, or values of the wrong type; `where` names the file.
    """
    config = _build(RunConfig, values, where)
    assert isinstance(config, RunConfig)
    return config


def _build(cls: type, values: Any, where: str, prefix: str = "") -> Any:
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: {prefix.rstrip('.') or 'the whole'} must be an object of settings, not {values!r}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in fields(cls)]
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key not in names:
            raise UserError(f"{where}: {unknown('setting', prefix + key, [prefix + n for n in names])}")
        hint = hints[key]
        if isinstance(hint, type) and is_dataclass(hint):
            found[key] = _build(hint, value, where, f"{prefix}{key}.")
        else:
            found[key] = _coerce(prefix + key, value, hint, where)
    return cls(**found)


def _leaves(cls: type, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, hint in typing.get_type_hints(cls).items():
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _leaves(hint, f"{prefix}{name}.")
        elif name != "preset":
            yield prefix + name, hint


def _parse(key: str, text: str, hint: Any) -> Any:
    options, args = typing.get_origin(hint), typing.get_args(hint)
    if options in (types.UnionType, typing.Union) and type(None) in args:
        if text.lower() in ("none", ""):
            return None
        hint = next(a for a in args if a is not type(None))
    if hint is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise UserError(f"{key}={text!r} is not true or false")
        return text.lower() in ("true", "1", "yes")
    if hint in (int, float):
        try:
            return hint(text.replace("_", ""))
        except ValueError:
            raise UserError(f"{key}={text!r} is not {'a whole number' if hint is int else 'a number'}") from None
    if options is tuple:
        return tuple(part for part in text.split(",") if part)
    return _coerce(key, text, hint, "--set")


def _coerce(key: str, value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{where}: {unknown('value of ' + key, str(value), args)}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            raise UserError(f"{where}: {key} must be a list of strings, not {value!r}")
        return tuple(value)
    allowed = args if origin in (types.UnionType, typing.Union) else (hint,)
    if float in allowed and type(value) is int:
        return float(value)
    if type(value) not in allowed:
        wanted = " or ".join("null" if a is type(None) else a.__name__ for a in allowed)
        raise UserError(f"{where}: {key} must be {wanted}, not {value!r}")
    return value
