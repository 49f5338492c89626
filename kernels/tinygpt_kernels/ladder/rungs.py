"""Which rungs there are, and what their files say of themselves."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .build import LADDER, LadderError

OPS = ("attention", "layer_norm")
_LAUNCHED = re.compile(r"TINYGPT_RUNG\(\s*(\w+)\s*,")
_ARGUMENTS = {"Attention": "attention", "LayerNorm": "layer_norm"}


@dataclass(frozen=True)
class Rung:
    """One file.

    title, idea: its comment's first line, "name: what it changes". why: the paragraphs after it.
    lower: the counts that it says are lower than the rung's before.
    """

    op: str
    path: Path
    title: str
    idea: str
    why: str
    lower: tuple[str, ...]


def rungs(op: str) -> tuple[Rung, ...]:
    """The rungs of an op that come with the project, from the ground up."""
    return tuple(read(path) for path in sorted(LADDER.glob(f"{op}_[0-9]_*.cu")))


def read(path: Path) -> Rung:
    """What a file says of itself; a file of one's own need say nothing but TINYGPT_RUNG.

    Raises:
        LadderError: it cannot be read, or is no rung.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise LadderError(f"{path} cannot be read: {error}") from None
    found = _LAUNCHED.search(text)
    if found is None or found[1] not in _ARGUMENTS:
        raise LadderError(
            f"{path} is no rung: it must end with TINYGPT_RUNG(Attention, function) or TINYGPT_RUNG(LayerNorm, function); "
            f"{LADDER / 'ladder.h'} says what the function is given, and a copy of a file beside it is a start"
        )
    comment = []
    for line in text.splitlines():
        if not line.startswith("//"):
            break
        comment.append(line[2:].strip())
    head, _, idea = (comment[0] if comment else path.stem).partition(": ")
    said = [line for line in comment[1:] if line.startswith("Lower: ")]
    why = "\n".join(line for line in comment[1:] if line not in said).strip()
    lower = tuple(said[0].removeprefix("Lower: ").split(", ")) if said else ()
    return Rung(_ARGUMENTS[found[1]], path, head.removeprefix("layer norm, "), idea.rstrip("."), why, lower)
