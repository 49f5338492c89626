"""Before torch is imported: where there is no GPU, Triton's kernels run in its interpreter.

Tests of compiled code start processes of their own, with the interpreter off. The user's cache is out of sight: preferences
that were measured on this machine would change what `auto` picks.
"""

import os
import tempfile

import pytest

from tinygpt_kernels import interpreter

if not interpreter.gpu_present():
    os.environ[interpreter.VARIABLE] = "1"

# With `pytest -n`, processes share the cores: threads of one that wait for each other would wait for the others too.
_processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if _processes > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _processes)))

_cache = tempfile.TemporaryDirectory(prefix="tinygpt-tests-")
os.environ["TINYGPT_CACHE"] = _cache.name


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """`pytest -n`: all tests of a file in one process, which share what is built or compiled for them.

    Not among pyproject.toml's options: pytest-benchmark times nothing where it finds --dist there.
    """
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "loadfile"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """`pytest -n auto`: a process a core, but no more than 8, since each takes 1 to 2 GB."""
    return min(os.cpu_count() or 1, 8)


def pytest_collection_modifyitems(items):
    if not interpreter.gpu_present():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
