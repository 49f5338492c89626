"""Who runs when. All blocks of a launch go abreast, and a register is an array over their threads, or of one element for all.

Each thread has a program counter. Those that stand furthest back run, up to the next label or branch: so threads that a branch parted
meet again where the ways meet. A barrier holds a thread until all that live in its block have come to one.
"""

from dataclasses import dataclass

import numpy as np

from . import choices, floats, integers, rules, transfer, warp  # noqa: F401 (the rules of the first three)
from .memory import Fault, Region, owned
from .numbers import TYPES, unsigned
from .parse import Address, PtxError

WARP = 32
MOST_THREADS = 8192  # abreast; more blocks than that run one lot after the other
MOST_STEPS = 100_000  # of straight-line code: more is taken for a loop without end
SPECIAL = {f"{name}.{d}" for name in ("tid", "ntid", "ctaid", "nctaid") for d in "xyz"} | {"laneid", "warpid"}
SPECIAL |= {f"lanemask_{name}" for name in ("eq", "lt", "le", "gt", "ge")}


@dataclass(frozen=True)
class Launch:
    kernel: object  # parse.Kernel
    grid: tuple
    block: tuple
    shared_bytes: int
    arguments: tuple  # of bytes


class Threads:
    """The state of some blocks. `mask` tells which threads take part in the instruction at hand; None: all."""

    def __init__(self, launch, program, blocks, memory):
        self.kernel = launch.kernel
        self.threads = int(np.prod(launch.block))
        self.pitch = self.threads + -self.threads % WARP  # numbers past the last thread stay dead
        self.blocks, self.n = len(blocks), len(blocks) * self.pitch
        within, self.block = np.arange(self.n) % self.pitch, np.arange(self.n) // self.pitch
        self.within, self.numbers = within, np.asarray(blocks)[self.block]
        self.r = [
            np.zeros(1, t) if t.kind == "b" else np.full(8, 0xFF, np.uint8).view(t)[:1]  # nobody has written it
            for t in program.types
        ]
        self.special = {"laneid": within % WARP, "warpid": within // WARP}
        x, y, _ = launch.block
        gx, gy, _ = launch.grid
        thread = within % x, within // x % y, within // (x * y)
        block = self.numbers % gx, self.numbers // gx % gy, self.numbers // (gx * gy)
        for i, d in enumerate("xyz"):
            self.special |= {f"tid.{d}": thread[i], f"ntid.{d}": np.array([launch.block[i]])}
            self.special |= {f"ctaid.{d}": block[i], f"nctaid.{d}": np.array([launch.grid[i]])}
        one = np.uint64(1) << (within % WARP).astype(np.uint64)
        full, one_more = np.uint64(0xFFFFFFFF), one << np.uint64(1)
        self.special |= {"lanemask_eq": one, "lanemask_lt": one - np.uint64(1), "lanemask_le": one_more - np.uint64(1),
                         "lanemask_gt": full & ~(one_more - np.uint64(1)), "lanemask_ge": full & ~(one - np.uint64(1))}  # fmt: skip
        self.special = {name: value.astype(np.uint32) for name, value in self.special.items()}
        self.mask, self.lanes = None, np.arange(self.n)
        shared, _ = owned([a for a in self.kernel.arrays if a.space == "shared"], self.blocks, launch.shared_bytes)
        local, _ = owned([a for a in self.kernel.arrays if a.space == "local"], self.n)
        self.spaces = {
            "global": memory,
            "shared": shared,
            "local": local,
            "param": program.parameters(launch.arguments),
        }
        self.owners = {
            "global": np.zeros(self.n, int),
            "shared": self.block,
            "local": np.arange(self.n),
            "param": np.zeros(self.n, int),
        }
        self.copies, self.committed = [], np.zeros(self.n, int)

    def attend(self, mask):
        """From now on these threads take part."""
        self.mask = None if mask.all() else mask
        self.lanes = np.flatnonzero(mask)

    def here(self, values):
        """Of one value for all or one for each thread: those of the threads that take part."""
        if len(values) == 1:
            return values.repeat(len(self.lanes))
        return values if self.mask is None else values[self.lanes]

    def everywhere(self, values):
        """The opposite of `here`; what the others get does not matter."""
        if self.mask is None:
            return values
        found = np.zeros((self.n, *values.shape[1:]), values.dtype)
        found[self.lanes] = values
        return found


class Program:
    """A kernel's instructions as Python functions of `Threads`."""

    def __init__(self, kernel):
        self.kernel = kernel
        code = kernel.instructions
        self.slots = {name: i for i, name in enumerate(kernel.registers)}
        self.types = [TYPES[type] for type in kernel.registers.values()]
        self.symbols = {name: offset for name, offset, _ in kernel.parameters}
        for space in ("shared", "local"):
            self.symbols |= owned([a for a in kernel.arrays if a.space == space], 1)[1]
        self.starts = {*kernel.labels.values()} | {
            i + 1 for i, c in enumerate(code) if c.opcode.split(".")[0] in CONTROL
        }
        self.steps = [None] * len(code)

    def parameters(self, arguments):
        sizes = [bytes for *_, bytes in self.kernel.parameters]
        if sizes != [len(a) for a in arguments]:
            raise PtxError(
                f"{self.kernel.name} takes parameters of {sizes} bytes, and the launch gave {[len(a) for a in arguments]}"
            )
        length = max((offset + bytes for _, offset, bytes in self.kernel.parameters), default=0)
        data = np.zeros(length + -length % 16, np.uint8)
        for (_, offset, bytes), given in zip(self.kernel.parameters, arguments, strict=True):
            data[offset : offset + bytes] = np.frombuffer(given, np.uint8)
        return Region(0, data, np.ones(len(data), bool), np.zeros(len(data), bool))

    # ---- operands

    def reader(self, operand, type):
        """A function of the state that gives an operand as an array of `type`."""
        type = TYPES[type]
        if operand[0] == "!":
            inner = self.reader(operand[1:], "pred")
            return lambda s: ~inner(s)
        if operand in self.slots:
            slot, own = self.slots[operand], self.types[self.slots[operand]]
            if own == type:
                return lambda s: s.r[slot]
            if own.itemsize == type.itemsize:
                return lambda s: s.r[slot].view(type)
            if own.itemsize < type.itemsize:
                raise PtxError(f"{operand} has {own.itemsize} bytes, not {type.itemsize}")
            return lambda s: s.r[slot].view(unsigned(own.itemsize)).astype(unsigned(type.itemsize)).view(type)
        if operand[0] == "%" and operand[1:] in SPECIAL:
            return lambda s: s.special[operand[1:]].view(type)
        value = self.constant(operand, type)
        return lambda s: value

    def constant(self, operand, type):
        if operand in self.symbols:
            return np.array([self.symbols[operand]], type)
        if operand[:2] in ("0f", "0F", "0d", "0D"):
            return np.array([int(operand[2:], 16)], unsigned(type.itemsize)).view(type)
        try:
            bits = int(operand.rstrip("U"), 0) & (1 << 8 * type.itemsize) - 1
        except ValueError:
            raise PtxError(f"`{operand}` is not known") from None
        return np.array([bits], unsigned(type.itemsize)).view(type) if type.kind != "b" else np.array([bits != 0])

    def writer(self, operand):
        """A function (state, values) that sets a register of the threads that take part."""
        if operand == "_":
            return lambda s, values: None
        if operand not in self.slots:
            raise PtxError(f"`{operand}` is no register")
        slot, own = self.slots[operand], self.types[self.slots[operand]]

        def write(s, values):
            if values.dtype != own:
                if values.dtype.itemsize == own.itemsize:
                    values = values.view(own)
                elif values.dtype.itemsize < own.itemsize:  # extended by its sign, or zeros
                    values = values.view(unsigned(values.dtype.itemsize)) if values.dtype.kind == "f" else values
                    values = values.astype(unsigned(own.itemsize)).view(own)
                else:
                    raise PtxError(f"{operand} has {own.itemsize} bytes, not {values.dtype.itemsize}")
            s.r[slot] = values if s.mask is None else np.where(s.mask, values, s.r[slot])

        return write

    def address(self, operand):
        """A function of the state that gives the addresses of the threads that take part, as uint64."""
        if not isinstance(operand, Address):
            raise PtxError(f"`{operand}` is no address")
        offset = np.uint64(operand.offset & (1 << 64) - 1)
        if operand.base in self.slots:
            read = self.reader(operand.base, f"u{8 * self.types[self.slots[operand.base]].itemsize}")
        else:
            read = self.reader(operand.base, "u64")
        return lambda s: s.here(read(s)).astype(np.uint64) + offset

    # ---- instructions

    def step(self, number):
        if self.steps[number] is None:
            instruction = self.kernel.instructions[number]
            try:
                self.steps[number] = self._guarded(instruction, self._build(instruction))
            except (PtxError, ValueError, TypeError, IndexError) as error:
                raise PtxError(f"{self.where(number)}: {error}") from None
        return self.steps[number]

    def where(self, number):
        instruction = self.kernel.instructions[number]
        return f"line {instruction.line} of the PTX: `{instruction.text}`"

    def _build(self, instruction):
        for build in (transfer.build, warp.build):
            if step := build(self, instruction):
                return step
        if not (found := rules.find(instruction.opcode)):
            raise PtxError(f"the opcode {instruction.opcode} is not known")
        to, types, function = found
        target, *sources = instruction.operands
        put = self.writer(target if isinstance(target, str) else target[0])
        read = [self.reader(operand, type) for operand, type in zip(sources, types, strict=True)]
        if isinstance(target, tuple):  # setp.lt p|q: the second is the opposite
            first, second = put, self.writer(target[1])

            def both(s):
                found = function(*[r(s) for r in read])
                first(s, found)
                second(s, ~found)

            return both
        expected = TYPES[to]

        def step(s):
            found = function(*[r(s) for r in read])
            put(s, found if found.dtype == expected else found.view(expected))

        return step

    def _guarded(self, instruction, step):
        if instruction.guard is None:
            return step
        holds = self.reader(("!" if instruction.guard[1] else "") + instruction.guard[0], "pred")

        def guarded(s):
            mask, lanes = s.mask, s.lanes
            chosen = np.broadcast_to(holds(s), s.n) & (True if mask is None else mask)
            if chosen.any():
                s.attend(chosen)
                step(s)
                s.mask, s.lanes = mask, lanes

        return guarded


CONTROL = ("bra", "ret", "exit", "bar", "barrier", "trap")


def run(launch, program, memory):
    """Runs a launch on `memory`, a `Global`.

    Raises:
        PtxError: what a kernel does wrong, with block, thread and line, or an opcode that is not known.
    """
    pitch = int(np.prod(launch.block)) + WARP - 1
    numbers = np.arange(int(np.prod(launch.grid)))
    lot = max(1, MOST_THREADS // pitch)
    with np.errstate(all="ignore"):
        for first in range(0, len(numbers), lot):
            _run(Threads(launch, program, numbers[first : first + lot], memory), program, launch)


def _run(s, program, launch):
    code, labels, end = launch.kernel.instructions, launch.kernel.labels, len(launch.kernel.instructions)
    at = np.where(s.within < s.threads, 0, end)  # of each thread
    held = np.zeros(s.n, bool)
    number = 0

    def told(lane, text):
        x, y, _ = launch.grid
        block = int(s.numbers[lane])
        who = f"block ({block % x}, {block // x % y}, {block // (x * y)}), thread {int(s.within[lane])}"
        return f"{who}: {program.where(number)}: {text}"

    for _ in range(MOST_STEPS):
        ready = ~held & (at < end)
        if not ready.any():
            if not held.any():
                break
            held[:] = False  # whoever lives waits: all blocks are complete
            continue
        number = int(at[ready].min())
        s.attend(ready & (at == number))
        try:
            while code[number].opcode.split(".")[0] not in CONTROL:
                program.step(number)(s)
                number += 1
                if number in program.starts or number == end:
                    at[s.lanes] = number
                    break
            else:
                _control(s, program, code[number], labels, number, end, at, held)
        except Fault as fault:
            raise PtxError(told(s.lanes[min(fault.which, len(s.lanes) - 1)], str(fault))) from None
    else:
        raise PtxError(told(int(np.flatnonzero(at < end)[0]), "runs on and on"))
    if s.copies:
        raise PtxError(told(s.copies[0][0][0], "the kernel ends with a cp.async that it never waited for"))


def _control(s, program, instruction, labels, number, end, at, held):
    kind, taken = instruction.opcode.split(".")[0], s.lanes
    if instruction.guard:
        holds = np.broadcast_to(program.reader(instruction.guard[0], "pred")(s), s.n)[taken]
        taken = taken[holds != instruction.guard[1]]
    at[s.lanes] = number + 1
    if kind == "bra":
        at[taken] = labels[instruction.operands[0]]
    elif kind in ("ret", "exit"):
        at[taken] = end
    elif instruction.opcode in BARRIERS:
        held[taken] = True
    elif instruction.opcode == "bar.warp.sync":
        s.attend(np.isin(np.arange(s.n), taken))
        warp.meet(s, program.reader(instruction.operands[0], "u32"))
    elif kind == "trap":
        raise Fault(0, "traps")
    else:
        raise PtxError(f"{program.where(number)}: the opcode {instruction.opcode} is not known")


BARRIERS = ("bar.sync", "barrier.sync", "barrier.cta.sync")
