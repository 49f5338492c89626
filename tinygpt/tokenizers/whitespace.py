"""Words are what white space separates: `don't!` is one."""

from __future__ import annotations

from ._words import WordsTokenizer


class WhitespaceTokenizer(WordsTokenizer):
    """A word is all that stands between white space, punctuation and all."""

    name = "whitespace"
    words_are = r"\S+"
