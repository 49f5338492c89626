"""Lessons: short scripts in cells, each of which shows one idea, draws it, and asserts what it teaches. Imports no torch.

`# %%` begins a cell of code, `# %% [markdown]` one of text; editors know that format, and `notebook` makes an .ipynb of it.
"""

from __future__ import annotations

import os
import re
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from tinygpt_kernels.spec import unknown

from ..errors import UserError

LESSONS: dict[str, str] = {
    "averaging": "the past averaged in four ways, the last of which is attention",
    "scaling": "why scores are divided by √d: a softmax that saturates learns nothing",
    "tokens": "text becomes ids, ids become windows, each place of which is an example",
    "masks": "who sees whom: encoder, decoder, padding",
    "positions": "without positions no order; sinusoids, and a table that is learned",
    "norms": "norm before or after the addition: gradients by depth",
    "kernels": "from an equation to kernels: one attention, every backend",
    "attention": "what a head looks at, in a model trained to write words backwards",
    "road": "from counting to the GPT: what each idea buys, in bits per character",
}
"""What each lesson shows, in the order to read them. Its script is the module of that name."""

FOLDER = "TINYGPT_LESSONS"
"""The environment variable that names the folder of pictures, which scripts read where they save one."""


def script(name: str) -> Path:
    """The file of a lesson.

    Raises:
        UserError: no such lesson; offers the nearest name.
    """
    if name not in LESSONS:
        raise UserError(unknown("lesson", name, LESSONS))
    return Path(__file__).with_name(f"{name}.py")


def run(name: str, folder: Path) -> None:
    """Run a lesson in this process; its pictures go into `folder`.

    Raises:
        UserError: no such lesson. AssertionError: what the lesson teaches did not come out.
    """
    path = script(name)
    with _pictures_in(folder):
        runpy.run_path(str(path), run_name="__main__")


def notebook(name: str, folder: Path) -> Path:
    """Write a lesson as `folder`/NAME.ipynb, not yet executed.

    Raises:
        UserError: no such lesson, or nbformat is not installed.
    """
    source = script(name).read_text(encoding="utf-8")
    try:
        nbformat = import_module("nbformat")
    except ImportError:
        raise UserError("--notebook needs nbformat; pip install 'tinygpt[lessons]'") from None
    made = nbformat.v4
    cells = [
        made.new_markdown_cell(text, id=f"{name}-{i}") if kind == "markdown" else made.new_code_cell(text, id=f"{name}-{i}")
        for i, (kind, text) in enumerate(cells_of(source))
    ]  # fmt: skip
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book: Any = made.new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.ipynb"
    path.write_text(nbformat.writes(book) + "\n", encoding="utf-8")
    return path


def cells_of(source: str) -> Iterator[tuple[Literal["markdown", "code"], str]]:
    """The cells of a script, without their marks; text without the `# ` before each line."""
    for kind, body in re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", source, re.M | re.S):
        if kind:
            yield "markdown", re.sub(r"^# ?", "", body, flags=re.M).strip("\n")
        else:
            yield "code", body.strip("\n")


def picture(figure: Any, name: str) -> None:
    """Save a matplotlib figure as NAME.png into the folder of pictures, and show it where a notebook runs."""
    folder = Path(os.environ.get(FOLDER, "lessons"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    figure.savefig(path)
    print(f"wrote {path}")
    if "JPY_PARENT_PID" in os.environ:
        display = import_module("IPython.display")
        display.display(display.Image(filename=path))


@contextmanager
def _pictures_in(folder: Path) -> Iterator[None]:
    before = os.environ.get(FOLDER)
    os.environ[FOLDER] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[FOLDER]
        else:
            os.environ[FOLDER] = before
