"""PTX as text: which kernels a module holds, and the instructions of one."""

import re
from dataclasses import dataclass, field
from functools import cached_property

ENTRY = re.compile(
    r"\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)(?P<options>[^{;]*)\n\{\n(?P<body>.*?)\n\}\n", re.S
)
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?")
ARRAY = re.compile(r"\.(shared|local)\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)\[(\d*)\]")
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)
ADDRESS = re.compile(r"\[\s*([\w$%.]+)\s*(?:\+\s*(-?\d+))?\s*\]")
SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}


class PtxError(RuntimeError):
    """What no GPU would do, or what this interpreter does not know."""


@dataclass(frozen=True)
class Address:
    base: str
    offset: int


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple  # of names and literals, Addresses, and tuples of names for vectors
    guard: tuple | None  # (predicate, whether it is negated)
    line: int
    text: str


@dataclass
class Array:
    space: str
    name: str
    align: int
    bytes: int | None  # None: as much as the launch gives


def size_of(type):
    return SIZES[re.sub(r"\D", "", type)]


@dataclass(eq=False)
class Kernel:
    """One `.entry`, parsed when it is first asked for its instructions."""

    name: str
    parameters: list  # (name, offset, bytes)
    body: str
    line: int
    shared: list  # arrays of the whole module
    registers: dict = field(default_factory=dict)  # name -> type
    arrays: list = field(default_factory=list)
    labels: dict = field(default_factory=dict)  # name -> number of the next instruction

    @cached_property
    def instructions(self):
        self.arrays = list(self.shared)
        found, renamed, line, start = [], {}, self.line, 0
        for end in re.finditer(";", self.body):
            statement = self.body[start : end.start()]
            line += statement.count("\n")
            start = end.end()
            statement = re.sub(r"//[^\n]*", "", statement).lstrip("{} \t\n")
            while label := re.match(r"([\w$]+):\s*", statement):
                self.labels[label[1]] = len(found)
                statement = statement[label.end() :].lstrip("{} \t\n")
            if not statement:
                continue
            if statement[0] == ".":
                self._declare(statement, renamed)
            else:
                found.append(_instruction(statement, line, renamed))
        return found

    def _declare(self, statement, renamed):
        if match := REGISTERS.match(statement):
            type, names = match.groups()
            for name in re.split(r"[,\s]+", names.strip()):
                many = re.fullmatch(r"(.*)<(\d+)>", name)
                for single in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                    # The assembly of a function that is inlined twice declares its registers twice, in scopes of its own.
                    unique = single if single not in self.registers else f"{single}'{len(self.registers)}"
                    renamed[single] = unique
                    self.registers[unique] = type
        elif match := ARRAY.match(statement):
            self.arrays.append(_array(match))
        elif not statement.startswith(".pragma"):
            raise PtxError(f"{self.name}: the directive `{statement}` is not known")


def _array(match):
    space, align, type, name, count = match.groups()
    return Array(space, name, int(align), int(count) * size_of(type) if count else None)


def _operands(text, renamed):
    parts, depth, word = [], 0, ""
    for c in text:
        depth += (c in "{[") - (c in "}]")
        if c == "," and not depth:
            parts.append(word.strip())
            word = ""
        else:
            word += c
    parts.append(word.strip())
    for part in parts:
        if part.startswith("{"):
            yield tuple(renamed.get(name.strip(), name.strip()) for name in part[1:-1].split(","))
        elif match := ADDRESS.fullmatch(part):
            yield Address(renamed.get(match[1], match[1]), int(match[2] or 0))
        elif "|" in part:
            yield tuple(renamed.get(name, name) for name in part.split("|"))
        elif part.startswith("!"):
            yield "!" + renamed.get(part[1:], part[1:])
        else:
            yield renamed.get(part, part)


def _instruction(statement, line, renamed):
    match = re.match(r"(?:@(!?)([\w%$]+)\s+)?([\w.:]+)\s*(.*)", statement, re.S)
    negated, predicate, opcode, rest = match.groups()
    guard = (renamed.get(predicate, predicate), bool(negated)) if predicate else None
    text = " ".join(statement.split())
    return Instruction(opcode, tuple(_operands(rest, renamed)) if rest else (), guard, line, text)


def kernels(text):
    """The kernels of a module of PTX, by name."""
    outside = ENTRY.sub("", text)
    shared = [_array(match) for match in ARRAY.finditer(outside)]
    found = {}
    for match in ENTRY.finditer(text):
        parameters, used = [], 0
        for align, type, name, count in PARAMETER.findall(match["parameters"]):
            bytes = size_of(type) * int(count or 1)
            used += -used % int(align or bytes)
            parameters.append((name, used, bytes))
            used += bytes
        line = text.count("\n", 0, match.start("body")) + 1
        found[match["name"]] = Kernel(match["name"], parameters, match["body"], line, shared)
    return found
