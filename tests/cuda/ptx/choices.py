"""Comparing, choosing, converting."""

import numpy as np

from .numbers import TYPES, bfloat_to_float, float_to_bfloat, float_to_half, flushed, narrowed, to_integer
from .rules import FLOAT, WORD, rule, same

COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
COMPARE |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
BOOLEAN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def compared(name, is_float):
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if not is_float:
        return COMPARE[name]
    if name.endswith("u"):  # or one of them is NaN
        return lambda a, b: COMPARE[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)
    return lambda a, b: COMPARE[name](a, b) & ~np.isnan(a) & ~np.isnan(b)


@rule(
    r"(?P<set>setp|set)\.(?P<op>eq|ne|lt|le|gt|ge)(\.(?P<bool>and|or|xor))?(\.(?P<to>u32|s32))?\.(?P<t>[su](16|32|64))"
)
@rule(rf"(?P<set>setp|set)\.(?P<op>eq|ne)(\.(?P<bool>and|or|xor))?(\.(?P<to>u32|s32))?\.{WORD}")
@rule(r"(?P<set>setp|set)\.(?P<op>lo|ls|hi|hs)(\.(?P<bool>and|or|xor))?(\.(?P<to>u32|s32))?\.(?P<t>u(16|32|64))")
@rule(
    rf"(?P<set>setp|set)\.(?P<op>(eq|ne|lt|le|gt|ge)u?|num|nan)(\.(?P<bool>and|or|xor))?(\.(?P<to>u32|s32|f32))?{FLOAT}"
)
def _(m):
    if (m["set"] == "set") != bool(m["to"]):
        return None
    compare = compared(m["op"], m["t"][0] == "f")
    squash = flushed if m.groupdict().get("ftz") else lambda x: x

    def decide(a, b, *other):
        found = compare(squash(a), squash(b))
        found = BOOLEAN[m["bool"]](found, *other) if other else found
        if not m["to"]:
            return found
        yes = TYPES[m["to"]].type(1.0) if m["to"] == "f32" else np.uint32(0xFFFFFFFF).view(TYPES[m["to"]])
        return np.where(found, yes, TYPES[m["to"]].type(0))

    return m["to"] or "pred", (m["t"], m["t"]) + (("pred",) if m["bool"] else ()), decide


@rule(r"selp\.(?P<t>[bsu](16|32|64)|f32|f64)")
def _(m):
    return m["t"], (m["t"], m["t"], "pred"), lambda a, b, p: np.where(p, a, b)


@rule(r"slct\.(?P<t>[bsu](16|32|64)|f32|f64)\.(?P<by>s32|f32)")
def _(m):
    return m["t"], (m["t"], m["t"], m["by"]), lambda a, b, c: np.where(c >= 0, a, b)


# ------------------------------------------------------------------------------------------------------------------ converting


@rule(r"cvt\.(?P<to>[su](8|16|32|64))\.(?P<t>[su](8|16|32|64))")
def _(m):
    return m["to"], (m["t"],), lambda x: x.astype(TYPES[m["to"]])


@rule(r"cvt\.sat\.(?P<to>[su](8|16|32|64))\.(?P<t>[su](8|16|32|64))")
def _(m):
    limits = np.iinfo(TYPES[m["to"]])

    def clamp(x):
        low, high = max(limits.min, np.iinfo(x.dtype).min), min(limits.max, np.iinfo(x.dtype).max)
        return np.clip(x, x.dtype.type(low), x.dtype.type(high)).astype(TYPES[m["to"]])

    return m["to"], (m["t"],), clamp


@rule(r"cvt\.rn\.(?P<to>f32|f64)\.(?P<t>[su](8|16|32|64))")
def _(m):
    return m["to"], (m["t"],), lambda x: x.astype(TYPES[m["to"]])


@rule(r"cvt\.(?P<mode>r[nzmp]i)(?P<ftz>\.ftz)?\.(?P<to>[su](8|16|32|64))\.(?P<t>f16|f32|f64)")
def _(m):
    return m["to"], (m["t"],), lambda x: to_integer(flushed(x, bool(m["ftz"])), TYPES[m["to"]], m["mode"])


@rule(r"cvt(\.(?P<mode>r[nzmp]i))?(?P<ftz>\.ftz)?(?P<sat>\.sat)?\.(?P<t>f32|f64)\.(?P=t)")
def _(m):
    rounds = {None: lambda x: x, "rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[m["mode"]]
    return same(m, 1, rounds)


@rule(r"cvt(?P<ftz>\.ftz)?\.(?P<to>f32|f64)\.(?P<t>f16|f32)")
def _(m):
    if m["to"] == m["t"]:
        return None
    return m["to"], (m["t"],), lambda x: flushed(x, bool(m["ftz"])).astype(TYPES[m["to"]])


@rule(r"cvt\.f32\.bf16")
def _(m):
    return "f32", ("bf16",), bfloat_to_float


@rule(r"cvt\.(?P<mode>rn|rz|rm|rp)(?P<ftz>\.ftz)?\.f32\.f64")
def _(m):
    return "f32", ("f64",), lambda x: flushed(narrowed(x, m["mode"]), bool(m["ftz"]))


@rule(r"cvt\.(?P<mode>rn|rz)(?P<ftz>\.ftz)?\.f16\.f32")
def _(m):
    return "f16", ("f32",), lambda x: float_to_half(flushed(x, bool(m["ftz"])), m["mode"])


@rule(r"cvt\.(?P<mode>rn|rz)\.bf16\.f32")
def _(m):
    return "bf16", ("f32",), lambda x: float_to_bfloat(x, m["mode"])


@rule(r"cvt\.(?P<mode>rn|rz)\.(?P<t>f16|bf16)x2\.f32")
def _(m):
    narrow = float_to_half if m["t"] == "f16" else float_to_bfloat

    def pack(high, low):
        high, low = (narrow(x, m["mode"]).view(np.uint16).astype(np.uint32) for x in (high, low))
        return high << np.uint32(16) | low

    return "b32", ("f32", "f32"), pack
