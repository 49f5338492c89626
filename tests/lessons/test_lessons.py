"""Every lesson runs, draws its picture and holds what it asserts; as a notebook too."""

import ast
import sys
from pathlib import Path

import pytest
import torch

from tinygpt import lessons
from tinygpt.cli import main

LONG = ("attention", "road")  # which train: they run as notebooks, among the slow tests


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _one_thread():
    """Beside other work, threads that wait for each other make small models many times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", [name for name in lessons.LESSONS if name not in LONG])
def test_a_lesson_runs_and_draws(name, capsys):
    assert main(["lesson", name]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"== {name}: {lessons.LESSONS[name]}\n")
    assert Path(f"lessons/{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", lessons.LESSONS)
def test_a_lesson_asserts_what_it_teaches_and_is_short(name):
    source = lessons.script(name).read_text()
    assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(source)))
    assert len(source.splitlines()) <= 150


@pytest.mark.parametrize("name", lessons.LESSONS)
def test_a_lesson_is_cells_from_its_first_line_to_its_last(name):
    source = lessons.script(name).read_text()
    assert source.startswith("# %% [markdown]\n# # ")
    cells = list(lessons.cells_of(source))
    assert len(cells) == source.count("\n# %%") + 1
    words = [word for kind, text in cells for word in text.split()]
    assert [w for w in source.split() if w not in ("#", "%%", "[markdown]")] == [w for w in words if w != "#"]
    for kind, text in cells:
        if kind == "code":
            ast.parse(text)


def test_every_script_is_in_the_list_and_the_list_is_printed(capsys):
    scripts = {path.stem for path in Path(lessons.__file__).parent.glob("*.py")} - {"__init__"}
    assert scripts == set(lessons.LESSONS)
    assert main(["lesson"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(lessons.LESSONS)]] == list(lessons.LESSONS)
    assert max(map(len, lines)) <= 100


def test_all_runs_all_of_them_in_order(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(lessons, "run", lambda name, folder: ran.append((name, folder)))
    assert main(["lesson", "--all", "--out", "here"]) == 0
    assert ran == [(name, Path("here")) for name in lessons.LESSONS]


def test_a_folder_that_is_a_file_is_refused_before_anything_runs(capsys):
    Path("taken").touch()
    assert main(["lesson", "averaging", "--out", "taken"]) == 2
    assert "--out taken is a file" in capsys.readouterr().err


def test_without_nbformat_a_notebook_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nbformat", None)
    assert main(["lesson", "averaging", "--notebook"]) == 1
    assert "pip install 'tinygpt[lessons]'" in capsys.readouterr().err
    assert not Path("lessons").exists()


def test_notebooks_are_valid(capsys):
    nbformat = pytest.importorskip("nbformat")
    assert main(["lesson", "--all", "--notebook"]) == 0
    for name in lessons.LESSONS:
        book = nbformat.read(f"lessons/{name}.ipynb", as_version=4)
        nbformat.validate(book)
        assert book.cells[0].cell_type == "markdown"
        assert book.cells[0].source.startswith("# ")


@pytest.mark.slow
@pytest.mark.parametrize("name", lessons.LESSONS)
def test_a_notebook_executes_and_shows_its_picture(name, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("PYTHONPATH", ":".join(path for path in sys.path if path))
    book = nbformat.read(lessons.notebook(name, Path("lessons")), as_version=4)
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
