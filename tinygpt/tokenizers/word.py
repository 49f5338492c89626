"""Words and punctuation apart: `don't!` is don, ', t, !."""

from __future__ import annotations

from ._words import WordsTokenizer


class WordTokenizer(WordsTokenizer):
    """A word is letters, digits and underscores; punctuation and white space are characters."""

    name = "word"
    words_are = r"\w+"
