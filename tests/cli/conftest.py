from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tinygpt.cli import main
from tinygpt_kernels.interpreter import VARIABLE

SMALL = {
    "model.layers": 1,
    "model.width": 32,
    "model.heads": 2,
    "model.block_size": 8,
    "training.batch_size": 2,
    "training.eval_batches": 2,
    "training.sample_tokens": 20,
    "training.eval_every": 4,
    "training.checkpoint_every": 4,
}


@dataclass(frozen=True)
class Answer:
    """How a command line ended."""

    code: int
    out: str
    err: str

    def error(self) -> str:
        """The one message of a command that failed; nothing else may be on stderr."""
        assert self.err.count("tinygpt: error: ") == 1, self.err
        assert self.err.startswith("tinygpt: error: "), self.err
        assert "Traceback" not in self.err + self.out
        return self.err.removeprefix("tinygpt: error: ")


@pytest.fixture(scope="session")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@contextmanager
def one_thread() -> Iterator[None]:
    """On machines with other work, threads that wait for each other make small models many times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _place(_shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working directory, and a cache that the tests share."""
    monkeypatch.setenv("TINYGPT_CACHE", str(_shared / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    with one_thread():
        yield


@pytest.fixture(scope="session")
def small() -> list[str]:
    """`--set` for a model that trains in no time."""
    return ["--set", *(f"{key}={value}" for key, value in SMALL.items())]


@pytest.fixture(scope="session")
def text(_shared: Path) -> Path:
    """A small file to train on."""
    draw = random.Random(1)
    words = ["the", "a", "king", "queen", "hath", "love", "night", "day", "my", "lord", "shall", "come", "to", "death"]
    file = _shared / "text.txt"
    file.write_text("".join(draw.choice(words) + draw.choice([" ", " ", ".\n"]) for _ in range(400)))
    return file


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Runs a command line in this process: torch is imported once for all tests."""

    def run(*argv: object) -> Answer:
        capsys.readouterr()
        code = main([str(a) for a in argv])
        return Answer(code, *capsys.readouterr())

    return run


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `python ...` in a process of its own that decides for itself about Triton's interpreter."""
    started: list[subprocess.Popen[str]] = []

    def popen(*argv: object) -> subprocess.Popen[str]:
        env = {k: v for k, v in os.environ.items() if k not in (VARIABLE, "PYTHONUNBUFFERED")}
        env["OMP_NUM_THREADS"] = "1"
        env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        process = subprocess.Popen(
            [sys.executable, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        started.append(process)
        return process

    yield popen
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def process(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., Answer]:
    """Runs `python ...` to its end in a process of its own."""

    def run(*argv: object) -> Answer:
        started = start(*argv)
        out, err = started.communicate(timeout=120)
        return Answer(started.returncode, out, err)

    return run


@pytest.fixture(scope="session")
def _trained(_shared: Path, text: Path, small: list[str]) -> Path:
    os.environ["TINYGPT_CACHE"] = str(_shared / "cache")  # this may come before any test's own setting
    out = _shared / "trained"
    with one_thread():
        assert main(["train", "--data", str(text), "--steps", "8", "--out", str(out), *small]) == 0
    return out


@pytest.fixture
def run(_trained: Path, tmp_path: Path) -> Path:
    """A finished run of 8 steps, the test's own."""
    return Path(shutil.copytree(_trained, tmp_path / "run"))
