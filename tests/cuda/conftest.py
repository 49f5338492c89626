import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import simulation


@pytest.fixture(scope="session")
def simt():
    """The module that simulates the CUDA kernels, built from what is in csrc now."""
    if not (shutil.which("cmake") and (shutil.which("c++") or shutil.which("g++"))):
        pytest.skip("needs cmake and a C++ compiler")
    return simulation.build()
