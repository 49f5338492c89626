"""Small pieces of PTX, run on lists of Python numbers; and what is right, computed with integers and fractions alone."""

import math
import random
import struct
from fractions import Fraction

import numpy as np
from ptx import machine, memory, parse

BITS = (
    {"pred": 8, "bf16": 16}
    | {f"{k}{b}": b for k in "usb" for b in (8, 16, 32, 64)}
    | {f"f{b}": b for b in (16, 32, 64)}
)
# precision in bits, smallest exponent of a normal number (of 1.x times 2 to it), largest
FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "f64": (53, -1022, 1023)}
PACKED = {"f16": "e", "f32": "f", "f64": "d"}
NAN, INF = math.nan, math.inf


def bits_of(value, type):
    if type == "bf16":
        return struct.unpack("<I", struct.pack("<f", value))[0] >> 16
    if type in PACKED:
        return int.from_bytes(struct.pack("<" + PACKED[type], value), "little")
    return int(value) & (1 << BITS[type]) - 1


def value_of(bits, type):
    if type == "bf16":
        return struct.unpack("<f", struct.pack("<I", bits << 16))[0]
    if type in PACKED:
        return struct.unpack("<" + PACKED[type], bits.to_bytes(BITS[type] // 8, "little"))[0]
    if type == "pred":
        return bool(bits)
    return bits - (1 << BITS[type]) if type[0] == "s" and bits >> BITS[type] - 1 else bits


def rounded(x, type, mode="rn"):
    """A fraction in a floating-point format."""
    if x == 0:
        return 0.0
    precision, least, most = FORMATS[type]
    size = abs(x)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, least) - precision + 1)
    steps, rest = divmod(size, unit)
    up = {
        "rn": rest * 2 > unit or (rest * 2 == unit and steps % 2),
        "rz": False,
        "rm": rest and x < 0,
        "rp": rest and x > 0,
    }[mode]
    found, greatest = (steps + bool(up)) * unit, (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** most
    if found > greatest:
        found = greatest if mode == "rz" or mode == ("rm" if x > 0 else "rp") else INF
    return float(found) if x > 0 else -float(found)


def edges(type, seed=0):
    """Numbers of a type at which something may go wrong, and some others."""
    draw = random.Random(f"{type} {seed}")
    if type == "pred":
        return [False, True]
    if type in FORMATS:
        found = [
            0.0,
            -0.0,
            1.0,
            -1.0,
            0.5,
            1.5,
            2.5,
            -2.5,
            3.0,
            126.7,
            -300.25,
            INF,
            -INF,
            NAN,
            2.0**-14,
            2.0**-24,
            1e-5,
            65504.0,
        ]
        if type != "f16":
            found += [
                2.0**-126,
                2.0**-133,
                -3e-39,
                3.3e38,
                2.0**31,
                1e10,
                65519.0,
                65520.0,
                1.0009765625,
                0.1,
                -7e-3,
                2.0**63,
            ]
        found += [draw.uniform(-4, 4) * 2.0 ** draw.randint(-8, 8) for _ in range(8)]
        if type == "f64":
            found += [1 + 2.0**-24, 1 + 2.0**-24 + 2.0**-50, 1e300, 1e-300, 2.0**-149, 2.0**-150]
        return [value_of(bits_of(x, type), type) for x in found]
    bits = BITS[type]
    found = [
        0,
        1,
        2,
        3,
        5,
        7,
        8,
        31,
        32,
        33,
        63,
        64,
        127,
        255,
        -1,
        -2,
        -7,
        1 << bits - 1,
        (1 << bits - 1) - 1,
        (1 << bits - 1) + 1,
    ]
    found += [draw.getrandbits(bits) for _ in range(6)]
    return [value_of(x & (1 << bits) - 1, type) for x in found]


def tuples(types, most=600):
    """Some hundred tuples of numbers of these types, edges above all."""
    lists = [edges(t, i) for i, t in enumerate(types)]
    if math.prod(map(len, lists)) <= most:
        found = [()]
        for values in lists:
            found = [(*t, v) for t in found for v in values]
        return found
    draw = random.Random(str(types))
    return [tuple(map(draw.choice, lists)) for _ in range(most)]


def run(body, arrays, *, threads=32, blocks=1, arguments=(), declarations="", shared_bytes=0):
    """Runs the instructions of `body` on NumPy arrays, in place: their addresses are in %rd0, %rd1, ..., the thread's number in %r0.

    Returns:
        the instructions' opcodes.
    """
    space = memory.Global()
    for a in arrays:
        space.add(a.ctypes.data, [a.nbytes], [1], 1, True)
    parameters = ",\n".join(
        [f".param .u64 p{i}" for i in range(len(arrays))] + [f".param .align 16 .b8 more[{len(a)}]" for a in arguments]
    )
    loads = "\n".join(f"ld.param.u64 %rd{i}, [p{i}];" for i in range(len(arrays)))
    text = f"""
.extern .shared .align 16 .b8 dynamic[];
.entry t(
{parameters}
)
{{
.reg .pred %p<20>; .reg .b16 %rs<20>; .reg .b32 %r<40>; .reg .f32 %f<20>; .reg .b64 %rd<40>; .reg .f64 %fd<20>;
{declarations}
{loads}
mov.u32 %r0, %tid.x;
{body}
ret;
}}
"""
    kernel = parse.kernels(text)["t"]
    given = tuple(a.ctypes.data.to_bytes(8, "little") for a in arrays) + tuple(arguments)
    machine.run(
        machine.Launch(kernel, (blocks, 1, 1), (threads, 1, 1), shared_bytes, given), machine.Program(kernel), space
    )
    return {i.opcode for i in kernel.instructions}


PLACES = {"pred": "%p", "f32": "%f", "f64": "%fd", 8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}


def place(type, number):
    return f"{PLACES.get(type) or PLACES[BITS[type]]}{number}"


def evaluate(opcode, types, to, inputs):
    """What an instruction makes of tuples of inputs, a thread for each; lists of Python numbers."""
    arrays, body = [], ["mov.u32 %r20, %ctaid.x;", "mad.lo.s32 %r20, %r20, 32, %r0;"]
    for i, type in enumerate([*types, to]):
        bytes = BITS[type] // 8
        values = [t[i] for t in inputs] if i < len(types) else []
        bits = np.zeros(-(-len(inputs) // 32) * 32, f"u{bytes}")
        bits[: len(values)] = [bits_of(v, type) for v in values]
        arrays.append(bits)
        body.append(f"mad.wide.u32 %rd{20 + i}, %r20, {bytes}, %rd{i};")
        if i == len(types):
            break
        name = place(type, i + 6)
        if type == "pred":
            body += [f"ld.global.u8 %rs19, [%rd{20 + i}];", f"setp.ne.s16 {name}, %rs19, 0;"]
        else:
            body.append(f"ld.global.{type if type in ('f32', 'f64') else f'u{8 * bytes}'} {name}, [%rd{20 + i}];")
    names = [place(t, i + 6) for i, t in enumerate(types)]

    result = place(to, 12)
    body.append(f"{opcode} {', '.join([result, *names])};")
    if to == "pred":
        body += [f"selp.u16 %rs19, 1, 0, {result};", f"st.global.u8 [%rd{20 + len(types)}], %rs19;"]
    else:
        stored = to if to in ("f32", "f64") else f"u{BITS[to]}"
        body.append(f"st.global.{stored} [%rd{20 + len(types)}], {result};")
    run("\n".join(body), arrays, blocks=len(arrays[0]) // 32)
    return [value_of(int(x), to) for x in arrays[-1][: len(inputs)]]
