"""When Triton's interpreter is chosen, and what is said when it is too late."""

import os
import subprocess
import sys

import pytest

from tinygpt_kernels import interpreter


def python(code, **environment):
    environment = {
        k: v for k, v in {**os.environ, **environment}.items() if k != interpreter.VARIABLE or k in environment
    }
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


ASK = """
from tinygpt_kernels import ops
import torch
try:
    print(ops.layer_norm.on('triton')(torch.eye(2), torch.ones(2)).sum().item())
except Exception as error:
    print(type(error).__name__, error)
"""


def test_deciding_imports_nothing_heavy():
    found = python(
        "import sys; from tinygpt_kernels import interpreter as i; i.gpu_present = lambda: False; print(i.decide(['triton']));"
        "assert not {'torch', 'triton', 'numpy'} & set(sys.modules); import os; print(os.environ[i.VARIABLE])"
    )
    assert found.returncode == 0, found.stderr
    notice, value = found.stdout.splitlines()
    assert "for correctness and not for speed" in notice
    assert value == "1"


def test_a_gpu_or_another_backend_decides_nothing(monkeypatch):
    monkeypatch.delenv(interpreter.VARIABLE, raising=False)
    monkeypatch.setattr(interpreter, "gpu_present", lambda: False)
    assert interpreter.decide(["cpp", "auto"]) is None
    monkeypatch.setattr(interpreter, "gpu_present", lambda: True)
    assert interpreter.decide(["triton"]) is None
    assert interpreter.VARIABLE not in os.environ


def test_an_interpreting_process_computes():
    found = python(ASK, TRITON_INTERPRET="1")
    assert abs(float(found.stdout)) < 1e-6, found.stderr


@pytest.mark.skipif(interpreter.gpu_present(), reason="speaks of machines without a GPU")
def test_a_library_user_is_told_what_to_set():
    found = python(ASK)
    assert "BackendError" in found.stdout, found.stderr
    assert "set TRITON_INTERPRET=1 before Python starts" in found.stdout
    assert "able" in found.stdout


@pytest.mark.skipif(interpreter.gpu_present(), reason="speaks of machines without a GPU")
def test_too_late_is_said():
    found = python("import triton.language, os; os.environ['TRITON_INTERPRET'] = '1'" + ASK)
    assert "was set after triton was imported" in found.stdout, found.stdout + found.stderr
