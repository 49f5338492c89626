"""`tinygpt data`: what a model will see of a text, and what each tokenizer makes of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tinygpt_kernels.spec import unknown

from ..data.sources import Source, default_source, joined_name
from ..errors import UserError
from ..tokenizers import check_size, known_tokenizers
from .arguments import Data
from .early import find_readable

if TYPE_CHECKING:
    from ..data.survey import Measured, Sample
    from ..tokenizers import Tokenizer

_FIRST = 48  # tokens shown


def plan(args: Data) -> Callable[[], int]:
    """Check the arguments, and return what shows the text, or the cache.

    Raises:
        UserError: an argument is wrong, or a file cannot be read.
    """
    if args.list and args.clear:
        raise UserError("--list and --clear are not allowed together")
    if args.list or args.clear:
        return lambda: _cache(clear=args.clear, as_json=args.json)
    if args.tokenizer not in known_tokenizers():
        raise UserError(unknown("tokenizer", args.tokenizer, known_tokenizers()))
    check_size(args.tokenizer, args.vocab_size)
    if not 0 < args.sample <= 1000:
        raise UserError(f"--sample {args.sample:g} must be above 0, and at most 1000 (MB)")
    if args.sources:
        sources = find_readable(args.sources)
    else:
        source, notice = default_source()
        sources = [source]
        print(notice, file=sys.stderr)
    return lambda: _show(args, sources)


def _show(args: Data, sources: Sequence[Source]) -> int:
    from rich.console import Console

    from ..data import survey
    from ..data.corpus import TRAIN_SHARE

    name = joined_name(sources)
    parts = [part for source in sources for part in source.parts()]
    size = sum(part.identity().bytes for part in parts)
    sample = survey.take(parts, int(args.sample * 1e6))
    errors = Console(stderr=True)
    with errors.status("reading") as status:
        tokenizer = survey.trained(args.tokenizer, sample, args.vocab_size)
        sizes = sorted({*survey.VOCABULARIES, *([args.vocab_size] if args.vocab_size else [])})
        found = list(survey.compare(sample, sizes, status.update if errors.is_terminal else lambda doing: None))
    published = any(part.role != "cut" for part in parts)
    split = "as published" if published else f"the first {100 * TRAIN_SHARE:g} % train, the rest validates"
    ids = tokenizer.encode(sample.text[: 40 * _FIRST])[:_FIRST].tolist()
    names = tokenizer.tokens()
    first = [(i, names[i]) for i in ids]
    if args.json:
        print(json.dumps(_values(name, size, parts, sample, split, tokenizer, first, found), indent=1))
    else:
        _print(name, size, sample, split, tokenizer, first, found)
    if plot := args.plot or (None if args.json else Path("tokens.png")):
        _draw(found, name, plot)
        print(f"wrote {plot}", file=sys.stderr if args.json else sys.stdout)
    return 0


def _values(
    name: str, size: int, parts: Sequence[object], sample: Sample, split: str, tokenizer: Tokenizer,
    first: Sequence[tuple[int, str]], found: Sequence[Measured],
) -> dict[str, object]:  # fmt: skip
    return {
        "name": name,
        "bytes": size,
        "parts": [{"name": part.name, "role": part.role} for part in parts],  # type: ignore[attr-defined]
        "sample": {
            "whole": sample.whole, "characters": len(sample.text), "bytes": sample.bytes, "lines": sample.lines,
            "distinct_characters": len(set(sample.text)),
        },
        "split": split,
        "tokenizer": {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "first_tokens": first},
        "tokenizers": [asdict(measured) for measured in found],
    }  # fmt: skip


def _print(
    name: str, size: int, sample: Sample, split: str, tokenizer: Tokenizer, first: Sequence[tuple[int, str]],
    found: Sequence[Measured],
) -> None:  # fmt: skip
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    said = "" if sample.whole else f"; looked at: the first {sample.bytes:,}"
    facts.add_row("text", f"{name}: {size:,} bytes{said}")
    facts.add_row(
        "",
        f"{len(sample.text):,} characters, {len(set(sample.text)):,} distinct; {sample.lines:,} lines",
    )
    facts.add_row("split", split)
    facts.add_row("tokenizer", f"{tokenizer.name}, {tokenizer.vocab_size:,} token{'s' * (tokenizer.vocab_size != 1)}")
    facts.add_row("it begins", Text("  ".join(f"{i} {text!r}" for i, text in first)))
    console.print(facts)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("tokenizer")
    for column in ("vocabulary", "tokens", "characters a token", "bytes a token"):
        table.add_column(column, justify="right")
    before = ""
    for measured in found:
        table.add_row(
            "" if measured.tokenizer == before else measured.tokenizer,
            f"{measured.vocab_size:,}",
            f"{measured.tokens:,}",
            f"{measured.chars_per_token:.2f}",
            f"{measured.bytes_per_token:.2f}",
        )
        before = measured.tokenizer
    console.print(table)
    console.print(
        "A model sees block_size tokens at a time: more characters a token, more text; a larger vocabulary, more weights, each of "
        "which is trained less often. All were trained on the very text they are measured on.",
        soft_wrap=False,
    )


def _draw(found: Sequence[Measured], name: str, path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(7, 4.4), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    styles = {"bpe": ("#3b6ea5", "o"), "unigram": ("#d9a441", "s"), "word": ("#5a9367", "^"), "whitespace": ("#8a5a9e", "v"),
              "char": ("#b3322b", "D"), "gpt2": ("#555555", "*")}  # fmt: skip
    for kind in dict.fromkeys(measured.tokenizer for measured in found):
        points = [(m.vocab_size, m.chars_per_token) for m in found if m.tokenizer == kind]
        color, marker = styles.get(kind, ("#777777", "x"))
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=6, linewidth=1.4, label=kind)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens in the vocabulary (the model's first and last table)")
    axes.set_ylabel("characters a token (text in a context)")
    axes.set_title(f"{name}: vocabulary against length", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path)


def _cache(*, clear: bool, as_json: bool) -> int:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from tinygpt_kernels.userdir import cache_directory

    from ..data.cache import clear_cache, list_cache

    entries = clear_cache() if clear else list_cache()
    total = sum(entry.bytes for entry in entries)
    if as_json:
        print(json.dumps([asdict(entry) | {"path": str(entry.path)} for entry in entries], indent=1))
        return 0
    if not entries:
        print(f"the cache {cache_directory()} holds nothing")
        return 0
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("kind")
    table.add_column("of")
    table.add_column("MB", justify="right")
    for entry in entries:
        table.add_row(entry.kind, entry.name, f"{entry.bytes / 1e6:.1f}")
    Console(highlight=False).print(table)
    print(f"{'removed' if clear else 'in all'} {total / 1e6:.1f} MB {'from' if clear else 'in'} {cache_directory()}")
    return 0
