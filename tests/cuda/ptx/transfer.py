"""Opcodes that move data: mov, ld, st, atom, and cp.async, whose target is NaN from the issue to the wait."""

import re

import numpy as np

from .memory import LOCAL, SHARED, Fault
from .numbers import TYPES, unsigned
from .parse import PtxError

TYPE = r"\.(?P<t>[bsu](8|16|32|64)|f32|f64)"
ORDER = r"(\.(volatile|weak|relaxed|acquire|release|acq_rel))?(\.(cta|gpu|sys))?"
CACHE = r"(\.(ca|cg|cs|cv|lu|wb|wt))?(\.L1::\w+)?(\.L2::\w+)*"
SPACE = r"(\.(?P<space>global|shared|local|param)(::\w+)?)?"
LOAD = re.compile(rf"ld{ORDER}{SPACE}(\.nc)?{CACHE}(\.v(?P<v>[24]))?{TYPE}")
STORE = re.compile(rf"st{ORDER}{SPACE}{CACHE}(\.v(?P<v>[24]))?{TYPE}")
ATOMIC = re.compile(rf"(?P<kind>atom|red){ORDER}{SPACE}\.(?P<op>add|min|max|and|or|xor|exch|cas|inc|dec){TYPE}")
MOVE = re.compile(r"mov\.(?P<t>[bsu](16|32|64)|f32|f64|pred)")
CONVERT_ADDRESS = re.compile(r"cvta(?P<to>\.to)?\.(?P<space>global|shared|local)\.u64")
COPY = re.compile(r"cp\.async\.(ca|cg)\.shared(::cta)?\.global(\.L2::\w+)*")
FENCE = re.compile(r"(membar\.(cta|gl|sys)|fence(\.(sc|acq_rel))?\.(cta|gpu|sys))")
WINDOWS = {"global": np.uint64(0), "shared": SHARED, "local": LOCAL}


def build(program, instruction):
    """A function of the state, or None where this is none of the opcodes here."""
    opcode = instruction.opcode
    for pattern, builder in (
        (LOAD, _load),
        (STORE, _store),
        (ATOMIC, _atomic),
        (MOVE, _move),
        (CONVERT_ADDRESS, _convert),
        (COPY, _copy),
    ):
        if match := pattern.fullmatch(opcode):
            return builder(program, match, *instruction.operands)
    if FENCE.fullmatch(opcode):
        return lambda s: None
    if opcode == "cp.async.commit_group":
        return _commit
    if opcode in ("cp.async.wait_group", "cp.async.wait_all"):
        pending = int(program.constant(instruction.operands[0], TYPES["u32"])[0]) if opcode.endswith("group") else 0
        return lambda s: _wait(s, pending, opcode.endswith("all"))
    return None


def parts_of(s, space, addresses):
    """The spaces that addresses lie in, with those that do: one, unless they are generic."""
    if space:
        yield space, addresses, slice(None)
        return
    window = addresses & ~np.uint64((1 << 60) - 1)
    for name, begin in WINDOWS.items():
        if (chosen := np.flatnonzero(window == begin)).size:
            yield name, addresses[chosen] - begin, chosen
            window[chosen] = 1
    if (window != 1).any():
        raise Fault(int((window != 1).argmax()), "an address of no space")


def load(s, space, addresses, bytes):
    found = np.empty(len(addresses), f"V{bytes}")
    for name, part, chosen in parts_of(s, space, addresses):
        found[chosen] = s.spaces[name].load(part, bytes, s.owners[name][s.lanes][chosen])
    return found


def store(s, space, addresses, values):
    for name, part, chosen in parts_of(s, space, addresses):
        s.spaces[name].store(part, values[chosen], s.owners[name][s.lanes][chosen])


def _load(program, match, target, source):
    targets = target if match["v"] else (target,)
    if len(targets) != int(match["v"] or 1):
        raise PtxError(f"{len(targets)} registers for {match['v']}")
    puts, at, type = [program.writer(t) for t in targets], program.address(source), TYPES[match["t"]]

    def step(s):
        found = load(s, match["space"], at(s), type.itemsize * len(puts)).view(type).reshape(-1, len(puts))
        for i, put in enumerate(puts):
            put(s, s.everywhere(found[:, i]))

    return step


def _store(program, match, target, source):
    sources = source if match["v"] else (source,)
    if len(sources) != int(match["v"] or 1):
        raise PtxError(f"{len(sources)} registers for {match['v']}")
    reads, at = [program.reader(x, match["t"]) for x in sources], program.address(target)

    def step(s):
        values = np.stack([s.here(read(s)) for read in reads], 1)
        store(s, match["space"], at(s), values.view(f"V{values.dtype.itemsize * len(reads)}")[:, 0])

    return step


def _move(program, match, target, source):
    type = match["t"]
    bytes = TYPES[type].itemsize
    if isinstance(source, tuple):  # together: the first is the lowest
        part = bytes // len(source)
        put, reads = program.writer(target), [program.reader(x, f"b{8 * part}") for x in source]

        def step(s):
            put(s, np.stack(np.broadcast_arrays(*[read(s) for read in reads]), 1).view(unsigned(bytes))[:, 0])

        return step
    read = program.reader(source, type)
    if isinstance(target, tuple):  # apart
        puts = [program.writer(t) for t in target]

        def step(s):
            found = np.ascontiguousarray(read(s))[:, None].view(unsigned(bytes // len(puts)))
            for i, put in enumerate(puts):
                put(s, found[:, i])

        return step
    put = program.writer(target)
    return lambda s: put(s, read(s))


def _convert(program, match, target, source):
    read, put, window = program.reader(source, "u64"), program.writer(target), WINDOWS[match["space"]]
    return lambda s: put(s, read(s) - window if match["to"] else read(s) + window)


# ---------------------------------------------------------------------------------------------------------------- atomics

CHANGE = {
    "add": lambda old, x: old + x, "min": min, "max": max, "and": lambda old, x: old & x, "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x, "exch": lambda old, x: x, "cas": lambda old, x, y: y if old == x else old,
    "inc": lambda old, x: old + old.dtype.type(1) if old < x else old.dtype.type(0),
    "dec": lambda old, x: old - old.dtype.type(1) if 0 < old <= x else x,
}  # fmt: skip


def _atomic(program, match, *operands):
    target, operands = (operands[0], operands[1:]) if match["kind"] == "atom" else ("_", operands)
    type, change = TYPES[match["t"]], CHANGE[match["op"]]
    put, at, reads = (
        program.writer(target),
        program.address(operands[0]),
        [program.reader(x, match["t"]) for x in operands[1:]],
    )

    def step(s):
        every, lanes, addresses, values = s.mask, s.lanes, at(s), [s.here(read(s)) for read in reads]
        before = np.empty(len(lanes), type)
        for i, lane in enumerate(lanes):  # one after the other
            s.lanes = np.array([lane])
            before[i] = load(s, match["space"], addresses[i : i + 1], type.itemsize).view(type)[0]
            after = np.array([change(before[i], *(v[i] for v in values))], type)
            store(s, match["space"], addresses[i : i + 1], after.view(f"V{type.itemsize}"))
        s.mask, s.lanes = every, lanes
        put(s, s.everywhere(before))

    return step


# --------------------------------------------------------------------------------------------------------------- cp.async
# What was read at the issue arrives at the wait, and not before.


def _copy(program, match, target, source, size, used=None):
    to, origin, bytes = program.address(target), program.address(source), int(program.constant(size, TYPES["u32"])[0])
    if bytes not in ((16,) if ".cg." in match[0] else (4, 8, 16)):
        raise PtxError(f"cp.async moves no {bytes} bytes")
    read = program.reader(used or size, "u32")

    def step(s):
        addresses, wanted = origin(s), s.here(read(s))
        if (wanted > bytes).any():
            raise Fault(int((wanted > bytes).argmax()), f"cp.async reads {wanted.max()} bytes for {bytes}")
        if (crooked := (wanted > 0) & (addresses % np.uint64(bytes) != 0)).any():
            raise Fault(int(crooked.argmax()), f"cp.async reads at an address that is no multiple of {bytes}")
        data = np.zeros((len(addresses), bytes), np.uint8)
        for count in set(wanted.tolist()) - {0}:
            for i in range(count):  # by bytes: any number of them may be wanted
                chosen = np.flatnonzero(wanted == count)
                data[chosen, i] = s.spaces["global"].load(addresses[chosen] + np.uint64(i), 1).view(np.uint8)
        places = to(s)
        s.spaces["shared"].store(
            places, np.full(len(places) * bytes, 0xFF, np.uint8).view(f"V{bytes}"), s.block[s.lanes]
        )
        s.copies.append((s.lanes, s.committed[s.lanes], places, data.view(f"V{bytes}")[:, 0]))

    return step


def _commit(s):
    s.committed[s.lanes] += 1


def _wait(s, pending, uncommitted):
    waits = np.zeros(s.n, bool)
    waits[s.lanes] = True
    left = []
    for lanes, group, places, data in s.copies:
        comes = waits[lanes] & ((group < s.committed[lanes] - pending) | uncommitted)
        if comes.any():
            s.spaces["shared"].store(places[comes], data[comes], s.block[lanes[comes]])
        if not comes.all():
            left.append((lanes[~comes], group[~comes], places[~comes], data[~comes]))
    s.copies = left
