from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory of the test's own."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("TINYGPT_CACHE", str(directory))
    return directory


@pytest.fixture
def start() -> Callable[..., subprocess.Popen[str]]:
    """Starts Python on a text of code, with arguments, in an environment like this one's."""

    def popen(code: str, *args: object, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **env},
        )

    return popen


@pytest.fixture
def run(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., str]:
    """Runs Python on a text of code to its end, which must be a good one; returns what it printed."""

    def communicate(code: str, *args: object, timeout: float = 60, **env: str) -> str:
        process = start(code, *args, **env)
        out, err = process.communicate(timeout=timeout)
        assert process.returncode == 0, err
        return out

    return communicate
