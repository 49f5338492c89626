"""Every opcode that makes a value of values, against integers and fractions of Python.

Those that move data, branch or need a warp are in test_ptx_machine.py, those of simt.cuh's assembly in test_ptx.py.

TABLE has the opcodes by name: types of the operands, type of the result, what is right, and how far off it may be (units of the last
place; approximate instructions only). It holds every opcode that nvcc emits for a kernel, and one at least for each rule.
"""

import math
import operator
import struct
from fractions import Fraction

import pytest
import test_ptx
import test_ptx_machine
from ptx import device, rules
from ptx_snippets import BITS, FORMATS, INF, NAN, evaluate, rounded, tuples, value_of

TABLE = {}
INTEGERS = [f"{k}{b}" for k in "us" for b in (16, 32, 64)]
UNITS = 4  # of approximate instructions; the manual allows two, and more far from 1


def has(opcode, types, to, function, units=0):
    TABLE[opcode] = (types.split(), to, function, units)


def wrap(x, type):
    return value_of(int(x) & (1 << BITS[type]) - 1, type)


def each(types, opcode, count, function):
    for t in types:
        has(opcode.format(t=t), " ".join([t] * count), t, lambda *x, t=t: wrap(function(*x), t))


# ------------------------------------------------------------------------------------------------------------------ integers

WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def quotient(a, b):
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


each(INTEGERS, "add.{t}", 2, operator.add)
each(INTEGERS, "sub.{t}", 2, operator.sub)
each(INTEGERS, "min.{t}", 2, min)
each(INTEGERS, "max.{t}", 2, max)
each(INTEGERS, "mul.lo.{t}", 2, operator.mul)
each(INTEGERS, "mad.lo.{t}", 3, lambda a, b, c: a * b + c)
each(INTEGERS, "div.{t}", 2, quotient)
each(INTEGERS, "rem.{t}", 2, lambda a, b: a if b == 0 else a - b * quotient(a, b))
each(["s16", "s32", "s64"], "neg.{t}", 1, operator.neg)
each(["s16", "s32", "s64"], "abs.{t}", 1, abs)
for name, function in {"and": operator.and_, "or": operator.or_, "xor": operator.xor}.items():
    each(["b16", "b32", "b64"], f"{name}.{{t}}", 2, function)
    has(f"{name}.pred", "pred pred", "pred", function)
each(["b16", "b32", "b64"], "not.{t}", 1, operator.invert)
has("not.pred", "pred", "pred", operator.not_)
for t, to in WIDE.items():
    has(f"mul.wide.{t}", f"{t} {t}", to, lambda a, b, to=to: wrap(a * b, to))
    has(f"mad.wide.{t}", f"{t} {t} {to}", to, lambda a, b, c, to=to: wrap(a * b + c, to))
for t in INTEGERS:
    has(f"mul.hi.{t}", f"{t} {t}", t, lambda a, b, t=t: wrap(a * b >> BITS[t], t))
    has(f"mad.hi.{t}", f"{t} {t} {t}", t, lambda a, b, c, t=t: wrap((a * b >> BITS[t]) + c, t))
    has(f"shr.{t}", f"{t} u32", t, lambda a, by, t=t: wrap(a >> min(by, BITS[t]), t))
for b in (16, 32, 64):
    has(f"shl.b{b}", f"b{b} u32", f"b{b}", lambda a, by, b=b: wrap(a << min(by, b), f"b{b}"))
    has(f"shr.b{b}", f"b{b} u32", f"b{b}", lambda a, by, b=b: a >> min(by, b))
for b in (32, 64):
    has(f"popc.b{b}", f"b{b}", "u32", lambda x: bin(x).count("1"))
    has(f"clz.b{b}", f"b{b}", "u32", lambda x, b=b: b - x.bit_length())
    has(f"brev.b{b}", f"b{b}", f"b{b}", lambda x, b=b: int(f"{x:0{b}b}"[::-1], 2))

    def extracted(x, at, length, b, signed):
        at, length = at % 256, length % 256
        bits = [x >> i & 1 for i in range(b)]
        fill = bits[min(at + length - 1, b - 1)] if signed and length else 0
        found = [bits[at + i] if i < length and at + i < b else fill for i in range(b)]
        return sum(bit << i for i, bit in enumerate(found))

    def inserted(a, into, at, length, b):
        for i in range(length % 256):
            if at % 256 + i < b:
                into = into & ~(1 << at % 256 + i) | (a >> i & 1) << at % 256 + i
        return into

    for k in "us":
        has(f"bfe.{k}{b}", f"{k}{b} u32 u32", f"{k}{b}",
            lambda x, at, n, b=b, k=k: wrap(extracted(x & (1 << b) - 1, at, n, b, k == "s"), f"{k}{b}"))  # fmt: skip
    has(f"bfi.b{b}", f"b{b} b{b} u32 u32", f"b{b}", lambda a, into, at, n, b=b: inserted(a, into, at, n, b))
for mode, amount in {"wrap": lambda by: by % 32, "clamp": lambda by: min(by, 32)}.items():
    has(
        f"shf.l.{mode}.b32",
        "b32 b32 u32",
        "b32",
        lambda lo, hi, by, f=amount: ((hi << 32 | lo) << f(by)) >> 32 & 0xFFFFFFFF,
    )
    has(f"shf.r.{mode}.b32", "b32 b32 u32", "b32", lambda lo, hi, by, f=amount: (hi << 32 | lo) >> f(by) & 0xFFFFFFFF)


def permuted(a, b, which):
    bytes = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    chosen = [bytes[which >> 4 * i & 7] for i in range(4)]
    return int.from_bytes([c if not which >> 4 * i & 8 else 255 * (c >> 7) for i, c in enumerate(chosen)], "little")


has("prmt.b32", "b32 b32 b32", "b32", permuted)
has("lop3.b32", "b32 b32 b32 b32", "b32", lambda a, b, c, table: sum(
    (table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32)))  # fmt: skip

# ------------------------------------------------------------------------------------------------------------ floating point


def flush(x, type="f32"):
    return math.copysign(0.0, x) if abs(x) < 2.0 ** FORMATS[type][1] else x


def exact(function, type, mode="rn"):
    """The fraction that `function` makes of fractions, rounded once; where there is none, as IEEE has it: of float64, which is exact
    about signs of zero, infinities and NaN."""

    def evaluated(*x):
        if all(map(math.isfinite, x)):
            found = function(*map(Fraction, x))
            if isinstance(found, Fraction) and found != 0:
                return rounded(found, type, mode)
            if (
                mode == "rm" and function is not operator.mul and len(x) > 1
            ):  # a sum that is 0: downwards is upwards of the opposite
                return -float(function(-x[0], *x[1:-1], -x[-1]))
        return float(function(*x))

    return evaluated


def flushing(function):
    return lambda *x: flush(function(*map(flush, x)))


def saturated(function):
    return lambda *x: 0.0 if math.isnan(y := function(*x)) or y <= 0 else min(y, 1.0)


def everywhere(name, count, function, type, mode="rn"):
    """With and without .ftz, in float32."""
    types, right = " ".join([type] * count), exact(function, type, mode)
    has(name.format(ftz="") + f".{type}", types, type, right)
    if type == "f32":
        has(name.format(ftz=".ftz") + ".f32", types, "f32", flushing(right))


def divide(a, b):
    if b != 0 or math.isnan(a):
        return a / b
    return NAN if a == 0 else math.copysign(INF, a) * math.copysign(1, b)


def root(x):
    """A square root to 200 bits, or as IEEE has it."""
    if isinstance(x, Fraction):
        return Fraction(math.isqrt(int(x * 2**400)), 2**200) if x > 0 else Fraction(0) if x == 0 else None
    return x if x == 0 or math.isnan(x) else NAN if x < 0 else math.sqrt(x)


ADD = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
for t in ("f32", "f64"):
    for name, function in ADD.items():
        everywhere(name + "{ftz}", 2, function, t)
        everywhere(name + ".rn{ftz}", 2, function, t)
    everywhere("fma.rn{ftz}", 3, lambda a, b, c: a * b + c, t)
    everywhere("div.rn{ftz}", 2, divide, t)
    everywhere("rcp.rn{ftz}", 1, lambda x: divide(x * 0 + 1 if math.isfinite(x) else 1.0, x), t)
    has(f"sqrt.rn.{t}", t, t, lambda x, t=t: exact(root, t)(x) if x > 0 else root(x))
    for name, pick in {"min": min, "max": max}.items():

        def choose(a, b, pick=pick):
            if math.isnan(a) or math.isnan(b):
                return b if math.isnan(a) else a
            return pick((a, b), key=lambda x: (x, math.copysign(1, x)))

        has(f"{name}.{t}", f"{t} {t}", t, choose)
        has(f"{name}.NaN.{t}", f"{t} {t}", t, lambda a, b, f=choose: NAN if a != a or b != b else f(a, b))
    has(f"{'copysign'}.{t}", f"{t} {t}", t, lambda sign, size: math.copysign(size, sign))
    for ftz in ("", ".ftz")[: 1 + (t == "f32")]:
        small = flush if ftz else lambda x: x
        has(f"neg{ftz}.{t}", t, t, lambda x, f=small: -f(x))
        has(f"abs{ftz}.{t}", t, t, lambda x, f=small: abs(f(x)))
for mode in ("rz", "rm", "rp"):
    for name, function in ADD.items():
        everywhere(f"{name}.{mode}{{ftz}}", 2, function, "f32", mode)
    everywhere(f"fma.{mode}{{ftz}}", 3, lambda a, b, c: a * b + c, "f32", mode)
for name, function in {"add": operator.add, "mul": operator.mul}.items():
    has(f"{name}.sat.f32", "f32 f32", "f32", saturated(exact(function, "f32")))
has("fma.rn.sat.f32", "f32 f32 f32", "f32", saturated(exact(lambda a, b, c: a * b + c, "f32")))


def approximate(function, at_zero, at_infinity):
    def evaluated(x):
        if x == 0 or math.isnan(x):
            return x if math.isnan(x) else at_zero(x)
        if math.isinf(x):
            return at_infinity(x)
        try:
            return rounded(Fraction(function(x)), "f32")
        except OverflowError:
            return INF
        except ValueError:
            return NAN

    return evaluated


def one(x):
    return 1.0


def nothing(x):
    return NAN


APPROXIMATE = {
    "ex2": approximate(lambda x: 2.0**x, one, lambda x: max(x, 0.0)),
    "lg2": approximate(math.log2, lambda x: -INF, lambda x: x if x > 0 else NAN),
    "rsqrt": approximate(lambda x: 1 / math.sqrt(x), lambda x: math.copysign(INF, x), lambda x: 0.0 if x > 0 else NAN),
    "sqrt": approximate(math.sqrt, lambda x: x, lambda x: x if x > 0 else NAN),
    "rcp": approximate(lambda x: 1 / x, lambda x: math.copysign(INF, x), lambda x: math.copysign(0.0, x)),
    "sin": approximate(math.sin, lambda x: x, nothing),
    "cos": approximate(math.cos, one, nothing),
}
for name, function in APPROXIMATE.items():
    has(f"{name}.approx.f32", "f32", "f32", function, UNITS)
    has(f"{name}.approx.ftz.f32", "f32", "f32", flushing(function), UNITS)
has("tanh.approx.f32", "f32", "f32", approximate(math.tanh, lambda x: x, lambda x: math.copysign(1.0, x)), UNITS)
for name in ("full", "approx"):
    has(f"div.{name}.f32", "f32 f32", "f32", exact(divide, "f32"), UNITS)
    has(f"div.{name}.ftz.f32", "f32 f32", "f32", flushing(exact(divide, "f32")), UNITS)

# ------------------------------------------------------------------------------------------------------ comparing, choosing

ORDER = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
for t in (*INTEGERS, "b16", "b32", "b64", "f32", "f64"):
    for name, function in list(ORDER.items())[: 2 if t[0] == "b" else 6]:
        compare = (lambda a, b, f=function: a == a and b == b and f(a, b)) if t[0] == "f" else function
        has(f"setp.{name}.{t}", f"{t} {t}", "pred", compare)
        for boolean, both in {"and": operator.and_, "or": operator.or_, "xor": operator.xor}.items():
            right = lambda a, b, p, f=compare, g=both: g(f(a, b), p)  # noqa: E731
            has(f"setp.{name}.{boolean}.{t}", f"{t} {t} pred", "pred", right)
        has(f"set.{name}.u32.{t}", f"{t} {t}", "u32", lambda a, b, f=compare: 0xFFFFFFFF * f(a, b))
        if t[0] == "f":
            has(f"setp.{name}u.{t}", f"{t} {t}", "pred", lambda a, b, f=function: a != a or b != b or f(a, b))
            has(f"set.{name}.f32.{t}", f"{t} {t}", "f32", lambda a, b, f=compare: float(f(a, b)))
            if t == "f32":
                has(f"setp.{name}.ftz.f32", "f32 f32", "pred", lambda a, b, f=compare: f(flush(a), flush(b)))
    if t[0] == "u":
        for name, like in {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.items():
            has(f"setp.{name}.{t}", f"{t} {t}", "pred", ORDER[like])
    if t[0] == "f":
        has(f"setp.num.{t}", f"{t} {t}", "pred", lambda a, b: a == a and b == b)
        has(f"setp.nan.{t}", f"{t} {t}", "pred", lambda a, b: a != a or b != b)
    has(f"selp.{t}", f"{t} {t} pred", t, lambda a, b, p: a if p else b)
    has(f"slct.{t}.s32", f"{t} {t} s32", t, lambda a, b, c: a if c >= 0 else b)
    has(f"slct.{t}.f32", f"{t} {t} f32", t, lambda a, b, c: a if c >= 0 else b)

# ------------------------------------------------------------------------------------------------------------------ converting

SIZES = [f"{k}{b}" for k in "us" for b in (8, 16, 32, 64)]
ROUND = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


def limits(t):
    return (0, (1 << BITS[t]) - 1) if t[0] == "u" else (-(1 << BITS[t] - 1), (1 << BITS[t] - 1) - 1)


def as_integer(x, t, function):
    low, high = limits(t)
    return (
        0
        if math.isnan(x)
        else (high if x > 0 else low)
        if math.isinf(x)
        else max(low, min(high, function(Fraction(x))))
    )


for t in SIZES:
    for to in SIZES:
        has(f"cvt.{to}.{t}", t, to, lambda x, to=to: wrap(x, to))
        has(f"cvt.sat.{to}.{t}", t, to, lambda x, to=to: max(limits(to)[0], min(limits(to)[1], x)))
    for to in ("f32", "f64"):
        has(f"cvt.rn.{to}.{t}", t, to, lambda x, to=to: rounded(Fraction(x), to))
        for mode, function in ROUND.items():
            has(f"cvt.{mode}.{t}.{to}", to, t, lambda x, t=t, f=function: as_integer(x, t, f))
        has(f"cvt.rzi.ftz.{t}.f32", "f32", t, lambda x, t=t: as_integer(flush(x), t, math.trunc))


def integral(function):
    return lambda x: x if not math.isfinite(x) else math.copysign(float(function(x)), x)


for mode, function in ROUND.items():
    for t in ("f32", "f64"):
        has(f"cvt.{mode}.{t}.{t}", t, t, integral(function))
    has(f"cvt.{mode}.ftz.f32.f32", "f32", "f32", flushing(integral(function)))
has("cvt.sat.f32.f32", "f32", "f32", saturated(lambda x: x))
has("cvt.ftz.sat.f32.f32", "f32", "f32", saturated(flush))
for t, to in (("f16", "f32"), ("f16", "f64"), ("f32", "f64"), ("bf16", "f32")):
    has(f"cvt.{to}.{t}", t, to, lambda x: x)
has("cvt.ftz.f64.f32", "f32", "f64", flush)
for t, to, modes in (
    ("f64", "f32", ("rn", "rz", "rm", "rp")),
    ("f32", "f16", ("rn", "rz")),
    ("f32", "bf16", ("rn", "rz")),
):
    for mode in modes:
        narrow = exact(lambda x: x, to, mode)
        has(f"cvt.{mode}.{to}.{t}", t, to, narrow)
        if to != "bf16":
            has(f"cvt.{mode}.ftz.{to}.{t}", t, to,
                (lambda x, f=narrow: flush(f(x))) if to == "f32" else (lambda x, f=narrow: f(flush(x))))  # fmt: skip
        if t == "f32":

            def packed(high, low, narrow=narrow, to=to):
                return tuple(narrow(x) for x in (low, high))

            has(f"cvt.{mode}.{to}x2.f32", "f32 f32", f"{to}x2", packed)

# ----------------------------------------------------------------------------------------------------------------------- tests


def halves(x, type):
    return tuple(value_of(x >> 16 * i & 0xFFFF, type) for i in (0, 1))


def differs(found, right, to, units):
    if isinstance(right, tuple):
        return any(differs(f, r, to[:-2], units) for f, r in zip(found, right, strict=True))
    if not isinstance(right, float):
        return found != right
    if math.isnan(right) or math.isnan(found):
        return not (math.isnan(right) and math.isnan(found))
    if right == 0 or math.isinf(right) or not units:
        return found != right or math.copysign(1, found) != math.copysign(1, right)
    return abs(found - right) > units * max(math.ulp(abs(right)) * 2**29, 2.0**-149)


@pytest.mark.parametrize("opcode", TABLE)
def test_an_opcode_computes_what_the_manual_says(opcode):
    types, to, function, units = TABLE[opcode]
    inputs = tuples(types)
    results = evaluate(opcode, types, "b32" if to.endswith("x2") else to, inputs)
    if to.endswith("x2"):
        results = [halves(x, to[:-2]) for x in results]
    rights = [function(*x) for x in inputs]
    assert [(x, f, r) for x, f, r in zip(inputs, results, rights, strict=True) if differs(f, r, to, units)][:5] == []


def test_every_rule_has_an_opcode_that_is_tested():
    assert [p.pattern for p, _ in rules.RULES if not any(p.fullmatch(opcode) for opcode in TABLE)] == []


@pytest.mark.skipif(not device.nvcc(), reason="there is no nvcc")
@test_ptx.ARCHITECTURES
def test_every_opcode_that_nvcc_emits_is_tested(architecture):
    emitted = set().union(*(kernel.opcodes for kernel in device.library(architecture).values()))
    assert len(emitted) > 100
    assert emitted - TABLE.keys() - test_ptx_machine.covered() - test_ptx.assembly() == set()


def test_the_yardstick_rounds_as_ieee_does():
    for value in (1 / 3, 1e-40, 3.4e38, 2.0**-149, 1e39, 0.1 + 2.0**-40):
        try:
            single = struct.unpack("<f", struct.pack("<f", value))[0]
        except OverflowError:
            single = INF
        assert rounded(Fraction(value), "f32") == single
        assert rounded(Fraction(value), "f64") == value
    assert rounded(Fraction(65519), "f16") == 65504
    assert rounded(Fraction(65520), "f16") == INF
