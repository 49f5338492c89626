"""Sizes worth timing, and the work they are: one place for the command line and every benchmark.

# B batch, T tokens, S keys, H heads, K key/value heads, D head dim, C channels, R rows, V vocabulary, L layers

A workload is a case like any other, so that it passes the parity rule on the very inputs it is timed with.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import cases
from .cases import Case, Draw

Sizes = Mapping[str, float]
_ORACLE_LIMIT = 1 << 26  # elements; the float64 oracle holds several tensors of as many


class Work(NamedTuple):
    """What any implementation has to do: operations ("FLOP") where arithmetic takes the time, bytes ("B") elsewhere."""

    unit: str
    forward: float
    backward: float


class Kind(NamedTuple):
    """How an op's inputs are made from sizes. optional: sizes with a default; None stands for one of the required."""

    required: tuple[str, ...]
    optional: Mapping[str, float | str]
    make: Callable[[Sizes], Callable[[Draw], Any]]
    work: Callable[[Sizes, int], Work]
    largest: Callable[[Sizes], float]  # elements of the largest tensor of the reference


@dataclass(frozen=True)
class Workload:
    """An op on inputs of given sizes."""

    op: str
    sizes: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        return f"{self.op} {self.shape}"

    @property
    def shape(self) -> str:
        """The sizes as they are typed, those that are at their default left out."""
        kind = KINDS[self.op]
        given = dict(self.sizes)
        return ",".join(
            f"{n}={v:g}" for n, v in self.sizes if n in kind.required or v != _default(kind.optional[n], given)
        )

    @property
    def case(self) -> Case:
        """Its inputs, by name. With dropout they bring a seed, without which no two backends agree."""
        return Case(self.op, self.shape, KINDS[self.op].make(dict(self.sizes)), self.op not in _NO_GRADIENT)

    def work(self, itemsize: int) -> Work:
        """What one call must do, in tensors of `itemsize` bytes an element."""
        return KINDS[self.op].work(dict(self.sizes), itemsize)

    def for_oracle(self) -> Workload:
        """This, or where the float64 oracle would not fit into memory, fewer rows (or less of a batch) of the same."""
        sizes = dict(self.sizes)
        largest = KINDS[self.op].largest(sizes)
        rows = "R" if "R" in sizes else "B"
        if largest > _ORACLE_LIMIT and rows in sizes:
            sizes[rows] = max(1, int(sizes[rows] * _ORACLE_LIMIT / largest))
        return Workload(self.op, tuple(sizes.items()))


def workload(op: str, shape: str) -> Workload:
    """A workload from text such as `B=8,H=6,T=256,D=64`.

    Raises:
        ValueError: sizes that are missing, unknown or make no tensor; says what the op takes.
    """
    kind, given = KINDS[op], {}
    takes = f"{op} takes {','.join(f'{n}=' for n in kind.required)}" + (
        f" and optionally {', '.join(kind.optional)}" if kind.optional else ""
    )
    example = f"for example --shape {default_workloads(op)[0].shape}"
    names = (*kind.required, *kind.optional)
    for item in shape.split(","):
        name, equals, text = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(f"{item!r} is not of the form NAME=NUMBER; {takes}, {example}")
        if name not in names:
            near = difflib.get_close_matches(name.upper(), names, n=1)
            raise ValueError(
                f"{op} has no size {name!r}{f'; did you mean {near[0]!r}?' if near else ''}; {takes}, {example}"
            )
        try:
            given[name] = float(text) if name == "dropout" else int(text)
        except ValueError:
            raise ValueError(
                f"{name}={text} is not a {'number' if name == 'dropout' else 'whole number'}; {example}"
            ) from None
        _in_range(name, given[name])
    if missing := [name for name in kind.required if name not in given]:
        raise ValueError(f"{op} needs {' and '.join(missing)} too; {takes}, {example}")
    sizes = {name: given.get(name, _default(kind.optional.get(name, 0), given)) for name in names}
    if sizes.get("K") and sizes["H"] % sizes["K"]:
        raise ValueError(
            f"K={sizes['K']:g} does not divide H={sizes['H']:g}; key/value heads are shared by whole groups"
        )
    return Workload(op, tuple(sizes.items()))


def _in_range(name: str, value: float) -> None:
    low, high = {"dropout": (0.0, 0.99), "causal": (0, 1), "bias": (0, 1), "tanh": (0, 1)}.get(name, (1, 1 << 31))
    if not low <= value <= high:
        raise ValueError(f"{name}={value:g} is not within {low:g} to {high:g}")


def _default(value: float | str, given: Sizes) -> float:
    return given[value] if isinstance(value, str) else value


class Shape(NamedTuple):
    """A decoder, as far as the sizes of its ops go."""

    layers: int
    heads: int
    width: int
    tokens: int
    batch: int
    vocab: int


# The presets of the same names; a CPU is measured with an eighth of char-gpu's batch, since nobody would wait for more.
CHAR_CPU = Shape(layers=4, heads=4, width=128, tokens=64, batch=12, vocab=65)
CHAR_GPU = Shape(layers=6, heads=6, width=384, tokens=256, batch=64, vocab=65)


def default_workloads(op: str, device: str = "cpu") -> tuple[Workload, ...]:
    """The op at the sizes of the presets char-cpu and char-gpu."""
    large = CHAR_GPU if device.startswith("cuda") else CHAR_GPU._replace(batch=8)
    return tuple(of_model(op, model) for model in (CHAR_CPU, large))


def of_model(op: str, model: Shape) -> Workload:
    """The op as a step of that decoder calls it (decode_attention: as generating one text does)."""
    L, H, C, T, B, V = model
    known = {"L": L, "H": H, "K": H, "C": C, "T": T, "S": T, "B": B, "V": V, "D": C // H, "R": B * T}
    if op == "gelu":
        known["C"] = 4 * C
    if op == "decode_attention":
        known["B"] = 1
    kind = KINDS[op]
    sizes = {name: known[name] for name in kind.required}
    return Workload(op, tuple((sizes | {n: _default(d, sizes) for n, d in kind.optional.items()}).items()))


def parameter_shapes(L: int, C: int, V: int, T: int) -> list[tuple[int, ...]]:
    """The tensors of a decoder of L layers without biases, output layer tied to the tokens."""
    block: list[tuple[int, ...]] = [(C,), (3 * C, C), (C, C), (C,), (4 * C, C), (C, 4 * C)]
    return [(V, C), (T, C), *block * L, (C,)]


def _elements(s: Sizes) -> float:
    L, C, V, T = (int(s[n]) for n in "LCVT")
    total = 0.0
    for shape in parameter_shapes(L, C, V, T):
        total += shape[0] * (shape[1] if len(shape) > 1 else 1)
    return total


def _attention(s: Sizes) -> Callable[[Draw], Any]:
    B, T, S, H, K, D = (int(s[n]) for n in "BTSHKD")
    return cases._attention(B, T, S, H, K, D, causal=bool(s["causal"]), dropout_p=s["dropout"])


def _attention_qkv(s: Sizes) -> Callable[[Draw], Any]:
    options: dict[str, Any] = {"causal": bool(s["causal"])}
    if s["dropout"]:
        options["dropout_p"] = s["dropout"]
    return cases._attention_qkv(*(int(s[n]) for n in "BTHKD"), **options)


def _gelu(s: Sizes) -> Callable[[Draw], Any]:
    R, C, how = int(s["R"]), int(s["C"]), {"approximate": "tanh"} if s["tanh"] else {}
    return lambda draw: ((draw.normal(R, C), draw.normal(C) if s["bias"] else None), how)


def _decode(s: Sizes) -> Callable[[Draw], Any]:
    B, S, H, K, D = (int(s[n]) for n in "BSHKD")
    return cases._decode(B, S, H, K, D, [S] * B)


def _adamw(s: Sizes) -> Callable[[Draw], Any]:
    return cases._adamw(parameter_shapes(*(int(s[n]) for n in "LCVT")), step=100, weight_decay=0.1)


def _clip(s: Sizes) -> Callable[[Draw], Any]:
    return cases._clip(parameter_shapes(*(int(s[n]) for n in "LCVT")), 1.0)


def _attention_work(s: Sizes, itemsize: int) -> Work:
    # Two products forward; five backward, as FlashAttention counts (scores are computed again). Masked scores do not count.
    S = s.get("S", s["T"])
    seen = S - (s["T"] - 1) / 2 if s["causal"] and s["T"] <= S else S / 2 if s["causal"] else S
    forward = 4 * s["B"] * s["H"] * s["T"] * seen * s["D"]
    return Work("FLOP", forward, 2.5 * forward)


def _moved(forward: Callable[[Sizes], float], backward: Callable[[Sizes], float]) -> Callable[[Sizes, int], Work]:
    """Elements read and written; what stays in a cache anyway (weights, statistics) does not count."""
    return lambda s, itemsize: Work("B", itemsize * forward(s), itemsize * backward(s))


def _rows(n: float) -> Callable[[Sizes], float]:
    return lambda s: n * s["R"] * s["C"]


_NO_GRADIENT = ("adamw_", "clip_grad_norm_", "decode_attention")
_HEADS: dict[str, float | str] = {"K": "H", "causal": 1, "dropout": 0}
_NORM: dict[str, float | str] = {"bias": 0}

KINDS: dict[str, Kind] = {
    # x in, y out; dy and x in, dx out
    "layer_norm": Kind(
        ("R", "C"), _NORM, lambda s: cases._layer_norm((int(s["R"]),), int(s["C"]), bias=bool(s["bias"])),
        _moved(_rows(2), _rows(3)), _rows(1)),
    # x and residual in, y and h out; dy, dh and h in, one gradient out, which is both inputs'
    "add_layer_norm": Kind(
        ("R", "C"), _NORM, lambda s: cases._add_layer_norm((int(s["R"]),), int(s["C"]), bias=bool(s["bias"])),
        _moved(_rows(4), _rows(4)), _rows(1)),
    "attention": Kind(
        ("B", "H", "T", "D"), {"S": "T"} | _HEADS, _attention, _attention_work,
        lambda s: s["B"] * s["H"] * s["T"] * s["S"]),
    "attention_qkv": Kind(
        ("B", "H", "T", "D"), _HEADS, _attention_qkv, _attention_work, lambda s: s["B"] * s["H"] * s["T"] ** 2),
    # waits for the caches of k and v
    "decode_attention": Kind(
        ("B", "H", "S", "D"), {"K": "H"}, _decode,
        _moved(lambda s: 2 * s["B"] * s["S"] * s["K"] * s["D"], lambda s: 0), lambda s: s["B"] * s["H"] * s["S"]),
    "gelu": Kind(("R", "C"), {"bias": 0, "tanh": 0}, _gelu, _moved(_rows(2), _rows(3)), _rows(1)),
    # a row of the table in, one out; dy in, the whole gradient of the table out
    "embedding": Kind(
        ("B", "T", "V", "C"), {}, lambda s: cases._embedding(*(int(s[n]) for n in "BTVC")),
        _moved(lambda s: 2 * s["B"] * s["T"] * s["C"], lambda s: (s["B"] * s["T"] + s["V"]) * s["C"]),
        lambda s: s["B"] * s["T"] * s["C"]),
    "cross_entropy": Kind(
        ("R", "V"), {}, lambda s: cases._losses(int(s["R"]), int(s["V"]), None),
        _moved(lambda s: s["R"] * s["V"], lambda s: 2 * s["R"] * s["V"]), lambda s: s["R"] * s["V"]),
    # one product forward, two backward; that some compute the logits twice is their own affair
    "linear_cross_entropy": Kind(
        ("R", "C", "V"), {}, lambda s: cases._losses(int(s["R"]), int(s["V"]), int(s["C"])),
        lambda s, itemsize: Work("FLOP", 2 * s["R"] * s["C"] * s["V"], 4 * s["R"] * s["C"] * s["V"]),
        lambda s: s["R"] * s["V"]),
    # parameter and moments in and out, gradient in
    "adamw_": Kind(
        ("L", "C", "V", "T"), {}, _adamw, _moved(lambda s: 7 * _elements(s), lambda s: 0), _elements),
    # in for the norm, in and out for the scaling
    "clip_grad_norm_": Kind(
        ("L", "C", "V", "T"), {}, _clip, _moved(lambda s: 3 * _elements(s), lambda s: 0), _elements),
}  # fmt: skip
