"""Opcodes of a whole warp. Their lanes must stand at the same instruction together: who parted and has not met again is a fault."""

import re

import numpy as np

from .memory import Fault
from .numbers import TYPES, bfloat_to_float
from .parse import PtxError

WARP = 32
LANES = np.arange(WARP)
SHUFFLE = re.compile(r"shfl\.sync\.(?P<mode>idx|up|down|bfly)\.b32")
VOTE = re.compile(r"vote\.sync\.(?P<op>all|any|uni|ballot)\.(?P<t>pred|b32)")
REDUCE = re.compile(r"redux\.sync\.(?P<op>add|min|max|and|or|xor)\.(?P<t>[bsu]32)")
MATRICES = re.compile(r"ldmatrix\.sync\.aligned\.m8n8\.x(?P<n>[24])(?P<trans>\.trans)?\.shared(::cta)?\.b16")
PRODUCT = re.compile(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(?P<t>bf16|f16)\.(?P=t)\.f32")


def build(program, instruction):
    """A function of the state, or None where this is none of the opcodes here."""
    for pattern, builder in (
        (SHUFFLE, _shuffle),
        (VOTE, _vote),
        (REDUCE, _reduce),
        (MATRICES, _matrices),
        (PRODUCT, _product),
    ):
        if match := pattern.fullmatch(instruction.opcode):
            return builder(program, match, *instruction.operands)
    if instruction.opcode == "activemask.b32":
        put = program.writer(instruction.operands[0])
        return lambda s: put(s, ballot(s, np.ones(s.n, bool)))
    return None


def taking_part(s):
    """[warps, lanes] of bool."""
    found = np.zeros(s.n, bool)
    found[s.lanes] = True
    return found.reshape(-1, WARP)


def meet(s, mask):
    """Insists that every lane of each one's mask is here, and itself in it.

    Returns:
        the masks, as [warps, lanes, lanes] of bool: who is in the mask of whom.
    """
    here = taking_part(s)
    named = (np.broadcast_to(mask(s), s.n).reshape(-1, WARP, 1) >> LANES.astype(np.uint32) & np.uint32(1)).astype(bool)
    exist = (s.within < s.threads).reshape(-1, 1, WARP)
    named &= exist
    itself = named[:, LANES, LANES]
    if (wrong := here & ~itself).any():
        raise Fault(_number(s, wrong), "its lane is not in the mask")
    if (wrong := here & (named & ~here[:, None]).any(2)).any():
        raise Fault(_number(s, wrong), "lanes of the mask are elsewhere, or have exited")
    return named


def whole(s):
    """An index of the warps that take part, with all their lanes."""
    if s.mask is None:
        return slice(None)
    here = taking_part(s)
    some, every = here.any(1), here.all(1)
    if (some & ~every).any():
        raise Fault(_number(s, here & (some & ~every)[:, None]), "not all 32 lanes of its warp are here")
    return np.flatnonzero(every)


def _number(s, wrong):
    return int(np.searchsorted(s.lanes, np.flatnonzero(wrong.ravel())[0]))


def by_warps(s, values):
    return (values if len(values) == s.n else values.repeat(s.n)).reshape(-1, WARP)


# ------------------------------------------------------------------------------------------------- shuffles and votes


def _shuffle(program, match, target, value, lane, clamp, mask):
    targets = target if isinstance(target, tuple) else (target, "_")
    put, tell = map(program.writer, targets)
    read, by, limits, mask = (program.reader(x, "b32") for x in (value, lane, clamp, mask))

    def step(s):
        named = meet(s, mask)
        shift, both = by_warps(s, by(s)).astype(int) & 31, by_warps(s, limits(s)).astype(int)
        segment, bound = both >> 8 & 31, both & 31
        low, high = LANES & segment, (LANES & segment) | (bound & ~segment)
        mode = match["mode"]
        source = {"idx": low | (shift & ~segment), "up": LANES - shift, "down": LANES + shift, "bfly": LANES ^ shift}[
            mode
        ]
        inside = source >= high if mode == "up" else source <= high
        source = np.where(inside, source, LANES)
        if (wrong := taking_part(s) & ~np.take_along_axis(named, source[..., None], 2)[..., 0]).any():
            raise Fault(_number(s, wrong), "takes the value of a lane that is not in the mask")
        put(s, np.take_along_axis(by_warps(s, read(s)), source, 1).ravel())
        tell(s, inside.ravel())

    return step


def ballot(s, values):
    votes = (by_warps(s, values) & taking_part(s)) @ (1 << LANES)
    return votes.astype(np.uint32).repeat(WARP)


def _vote(program, match, target, value, mask):
    if (match["op"] == "ballot") != (match["t"] == "b32"):
        raise PtxError(f"the opcode {match[0]} is not known")
    put, read, mask = program.writer(target), program.reader(value, "pred"), program.reader(mask, "b32")

    def step(s):
        named, votes = meet(s, mask), by_warps(s, read(s))[:, None]
        some, every = (named & votes).any(2), ~(named & ~votes).any(2)
        found = {"any": some, "all": every, "uni": every | ~some, "ballot": (named & votes) @ (1 << LANES)}[match["op"]]
        put(s, found.astype(TYPES[match["t"]]).ravel())

    return step


def _reduce(program, match, target, value, mask):
    function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                "xor": np.bitwise_xor}[match["op"]]  # fmt: skip
    put, read, mask = program.writer(target), program.reader(value, match["t"]), program.reader(mask, "b32")

    def step(s):
        named, values = meet(s, mask), by_warps(s, read(s))
        found = [
            [function.reduce(v[m]) if m.any() else 0 for m in masks] for v, masks in zip(values, named, strict=True)
        ]
        put(s, np.array(found, TYPES[match["t"]]).ravel())

    return step


# ---------------------------------------------------------------------------------------------------------- matrices
# Fragments as the manual has them, with group = lane / 4 and member = lane % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16").

GROUP, MEMBER = LANES >> 2, LANES & 3


def _matrices(program, match, targets, source):
    count = int(match["n"])
    if len(targets) != count:
        raise PtxError(f"{len(targets)} registers for {count} matrices")
    puts, at = [program.writer(t) for t in targets], program.address(source)

    def step(s):
        warps = whole(s)
        addresses = at(s).reshape(-1, WARP)
        owners = s.block.reshape(-1, WARP)[warps]
        # Lanes 8 m to 8 m + 7 give the rows of matrix m; those of other lanes do not count.
        rows = s.spaces["shared"].load(addresses[:, : 8 * count].ravel(), 16, owners[:, : 8 * count].ravel())
        elements = rows.view(np.uint16).reshape(-1, count, 8, 8)
        if match["trans"]:
            elements = elements.swapaxes(2, 3)
        for m, put in enumerate(puts):
            pairs = np.stack([elements[:, m, GROUP, 2 * MEMBER], elements[:, m, GROUP, 2 * MEMBER + 1]], -1)
            put(s, s.everywhere(np.ascontiguousarray(pairs).view(np.uint32).ravel()))

    return step


def _product(program, match, d, a, b, c):
    """d = a b + c, the sum of the products in float32."""
    if (len(d), len(a), len(b), len(c)) != (4, 4, 2, 4):
        raise PtxError("a fragment has another number of registers")
    puts = [program.writer(x) for x in d]
    read_a, read_b = ([program.reader(x, "b32") for x in fragment] for fragment in (a, b))
    read_c = [program.reader(x, "f32") for x in c]

    def matrices(s, warps, reads, shape, rows, columns):
        """[warps, *shape]; rows and columns are those of [registers, lanes, 2]: the first of two is in the lower half."""
        halves = np.stack([by_warps(s, read(s))[warps] for read in reads], 1)[..., None].view(np.uint16)
        found = np.empty((len(halves), *shape), np.float32)
        found[:, rows, columns] = bfloat_to_float(halves) if match["t"] == "bf16" else halves.view(np.float16)
        return found

    group, member, two = GROUP[:, None], MEMBER[:, None], np.arange(2)
    four, pair = np.arange(4)[:, None, None], np.arange(2)[:, None, None]
    place_a = group + four % 2 * 8 + 0 * two, 2 * member + two + four // 2 * 8
    place_b = 2 * member + two + pair * 8, group + 0 * pair + 0 * two

    def step(s):
        warps = whole(s)
        product = matrices(s, warps, read_a, (16, 16), *place_a) @ matrices(s, warps, read_b, (16, 8), *place_b)
        found = [
            product[:, GROUP + i // 2 * 8, MEMBER * 2 + i % 2] + by_warps(s, read(s))[warps]
            for i, read in enumerate(read_c)
        ]
        for put, sums in zip(puts, found, strict=True):  # only now: a register may be in c and d
            put(s, s.everywhere(sums.ravel()))

    return step
