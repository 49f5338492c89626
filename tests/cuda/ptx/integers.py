"""Integer arithmetic and bits."""

import numpy as np

from .numbers import TYPES, unsigned
from .rules import INT, rule, same

WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
ONE = np.uint32(1)


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


@rule(r"(?P<op>popc|clz)\.(?P<t>b(32|64))")
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
