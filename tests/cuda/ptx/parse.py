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
INSTRUCTION = re.compile(r"(?:@(?P<negated>!?)(?P<guard>[\w%$]+)\s+)?(?P<opcode>[\w.:]+)\s*(?P<rest>.*)", re.S)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
LABEL = re.compile(r"([\w$]+):\s*")
COMMENT = re.compile(r"//[^\n]*")
BLANK = "{} \t\n"  # and braces of scopes
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
        found, renamed = [], {}
        for labels, statement, line in self._statements():
            self.labels |= dict.fromkeys(labels, len(found))
            if statement.startswith("."):
                self._declare(statement, renamed)
            elif statement:
                found.append(_instruction(statement, line, renamed))
        return found

    @cached_property
    def opcodes(self):
        """Of all instructions, without parsing more of them."""
        return {
            INSTRUCTION.match(statement)["opcode"]
            for _, statement, _ in self._statements()
            if statement[:1] not in ("", ".")
        }

    def _statements(self):
        """(labels before it, its text, the line it ends in)"""
        line = self.line
        for text in COMMENT.sub("", self.body).split(";"):
            line += text.count("\n")
            statement, labels = text.lstrip(BLANK), []
            while label := LABEL.match(statement):
                labels.append(label[1])
                statement = statement[label.end() :].lstrip(BLANK)
            yield labels, statement, line

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


def _operand(text, renamed):
    text = text.strip()
    if text.startswith("{"):
        return tuple(renamed.get(name.strip(), name.strip()) for name in text[1:-1].split(","))
    if text.startswith("["):
        if not (match := ADDRESS.fullmatch(text)):
            raise PtxError(f"the address {text} is not known")
        return Address(renamed.get(match[1], match[1]), int(match[2] or 0))
    if "|" in text:
        return tuple(renamed.get(name, name) for name in text.split("|"))
    if text.startswith("!"):
        return "!" + renamed.get(text[1:], text[1:])
    return renamed.get(text, text)


def _instruction(statement, line, renamed):
    match = INSTRUCTION.match(statement)
    guard = (renamed.get(match["guard"], match["guard"]), bool(match["negated"])) if match["guard"] else None
    operands = tuple(_operand(text, renamed) for text in OPERAND.findall(match["rest"]))
    return Instruction(match["opcode"], operands, guard, line, " ".join(statement.split()))


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
