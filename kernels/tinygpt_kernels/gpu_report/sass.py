"""Reading NVIDIA machine code (SASS) as nvdisasm prints it: loops, tensor-core work, how memory is reached, what fits an SM.

A *unit* is one m16n8k16 product, 4096 floating-point operations of a warp: other instructions per unit say how much a tensor
core is made to wait. Thread-instructions per byte of device memory say the same of kernels that only move memory: an A100
issues 9.6 per byte it can move, an H100 8.9, so a kernel well below has its bandwidth to itself.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

UNIT = 4096  # FLOP of one m16n8k16 product, per warp

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)\s*(.*?);")
_LABEL = re.compile(r"^(\.L_\w+):")
_MMA = ("HMMA", "IMMA", "QMMA", "DMMA")
_MMA_FLOP = {"16816": 4096, "1688": 2048, "1684": 1024, "884": 512, "16832": 8192, "16864": 16384}
_BYTES = {"8": 1, "U8": 1, "S8": 1, "16": 2, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@dataclass(frozen=True)
class Instruction:
    """One instruction: opcode with its modifiers, `LDG.E.128`, and its operands."""

    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def tensor_core(self) -> bool:
        """Whether a tensor core executes it."""
        return (
            self.name in _MMA
            or self.name.endswith("GMMA")
            or (self.name.startswith("UTC") and self.name.endswith("MMA"))
        )

    @property
    def flop(self) -> int:
        """Floating-point operations of a tensor-core instruction per warp, else 0; 0 too for sm_100's, whose code names no shape."""
        if self.name in ("HGMMA", "IGMMA", "QGMMA"):
            m, n, k = map(int, re.findall(r"(\d+)x(\d+)x(\d+)", self.opcode)[0])
            return 2 * m * n * k // 4  # four warps share one
        if self.name in _MMA:
            shape = re.search(r"\.(\d{3,5})(?:\.|$)", self.opcode)
            return _MMA_FLOP.get(shape[1], UNIT) if shape else UNIT
        return 0

    @property
    def width(self) -> int:
        """Bytes a thread moves."""
        found = [_BYTES[part] for part in self.opcode.split(".")[1:] if part in _BYTES]
        return found[-1] if found else 4


@dataclass(frozen=True)
class Section:
    """A stretch of code: a loop's body, or a whole kernel."""

    instructions: tuple[Instruction, ...]

    @property
    def issued(self) -> int:
        return sum(i.name != "NOP" for i in self.instructions)

    @property
    def opcodes(self) -> Counter[str]:
        return Counter(i.name for i in self.instructions)

    @property
    def flop(self) -> int:
        return sum(i.flop for i in self.instructions)

    @property
    def non_mma_per_unit(self) -> float | None:
        """Instructions other than tensor-core ones, per unit; None where there is no tensor-core work."""
        if not self.flop:
            return None
        return sum(i.name != "NOP" and not i.flop for i in self.instructions) / (self.flop / UNIT)

    def _accesses(self) -> list[int]:
        return [i.width for i in self.instructions if i.name in ("LDG", "STG", "LDGSTS")]

    @property
    def memory_bytes(self) -> int:
        """Bytes of device memory that a thread reaches for, without tensor descriptors (those move on their own)."""
        return sum(self._accesses())

    @property
    def wide_share(self) -> float | None:
        """Share of those bytes in accesses of 128 bits or more."""
        total = self.memory_bytes
        return sum(w for w in self._accesses() if w >= 16) / total if total else None

    @property
    def per_byte(self) -> float | None:
        """Thread-instructions per byte of device memory."""
        return self.issued / self.memory_bytes if self.memory_bytes else None


@dataclass(frozen=True)
class Code:
    """A kernel's machine code and its innermost loops; where none of these does tensor-core work, the innermost that do, too."""

    whole: Section
    loops: tuple[Section, ...]

    @property
    def busiest(self) -> Section:
        """The loop that reaches for most of the memory; the whole kernel where no loop does."""
        return max((s for s in self.loops if s.memory_bytes), key=lambda s: s.memory_bytes, default=self.whole)

    @property
    def tensor_core(self) -> dict[str, int]:
        """Tensor-core instructions with their shapes."""
        shaped = (".".join(i.opcode.split(".")[:2]) for i in self.whole.instructions if i.tensor_core)
        return dict(Counter(shaped))

    @property
    def descriptors(self) -> bool:
        """Whether tiles are moved by tensor descriptors (TMA)."""
        return any(i.name.startswith("UTMA") for i in self.whole.instructions)


def parse(text: str) -> Code:
    """The code in nvdisasm's output `nvdisasm -c`."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(Instruction(found[1], found[2]))
    ends: dict[int, int] = {}
    for i, instruction in enumerate(instructions):
        if instruction.name in ("BRA", "BRX", "JMP"):
            for label_name in re.findall(r"\.L_\w+", instruction.operands):
                start = labels.get(label_name, i)
                if start < i:  # start == i is the trap behind the last instruction
                    ends[start] = max(i, ends.get(start, i))
    spans = {span: Section(tuple(instructions[span[0] : span[1] + 1])) for span in sorted(ends.items())}

    def within(outer: tuple[int, int]) -> Iterator[Section]:
        return (s for span, s in spans.items() if span != outer and outer[0] <= span[0] and span[1] <= outer[1])

    loops = tuple(s for span, s in spans.items() if not any(within(span)))
    if not any(s.flop for s in loops):  # the loop of the tensor cores holds a small one of another kind
        loops += tuple(s for span, s in spans.items() if s.flop and not any(other.flop for other in within(span)))
    return Code(Section(tuple(instructions)), loops)


@dataclass(frozen=True)
class Limits:
    """What a streaming multiprocessor has: registers, bytes of shared memory and what a block reserves, warps, blocks."""

    registers: int
    shared: int
    reserved: int
    warps: int
    blocks: int


LIMITS = {
    80: Limits(65536, 164 << 10, 1024, 64, 32), 86: Limits(65536, 100 << 10, 1024, 48, 16),
    89: Limits(65536, 100 << 10, 1024, 48, 24), 90: Limits(65536, 228 << 10, 1024, 64, 32),
    100: Limits(65536, 228 << 10, 1024, 64, 32), 120: Limits(65536, 100 << 10, 1024, 48, 24),
}  # fmt: skip


def resident_warps(arch: int, registers: int, shared: int, warps: int) -> tuple[int, str]:
    """(warps of such blocks that one SM holds, what keeps it from holding more)."""
    has = LIMITS[arch]
    per_warp = math.ceil(registers * 32 / 256) * 256
    fits = {
        "registers": (has.registers // 4 // per_warp) * 4 // warps,  # a quarter of them belongs to each scheduler
        "shared memory": has.shared // (math.ceil((shared + has.reserved) / 128) * 128),
        "warps": has.warps // warps,
        "blocks": has.blocks,
    }
    limit = min(fits, key=lambda name: fits[name])
    return fits[limit] * warps, limit
