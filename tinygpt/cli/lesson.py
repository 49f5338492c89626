"""`tinygpt lesson`: the list of lessons, and lessons run or written as notebooks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from tinygpt_kernels import interpreter

from .. import lessons
from ..errors import UserError
from .arguments import Lesson


def plan(args: Lesson) -> Callable[[], int]:
    """Check the names, and return what lists, runs or writes the lessons.

    Raises:
        UserError: no such lesson; names beside --all; a notebook of none.
    """
    for name in args.names:
        lessons.script(name)
    if args.all and args.names:
        raise UserError("--all and names are not allowed together")
    names = tuple(lessons.LESSONS) if args.all else args.names
    if args.notebook and not names:
        raise UserError("--notebook needs names of lessons, or --all; `tinygpt lesson` lists them")
    if not names:
        return _list
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file, not a directory")
    if args.notebook:
        return lambda: _write(names, args)
    interpreter.decide(["triton"] if "kernels" in names else [])  # which has to stand before torch is imported
    return lambda: _run(names, args)


def _list() -> int:
    width = max(map(len, lessons.LESSONS))
    for name, about in lessons.LESSONS.items():
        print(f"{name:{width}}  {about}")
    print("\n`tinygpt lesson NAME` runs one, --all all of them; --notebook writes them as notebooks.")
    return 0


def _run(names: Sequence[str], args: Lesson) -> int:
    for i, name in enumerate(names):
        print(f"{'' if i == 0 else chr(10)}== {name}: {lessons.LESSONS[name]}", flush=True)
        began = time.perf_counter()
        lessons.run(name, args.out)
        print(f"{time.perf_counter() - began:.1f} s; to read on: {lessons.script(name)}", flush=True)
    return 0


def _write(names: Sequence[str], args: Lesson) -> int:
    for name in names:
        print(f"wrote {lessons.notebook(name, args.out)}")
    return 0
