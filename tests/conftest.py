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

_cache = tempfile.TemporaryDirectory(prefix="tinygpt-tests-")
os.environ["TINYGPT_CACHE"] = _cache.name


def pytest_collection_modifyitems(items):
    if not interpreter.gpu_present():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
