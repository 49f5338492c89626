"""The table of opcodes that make a value of values: a pattern, and what it takes, gives and computes.

A modifier that no pattern lists makes the opcode unknown: nothing is ignored.
"""

import re

import numpy as np

from .numbers import flushed

RULES = []
INT, WORD, FLOAT = r"(?P<t>[su](16|32|64))", r"(?P<t>b(16|32|64))", r"(?P<ftz>\.ftz)?\.(?P<t>f32|f64)"


def rule(pattern):
    """For a function of the match that returns (type of the result, types of the operands, function of arrays of those types)."""

    def add(build):
        RULES.append((re.compile(pattern), build))
        return build

    return add


def find(opcode):
    """What the rule of this opcode returns; None where no rule knows it."""
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
            found = np.where(found > 0, np.minimum(found, found.dtype.type(1)), found.dtype.type(0))
        return flushed(found) if groups.get("ftz") else found

    plain = not (groups.get("ftz") or groups.get("sat"))
    return t, (t,) * count, function if plain else whole
