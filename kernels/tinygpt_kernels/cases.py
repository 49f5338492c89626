"""Named inputs for every op, shared by tests, checks and benchmarks: odd sizes, strided views, every option at least once.

A case is built in float64 from its own seed and then rounded, so that every dtype, device and backend sees the same numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Draw:
    """Source of a case's tensors, at the dtype and on the device it is built for."""

    def __init__(self, name: str, dtype: torch.dtype, device: str) -> None:
        # Drawn on the CPU even for other devices: generators differ between them, cases must not.
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        self.dtype, self.device = dtype, device

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale + mean
        return x.to(dtype or self.dtype).to(self.device)

    def positive(self, *shape: int) -> Tensor:
        return self.normal(*shape).abs() + 1e-3

    def integers(self, high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)

    def tensor(self, values: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class Case:
    """One named input of an op."""

    op: str
    name: str
    make: Callable[[Draw], tuple[tuple[Any, ...], dict[str, Any]]]
    differentiable: bool = True

    def __str__(self) -> str:
        return self.name

    def build(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments of one call; the same numbers at every build."""
        return self.make(Draw(f"{self.op}/{self.name}", dtype, device))


def cases(op: str) -> tuple[Case, ...]:
    """All cases of an op, smallest first."""
    return tuple(case for case in CASES if case.op == op)


def _layer_norm(rows: tuple[int, ...], C: int, *, bias: bool = True, mean: float = 0.0, view: str = "contiguous",
                scales: torch.dtype | None = None, biases: torch.dtype | None = None) -> Callable[[Draw], Any]:  # fmt: skip
    def make(draw: Draw) -> Any:
        x = _viewed(draw, (*rows, C), view, mean)
        weight = draw.normal(C, mean=1.0, scale=0.3, dtype=scales)
        return (x, weight, draw.normal(C, dtype=biases) if bias else None), {}

    return make


def _viewed(draw: Draw, shape: tuple[int, ...], view: str, mean: float = 0.0) -> Tensor:
    *rows, C = shape
    if view == "rows apart":  # every row contiguous, with a gap between rows that is no multiple of anything
        return draw.normal(*rows, C + 5, mean=mean)[..., 2 : C + 2]
    if view == "every second":
        return draw.normal(*rows, 2 * C, mean=mean)[..., ::2]
    if view == "transposed":
        return draw.normal(*rows[:-1], C, rows[-1], mean=mean).transpose(-1, -2)
    return draw.normal(*shape, mean=mean)


def _add_layer_norm(rows: tuple[int, ...], C: int, *, bias: bool = True) -> Callable[[Draw], Any]:
    def make(draw: Draw) -> Any:
        (x, weight, b), _ = _layer_norm(rows, C, bias=bias)(draw)
        return (x, draw.normal(*rows, C), weight, b), {}

    return make


def _attention(B: int, T: int, S: int, H: int, K: int, D: int, *, causal: bool, lengths: list[int] | None = None,
               dropout_p: float = 0.0, strided: bool = False, scale: float | None = None) -> Callable[[Draw], Any]:  # fmt: skip
    def make(draw: Draw) -> Any:
        if strided:  # views of packed tensors, rows of heads apart
            q, _ = draw.normal(B, T, H + 3, D).split((H, 3), dim=2)
            k, v = draw.normal(B, S, 2 * K, D).split((K, K), dim=2)
        else:
            q, k, v = draw.normal(B, T, H, D), draw.normal(B, S, K, D), draw.normal(B, S, K, D)
        options: dict[str, Any] = {"causal": causal, "scale": scale}
        if lengths is not None:
            options["kv_lengths"] = draw.tensor(lengths)
        if dropout_p:
            options |= {"dropout_p": dropout_p, "seed": draw.tensor([0x1234_5678_9ABC])}
        return (q, k, v), options

    return make


def _attention_qkv(B: int, T: int, H: int, K: int, D: int, **options: Any) -> Callable[[Draw], Any]:
    def make(draw: Draw) -> Any:
        keywords = dict(options)
        if "kv_lengths" in keywords:
            keywords["kv_lengths"] = draw.tensor(keywords["kv_lengths"])
        if "dropout_p" in keywords:
            keywords["seed"] = draw.tensor([-5])
        return (draw.normal(B, T, H + 2 * K, D), H, K), keywords

    return make


def _losses(
    R: int, V: int, C: int | None, *, ignored: int = 0, scale: float = 3.0, view: str = "", **options: Any
) -> Callable[[Draw], Any]:
    def make(draw: Draw) -> Any:
        keywords = dict(options)
        if "denominator" in keywords:
            keywords["denominator"] = draw.tensor(keywords["denominator"], torch.float32)
        vocab = keywords.get("vocab") or V
        targets = draw.integers(vocab, R)
        if ignored:
            targets[torch.randperm(R, generator=draw.generator)[:ignored].to(targets.device)] = keywords.get(
                "ignore_index", -100
            )
        if C is None:
            return (_viewed(draw, (R, V), view) if view else draw.normal(R, V, scale=scale), targets), keywords
        return (draw.normal(R, C), draw.normal(V, C, scale=scale * C**-0.5), targets), keywords

    return make


def _embedding(
    B: int, T: int, V: int, C: int, *, position: bool = True, positions: bool = False, scale: float = 1.0
) -> Any:
    def make(draw: Draw) -> Any:
        tokens = draw.integers(V, B, T)
        tokens[:, ::2] = tokens[:, :1].clone()  # repeated tokens: their gradients must add up
        table = draw.normal(T + 3, C) if position else None
        return (tokens, draw.normal(V, C), table), {
            "positions": draw.integers(T + 3, B, T) if positions else None, "scale": scale}  # fmt: skip

    return make


def _decode(B: int, S: int, H: int, K: int, D: int, lengths: list[int]) -> Callable[[Draw], Any]:
    def make(draw: Draw) -> Any:
        return (
            draw.normal(B, H, D),
            draw.normal(B, S, K, D),
            draw.normal(B, S, K, D),
            draw.tensor(lengths),
        ), {}

    return make


def _adamw(
    shapes: list[tuple[int, ...]], *, step: int, weight_decay: float, grad_scale: float = 1.0
) -> Callable[[Draw], Any]:
    def make(draw: Draw) -> Any:
        lists = ([draw.normal(*s) for s in shapes], [draw.normal(*s) for s in shapes],
                 [draw.normal(*s, scale=0.1) for s in shapes], [draw.positive(*s) for s in shapes])  # fmt: skip
        return lists, {"step": step, "lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": weight_decay,
                       "grad_scale": grad_scale}  # fmt: skip

    return make


def _clip(shapes: list[tuple[int, ...]], max_norm: float) -> Callable[[Draw], Any]:
    return lambda draw: (([draw.normal(*s) for s in shapes], max_norm), {})


_SHAPES = [(17, 5), (1,), (129,), (64, 64)]

CASES: tuple[Case, ...] = (
    Case("layer_norm", "1x1", _layer_norm((1,), 1)),
    Case("layer_norm", "1x17", _layer_norm((1,), 17)),
    Case("layer_norm", "17x63", _layer_norm((17,), 63)),
    Case("layer_norm", "2x3x65", _layer_norm((2, 3), 65)),
    Case("layer_norm", "17x128", _layer_norm((17,), 128)),
    Case("layer_norm", "129x129 no bias", _layer_norm((129,), 129, bias=False)),
    Case(
        "layer_norm", "65x384 float32 parameters", _layer_norm((65,), 384, scales=torch.float32, biases=torch.float32)
    ),
    Case("layer_norm", "17x40 float32 weight", _layer_norm((17,), 40, scales=torch.float32)),
    Case("layer_norm", "17x40 float32 bias", _layer_norm((17,), 40, biases=torch.float32)),
    Case("layer_norm", "33x768", _layer_norm((33,), 768)),
    Case("layer_norm", "17x1023 large mean", _layer_norm((17,), 1023, mean=30.0)),
    Case("layer_norm", "17x128 rows apart", _layer_norm((17,), 128, view="rows apart")),
    Case("layer_norm", "3x17x65 every second", _layer_norm((3, 17), 65, view="every second")),
    Case("layer_norm", "3x17x64 transposed", _layer_norm((3, 17), 64, view="transposed")),
    Case("layer_norm", "5x4096", _layer_norm((5,), 4096)),
    Case("layer_norm", "9x300", _layer_norm((9,), 300)),
    Case("layer_norm", "9x1536", _layer_norm((9,), 1536)),
    Case("layer_norm", "3x16384", _layer_norm((3,), 16384)),
    Case("layer_norm", "no rows", _layer_norm((0,), 64)),
    Case("add_layer_norm", "2x3x65", _add_layer_norm((2, 3), 65)),
    Case("add_layer_norm", "33x384 no bias", _add_layer_norm((33,), 384, bias=False)),
    Case("add_layer_norm", "17x768", _add_layer_norm((17,), 768)),
    Case("attention", "causal 1x1", _attention(1, 1, 1, 1, 1, 32, causal=True)),
    Case("attention", "causal 17", _attention(2, 17, 17, 3, 3, 32, causal=True)),
    Case("attention", "full 63x65", _attention(2, 63, 65, 2, 2, 64, causal=False)),
    Case("attention", "causal 17x65", _attention(1, 17, 65, 2, 2, 32, causal=True)),
    Case("attention", "causal 65x17, rows that see nothing", _attention(1, 65, 17, 2, 2, 32, causal=True)),
    Case("attention", "grouped causal 129", _attention(1, 129, 129, 4, 2, 64, causal=True)),
    Case("attention", "kv_lengths full", _attention(3, 17, 65, 2, 1, 32, causal=False, lengths=[65, 1, 0])),
    Case("attention", "kv_lengths causal", _attention(3, 65, 65, 2, 2, 32, causal=True, lengths=[65, 63, 1])),
    Case("attention", "strided, scaled", _attention(2, 33, 33, 2, 2, 80, causal=True, strided=True, scale=0.3)),
    Case("attention", "dropout causal 65", _attention(2, 65, 65, 2, 2, 32, causal=True, dropout_p=0.2)),
    Case("attention", "full 17x300", _attention(1, 17, 300, 2, 2, 32, causal=False)),
    Case("attention", "D16 causal 63", _attention(1, 63, 63, 2, 2, 16, causal=True)),
    Case("attention", "D96 full 17x129", _attention(1, 17, 129, 2, 1, 96, causal=False)),
    Case("attention", "D128 causal 65x129", _attention(1, 65, 129, 1, 1, 128, causal=True)),
    Case("attention", "D256 causal 17", _attention(1, 17, 17, 2, 1, 256, causal=True)),
    Case("attention", "D20 negative scale", _attention(1, 33, 33, 2, 2, 20, causal=True, scale=-0.2)),
    Case("attention", "scale 0", _attention(1, 17, 17, 1, 1, 32, causal=True, scale=0.0)),
    Case(
        "attention",
        "grouped dropout with kv_lengths",
        _attention(2, 17, 33, 4, 2, 32, causal=True, dropout_p=0.5, lengths=[33, 9]),
    ),
    Case("attention", "no keys", _attention(1, 5, 0, 1, 1, 32, causal=False)),
    Case("attention", "no rows", _attention(0, 5, 5, 2, 2, 32, causal=True)),
    Case("attention_qkv", "1x1", _attention_qkv(1, 1, 2, 2, 32, causal=True)),
    Case("attention_qkv", "12x64", _attention_qkv(2, 64, 4, 4, 32, causal=True)),
    Case("attention_qkv", "129 grouped", _attention_qkv(1, 129, 4, 2, 64, causal=True)),
    Case("attention_qkv", "full 65", _attention_qkv(2, 65, 2, 2, 32, causal=False)),
    Case("attention_qkv", "kv_lengths 65", _attention_qkv(2, 65, 2, 2, 32, causal=True, kv_lengths=[65, 17])),
    Case("attention_qkv", "dropout 65", _attention_qkv(2, 65, 2, 2, 32, causal=True, dropout_p=0.1)),
    Case("decode_attention", "1 of 1", _decode(1, 1, 2, 2, 32, [1]), differentiable=False),
    Case("decode_attention", "3x65 grouped", _decode(3, 65, 4, 2, 64, [65, 17, 1]), differentiable=False),
    Case("decode_attention", "2x700 D80, one empty", _decode(2, 700, 3, 3, 80, [700, 0]), differentiable=False),
    Case("gelu", "1x1", lambda draw: ((draw.normal(1, 1),), {})),
    Case("gelu", "17x65", lambda draw: ((draw.normal(17, 65, scale=3.0),), {})),
    Case("gelu", "2x17x512 tanh", lambda draw: ((draw.normal(2, 17, 512, scale=3.0),), {"approximate": "tanh"})),
    Case("gelu", "17x129 bias", lambda draw: ((draw.normal(17, 129), draw.normal(129)), {})),
    Case("gelu", "65x640 bias tanh", lambda draw: ((draw.normal(65, 640), draw.normal(640)), {"approximate": "tanh"})),
    Case("gelu", "no rows", lambda draw: ((draw.normal(0, 64), draw.normal(64)), {})),
    Case("gelu", "63x64 every second", lambda draw: ((_viewed(draw, (63, 64), "every second"),), {})),
    Case("embedding", "1x1", _embedding(1, 1, 7, 16)),
    Case("embedding", "3x17", _embedding(3, 17, 65, 48)),
    Case("embedding", "tokens only, scaled", _embedding(2, 65, 129, 64, position=False, scale=8.0)),
    Case("embedding", "positions given", _embedding(2, 17, 65, 64, positions=True)),
    Case("cross_entropy", "1x65", _losses(1, 65, None)),
    Case("cross_entropy", "129x65 ignored", _losses(129, 65, None, ignored=40)),
    Case("cross_entropy", "17x1023 smoothed", _losses(17, 1023, None, label_smoothing=0.1)),
    Case("cross_entropy", "63x128 padded", _losses(63, 128, None, vocab=97, ignored=5)),
    Case("cross_entropy", "63x65 denominator", _losses(63, 65, None, ignored=20, denominator=[111.0])),
    Case("cross_entropy", "17x65 all ignored", _losses(17, 65, None, ignored=17)),
    Case("cross_entropy", "5x1", _losses(5, 1, None)),
    Case("cross_entropy", "5x9 padded", _losses(5, 9, None, vocab=7)),
    Case("cross_entropy", "7x5003 smoothed, ignored", _losses(7, 5003, None, ignored=2, label_smoothing=0.1)),
    Case("cross_entropy", "17x129 rows apart", _losses(17, 129, None, view="rows apart")),
    Case("cross_entropy", "17x65 large logits", _losses(17, 65, None, scale=80.0, ignored=3, ignore_index=3)),
    Case("linear_cross_entropy", "1x17x65", _losses(1, 65, 17)),
    Case("linear_cross_entropy", "129x64x97 ignored", _losses(129, 97, 64, ignored=30)),
    Case(
        "linear_cross_entropy",
        "63x128x128 padded, smoothed",
        _losses(63, 128, 128, vocab=100, label_smoothing=0.1),
    ),
    Case("adamw_", "first step", _adamw(_SHAPES, step=1, weight_decay=0.1), differentiable=False),
    Case(
        "adamw_",
        "later, scaled",
        _adamw(_SHAPES, step=1000, weight_decay=0.0, grad_scale=0.25),
        differentiable=False,
    ),
    Case("clip_grad_norm_", "clipped", _clip(_SHAPES, 1.0), differentiable=False),
    Case("clip_grad_norm_", "left alone", _clip(_SHAPES, 1e6), differentiable=False),
)
