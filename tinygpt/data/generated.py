"""Records that are made up: what an encoder-decoder or an encoder can learn in a minute. Each yields distinct inputs, shuffled.

`random.Random.random` gives the same numbers in every Python.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

_T = TypeVar("_T")
_COUNT = 31_000
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_LONGEST = 10


class _Draw(random.Random):
    def below(self, n: int) -> int:
        return int(self.random() * n)

    def one(self, options: Sequence[_T]) -> _T:
        return options[self.below(len(options))]


def _distinct(seed: int, make: Callable[[_Draw], tuple[str, str]], count: int = _COUNT) -> Iterator[tuple[str, str]]:
    draw = _Draw(seed)
    seen: set[str] = set()
    made: list[tuple[str, str]] = []
    while len(made) < count:
        first, second = make(draw)
        if first not in seen:
            seen.add(first)
            made.append((first, second))
    # There are few short inputs, and they come early: unless shuffled, all of them would be held out.
    for i in range(count - 1, 0, -1):
        j = draw.below(i + 1)
        made[i], made[j] = made[j], made[i]
    return iter(made)


def _word(draw: _Draw) -> str:
    return "".join(draw.one(_LETTERS) for _ in range(1 + draw.below(_LONGEST)))


def reverse() -> Iterator[tuple[str, str]]:
    """Words of 1 to 10 random letters, and their letters from last to first."""
    return _distinct(1, lambda draw: (word := _word(draw), word[::-1]))


def sort() -> Iterator[tuple[str, str]]:
    """Words of 1 to 10 random letters, and their letters in the order of the alphabet."""
    return _distinct(2, lambda draw: (word := _word(draw), "".join(sorted(word))))


_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
           "December")  # fmt: skip
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _date(draw: _Draw) -> tuple[str, str]:
    date = datetime.date(1900, 1, 1) + datetime.timedelta(days=draw.below(73_049))  # to the end of 2099
    day, year, month, weekday = date.day, date.year, _MONTHS[date.month - 1], _DAYS[date.weekday()]
    ending = "th" if 10 < day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    written = draw.one((
        f"{day} {month} {year}", f"{day} {month[:3]} {year}", f"{month} {day}, {year}", f"{month[:3]} {day}, {year}",
        f"{day}{ending} of {month} {year}", f"{month} {day}{ending}, {year}", f"{weekday}, {day} {month} {year}",
        f"{weekday[:3]} {day}.{date.month}.{year}", f"{day}.{date.month}.{year}",
    ))  # fmt: skip
    return (written.lower() if draw.below(4) == 0 else written), date.isoformat()


def dates() -> Iterator[tuple[str, str]]:
    """Dates from 1900 to 2099 as people write them, and as ISO 8601 does."""
    return _distinct(3, _date)


_SUBJECTS = ("plot", "acting", "music", "ending", "dialogue", "camera work", "story", "cast", "pace", "humour")
_GOOD = ("good", "great", "superb", "moving", "funny", "clever", "charming", "brilliant", "fresh", "gripping")
_BAD = ("bad", "dull", "awful", "boring", "clumsy", "silly", "tedious", "weak", "stale", "hopeless")


def _clause(draw: _Draw, good: bool) -> str:
    negated = draw.below(3) == 0
    adjective = draw.one(_GOOD if good != negated else _BAD)
    verb = draw.one(("was", "seemed", "felt"))
    degree = draw.one(("not ", "never ", "hardly ") if negated else ("", "", "really ", "quite ", "always "))
    return f"the {draw.one(_SUBJECTS)} {verb} {degree}{adjective}"


def _opinion(draw: _Draw) -> tuple[str, str]:
    good = draw.below(2) == 0
    label = "positive" if good else "negative"
    form = draw.below(3)
    if form == 0:
        return _clause(draw, good), label
    # What is said after a "but" is meant.
    first = _clause(draw, good if form == 1 else not good)
    return f"{first} {'and' if form == 1 else 'but'} {_clause(draw, good)}", label


def opinions() -> Iterator[tuple[str, str]]:
    """Sentences on films, with negations and second thoughts, and whether they are positive or negative."""
    return _distinct(4, _opinion, 9_000)


GENERATORS: dict[str, tuple[Literal["pairs", "labelled"], Callable[[], Iterator[tuple[str, str]]]]] = {
    "reverse": ("pairs", reverse),
    "sort": ("pairs", sort),
    "dates": ("pairs", dates),
    "opinions": ("labelled", opinions),
}
"""What each holds, and its records."""
