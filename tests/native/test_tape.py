"""The tape: what it plays back is what ran, and what it cannot play back it does not pretend to."""

import subprocess
import sys

import pytest
import torch

from tinygpt_kernels import _C
from tinygpt_kernels.native import gelu, layer_norm, tape


def test_it_plays_kernels_and_operations_in_their_order_on_new_numbers():
    x, y, total = torch.randn(5, 33), torch.empty(5, 33), torch.zeros(5, 33)

    def work():
        own = torch.empty_like(y)  # made once, and kept: its address stands on the tape
        gelu.gelu_fwd(x, None, "none", out=(own,))
        y.copy_(own)
        torch.mm(x, x.T, out=square)
        total.view(-1)[:33] += y[0]

    square = torch.empty(5, 5)
    play = tape.record(work)
    for _ in range(3):
        torch.empty(5, 33).fill_(float("nan"))  # takes the place of anything that was let go
        x.normal_()
        before = total.clone()
        play()
        torch.testing.assert_close(y, torch.nn.functional.gelu(x))
        torch.testing.assert_close(square, x @ x.T)
        torch.testing.assert_close(total[0], before[0] + y[0])


@pytest.mark.parametrize(
    "operation", [lambda x: x + 1, lambda x: x.sum().item(), lambda x: x.clone(), lambda x: torch.zeros(3) + x[0, 0]]
)
def test_an_operation_whose_result_is_new_each_time_is_not_recorded(operation):
    x, y = torch.randn(5, 33), torch.empty(5, 33)
    found = []

    def work():
        gelu.gelu_fwd(x, None, "none", out=(y,))
        found.append(operation(x))

    assert tape.record(work) is None
    assert len(found) == 1  # it ran all the same
    torch.testing.assert_close(y, torch.nn.functional.gelu(x))


def test_a_failure_while_recording_leaves_the_kernels_as_they_were():
    def work():
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        tape.record(work)
    assert layer_norm._C is gelu._C is _C


def test_recording_does_not_import_the_compiler():
    code = """
import sys, torch
from tinygpt_kernels.native import tape
x = torch.ones(2, 2)
assert tape.record(lambda: torch.mm(x, x, out=torch.empty(2, 2))) is not None
assert "torch._dynamo" not in sys.modules, "1 s and 180 MB"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
