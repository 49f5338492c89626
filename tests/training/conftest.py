"""Models of this folder are tiny: more threads only wait for each other, and for whatever else the machine does."""

import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before, torch_before = os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads()
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(torch_before)
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before
