"""Opcodes that make a value of values: a table of patterns, each with the types of what it takes and gives and a NumPy function.

`find(opcode)` returns (type of the result, types of the operands, function of arrays of those types). A modifier that no pattern
lists makes the opcode unknown: nothing is ignored. Approximate instructions are rounded from float64.
"""

import re

import numpy as np

from .numbers import (TYPES, add_exactly, bfloat_to_float, float_to_bfloat, float_to_half, flushed, fma_double, fma_float, narrowed,
                      to_float, to_integer, unsigned)  # fmt: skip

RULES = []
INT, WORD, FLOAT = r"(?P<t>[su](16|32|64))", r"(?P<t>b(16|32|64))", r"(?P<ftz>\.ftz)?\.(?P<t>f32|f64)"
WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
ONE = np.uint32(1)


def rule(pattern):
    def add(build):
        RULES.append((re.compile(pattern), build))
        return build

    return add


def find(opcode):
    """None where no rule knows the opcode."""
    for pattern, build in RULES:
        if match := pattern.fullmatch(opcode):
            return build(match)
    return None


def same(match, count, function):
    """All operands and the result have the type `t`; in float32 with .ftz small numbers count as 0, and .sat keeps 0 to 1."""
    t, groups = match["t"], match.groupdict()

    def whole(*x):
        found = function(*(flushed(v) for v in x)) if groups.get("ftz") else function(*x)
        if groups.get("sat"):
            found = np.clip(np.where(np.isnan(found), 0, found), 0, 1).astype(found.dtype)
        return flushed(found) if groups.get("ftz") else found

    plain = not (groups.get("ftz") or groups.get("sat"))
    return t, (t,) * count, function if plain else whole


# ------------------------------------------------------------------------------------------------------------------ integers


@rule(rf"(?P<op>add|sub|min|max)\.{INT}")
def _(m):
    return same(m, 2, {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}[m["op"]])


def multiplied(t, part):
    """The product, or its lower or upper half."""
    wide = TYPES.get(WIDER.get(t))
    bits = TYPES[t].itemsize * 8
    if part == "lo":
        return np.multiply
    if part == "wide":
        return lambda a, b: a.astype(wide) * b.astype(wide)
    if wide is not None:
        return lambda a, b: (a.astype(wide) * b.astype(wide) >> wide.type(bits)).astype(TYPES[t])
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)

    def high(a, b):  # of 64 bits: by halves
        x, y = a.view(np.uint64), b.view(np.uint64)
        x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
        middle = (x0 * y0 >> half) + (x1 * y0 & low) + x0 * y1
        found = x1 * y1 + (x1 * y0 >> half) + (middle >> half)
        if t == "s64":  # a negative factor was taken as 2^64 more than it is
            found = found - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
        return found.view(TYPES[t])

    return high


@rule(rf"mul\.(?P<part>lo|hi|wide)\.{INT}")
def _(m):
    return WIDER[m["t"]] if m["part"] == "wide" else m["t"], (m["t"],) * 2, multiplied(m["t"], m["part"])


@rule(rf"mad\.(?P<part>lo|hi|wide)\.{INT}")
def _(m):
    t, product = m["t"], multiplied(m["t"], m["part"])
    to = WIDER[t] if m["part"] == "wide" else t
    return to, (t, t, to), lambda a, b, c: product(a, b) + c


@rule(rf"(?P<op>div|rem)\.{INT}")
def _(m):
    def divide(a, b):  # towards zero; by 0 all bits are set, as GPUs happen to do
        safe = np.where(b == 0, b.dtype.type(1), b)
        rest = np.fmod(a, safe)
        if m["op"] == "rem":
            return np.where(b == 0, a, rest)
        return np.where(b == 0, ~np.zeros_like(b), (a - rest) // safe)

    return same(m, 2, divide)


@rule(r"(?P<op>neg|abs)\.(?P<t>s(16|32|64))")
def _(m):
    return same(m, 1, {"neg": np.negative, "abs": np.abs}[m["op"]])


@rule(r"(?P<op>and|or|xor)\.(?P<t>b(16|32|64)|pred)")
def _(m):
    return same(m, 2, {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[m["op"]])


@rule(r"not\.(?P<t>b(16|32|64)|pred)")
def _(m):
    return same(m, 1, np.invert)


@rule(r"(?P<op>shl|shr)\.(?P<t>[bsu](16|32|64))")
def _(m):
    t, bits = TYPES[m["t"]], TYPES[m["t"]].itemsize * 8

    def shift(a, by):  # by the width or more: everything is shifted out
        inside = np.minimum(by, np.uint32(bits - 1)).astype(unsigned(t.itemsize)).view(t)
        if m["op"] == "shr" and m["t"][0] == "s":
            return a >> inside
        return np.where(by < bits, a << inside if m["op"] == "shl" else a >> inside, t.type(0))

    return m["t"], (m["t"], "u32"), shift


@rule(r"shf\.(?P<side>[lr])\.(?P<mode>wrap|clamp)\.b32")
def _(m):
    def shift(low, high, by):
        by = (by & np.uint32(31) if m["mode"] == "wrap" else np.minimum(by, np.uint32(32))).astype(np.uint64)
        both = high.astype(np.uint64) << np.uint64(32) | low
        return ((both << by) >> np.uint64(32) if m["side"] == "l" else both >> by).astype(np.uint32)

    return "b32", ("b32", "b32", "u32"), shift


@rule(rf"(?P<op>popc|clz)\.(?P<t>b(32|64))")
def _(m):
    bits = TYPES[m["t"]].itemsize * 8

    def count(x):
        set = np.unpackbits(np.ascontiguousarray(x).view(np.uint8).reshape(len(x), -1), axis=1, bitorder="little")
        if m["op"] == "popc":
            return set.sum(1).astype(np.uint32)
        return np.where(set.any(1), set[:, ::-1].argmax(1), bits).astype(np.uint32)

    return "u32", (m["t"],), count


@rule(r"brev\.(?P<t>b(32|64))")
def _(m):
    def turn(x):
        bits = np.unpackbits(np.ascontiguousarray(x).view(np.uint8).reshape(len(x), -1), axis=1, bitorder="little")
        return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(x.dtype)[:, 0]

    return same(m, 1, turn)


@rule(r"bfe\.(?P<t>[su](32|64))")
def _(m):
    t, bits = TYPES[m["t"]], TYPES[m["t"]].itemsize * 8
    plain = unsigned(t.itemsize)

    def extract(x, at, length):
        at, length = at & np.uint32(255), np.minimum(length & np.uint32(255), np.uint32(bits))
        end = np.minimum(at + length, np.uint32(bits))  # of what there is
        left = (
            (np.uint32(bits) - np.maximum(end, ONE)).astype(plain).view(t)
        )  # moves the highest bit of the field to the top
        short = np.where(at < end, np.uint32(bits) - (end - np.minimum(at, end)), np.uint32(0)).astype(plain).view(t)
        field = (x << left) >> short  # of s: filled with its highest bit
        beyond = x >> t.type(bits - 1) if m["t"][0] == "s" else np.zeros_like(x)
        return np.where(length == 0, t.type(0), np.where(at >= bits, beyond, field))

    return m["t"], (m["t"], "u32", "u32"), extract


@rule(r"bfi\.(?P<t>b(32|64))")
def _(m):
    t, bits = TYPES[m["t"]], TYPES[m["t"]].itemsize * 8

    def insert(a, b, at, length):
        at, length = at & np.uint32(255), np.minimum(length & np.uint32(255), np.uint32(bits))
        ones = np.where(
            length >= bits, ~t.type(0), (t.type(1) << np.minimum(length, np.uint32(bits - 1)).astype(t)) - t.type(1)
        )
        inside = np.minimum(at, np.uint32(bits - 1)).astype(t)
        field = np.where(at < bits, ones << inside, t.type(0))
        return b & ~field | a << inside & field

    return m["t"], (m["t"], m["t"], "u32", "u32"), insert


@rule(r"prmt\.b32")
def _(m):
    def pick(a, b, which):
        bytes = (b.astype(np.uint64) << np.uint64(32)) | a
        found = np.uint32(0)
        for i in range(4):
            chosen = which >> np.uint32(4 * i)
            byte = (bytes >> ((chosen & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(
                255
            )
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            found = found | np.where(chosen & np.uint32(8), sign, byte) << np.uint32(8 * i)
        return found

    return "b32", ("b32",) * 3, pick


@rule(r"lop3\.b32")
def _(m):
    def look_up(a, b, c, table):
        found = np.uint32(0)
        for i in range(8):
            row = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            found = found | np.where(table >> np.uint32(i) & ONE, row, np.uint32(0))
        return found

    return "b32", ("b32",) * 4, look_up


# ------------------------------------------------------------------------------------------------------------ floating point


def directed(operation):
    """float32 of what `operation` makes of float64s: a value, and what its rounding lost."""
    return lambda mode: lambda *x: to_float(*operation(*(v.astype(np.float64) for v in x)), mode)


@rule(rf"(?P<op>add|sub|mul)(\.rn)?{FLOAT}")
@rule(r"(?P<op>add|sub|mul)(\.rn)?(?P<ftz>\.ftz)?(?P<sat>\.sat)\.(?P<t>f32)")
def _(m):
    return same(m, 2, {"add": np.add, "sub": np.subtract, "mul": np.multiply}[m["op"]])


@rule(r"(?P<op>add|sub|mul)\.(?P<mode>rz|rm|rp)(?P<ftz>\.ftz)?\.(?P<t>f32)")
def _(m):
    operations = {"add": add_exactly, "sub": lambda a, b: add_exactly(a, -b), "mul": lambda a, b: (a * b, np.zeros(1))}
    return same(m, 2, directed(operations[m["op"]])(m["mode"]))


@rule(r"fma\.(?P<mode>rn|rz|rm|rp)(?P<ftz>\.ftz)?(?P<sat>\.sat)?\.(?P<t>f32)")
def _(m):
    return same(m, 3, lambda a, b, c: fma_float(a, b, c, m["mode"]))


@rule(r"fma\.rn\.(?P<t>f64)")
def _(m):
    return same(m, 3, fma_double)


@rule(rf"(?P<op>min|max)(?P<nan>\.NaN)?{FLOAT}")
def _(m):
    pick, sign = (np.fmin, np.logical_or) if m["op"] == "min" else (np.fmax, np.logical_and)

    def choose(a, b):  # -0 is less than 0
        zero = np.where(sign(np.signbit(a), np.signbit(b)), a.dtype.type(-0.0), a.dtype.type(0))
        found = np.where((a == 0) & (b == 0), zero, pick(a, b))
        return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), found) if m["nan"] else found

    return same(m, 2, choose)


@rule(rf"(?P<op>neg|abs){FLOAT}")
def _(m):
    return same(m, 1, {"neg": np.negative, "abs": np.abs}[m["op"]])


@rule(r"copysign\.(?P<t>f32|f64)")
def _(m):
    return same(m, 2, lambda sign, size: np.copysign(size, sign))


@rule(r"div\.(rn|full|approx)(?P<ftz>\.ftz)?\.(?P<t>f32)")
@rule(r"div\.rn\.(?P<t>f64)")
def _(m):
    return same(m, 2, np.divide)


@rule(r"rcp\.(rn|approx)(?P<ftz>\.ftz)?\.(?P<t>f32)")
@rule(r"rcp\.rn\.(?P<t>f64)")
def _(m):
    return same(m, 1, lambda x: x.dtype.type(1) / x)


@rule(r"sqrt\.(rn|approx)(?P<ftz>\.ftz)?\.(?P<t>f32)")
@rule(r"sqrt\.rn\.(?P<t>f64)")
def _(m):
    return same(m, 1, np.sqrt)


APPROXIMATE = {
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@rule(r"(?P<op>rsqrt|ex2|lg2|sin|cos)\.approx(?P<ftz>\.ftz)?\.(?P<t>f32)")
@rule(r"(?P<op>tanh)\.approx\.(?P<t>f32)")
def _(m):
    return same(m, 1, lambda x: narrowed(APPROXIMATE[m["op"]](x.astype(np.float64))))


# ----------------------------------------------------------------------------------------------------- comparing, choosing

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
    rf"(?P<set>setp|set)\.(?P<op>eq|ne|lt|le|gt|ge)(\.(?P<bool>and|or|xor))?(\.(?P<to>u32|s32))?\.(?P<t>[su](16|32|64))"
)
@rule(rf"(?P<set>setp|set)\.(?P<op>eq|ne)(\.(?P<bool>and|or|xor))?(\.(?P<to>u32|s32))?\.{WORD}")
@rule(rf"(?P<set>setp|set)\.(?P<op>lo|ls|hi|hs)(\.(?P<bool>and|or|xor))?(\.(?P<to>u32|s32))?\.(?P<t>u(16|32|64))")
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
