"""Backend specs: the text a user writes to say which implementations shall serve.

    auto                                what was measured fastest for each call
    cpp                                 one backend
    cuda,triton                         an ordered preference
    attention=triton,layer_norm=torch   per op; ops not named are chosen by `auto`
    cpp,layer_norm=torch                both: one default, and exceptions to it

Nothing here needs torch, so that a command line can refuse a typing error at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points

ENTRY_POINT_GROUP = "tinygpt.backends"

# Backend -> module that registers it. Third parties add theirs through the entry point group above.
BUILTIN = {
    "reference": "tinygpt_kernels.ops",
    "torch": "tinygpt_kernels.fused",
    "triton": "tinygpt_kernels.triton_ops",
    "cpp": "tinygpt_kernels.native",
    "cuda": "tinygpt_kernels.native",
}


@dataclass(frozen=True)
class Spec:
    """A parsed spec: an ordered preference for every op, and exceptions by op name."""

    text: str
    default: tuple[str, ...] = ("auto",)
    per_op: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def order(self, op: str) -> tuple[str, ...]:
        """The backends to try for `op`, first choice first."""
        return self.per_op.get(op, self.default)

    def backends(self) -> frozenset[str]:
        """Every backend this spec names."""
        return frozenset(self.default).union(*self.per_op.values())


@lru_cache(maxsize=1)
def plugins() -> dict[str, EntryPoint]:
    """Backends that other installed packages offer, by name."""
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def known_backends() -> tuple[str, ...]:
    """Names of all backends, the built-in ones first."""
    return (*BUILTIN, *(name for name in plugins() if name not in BUILTIN))


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that does not exist: the nearest one that does, then all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(known)}"


def parse_spec(text: str) -> Spec:
    """Parse a backend spec.

    Raises:
        ValueError: an empty item or an unknown backend; the message offers the nearest name.
    """
    default: list[str] = []
    per_op: dict[str, tuple[str, ...]] = {}
    for item in text.split(","):
        op, equals, backend = (part.strip() for part in item.rpartition("="))
        if not backend or (equals and not op):
            raise ValueError(
                f"backend spec {text!r} has an empty item; write for example 'cpp' or 'layer_norm=triton,torch'"
            )
        if backend != "auto" and backend not in known_backends():
            raise ValueError(unknown("backend", backend, ("auto", *known_backends())))
        if equals:
            per_op[op] = (*per_op.get(op, ()), backend)
        else:
            default.append(backend)
    return Spec(text, tuple(default) or ("auto",), per_op)
