"""The machine code of GPUs that are not here: it compiles, spills nothing, and moves memory in 128-bit pieces."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = Path(__file__).with_name("compiled.py")
    found = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-4000:]
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    print(*rows, sep="\n")
    return rows


def test_every_kernel_compiles_for_every_target(figures):
    assert {row["arch"] for row in figures} == {80, 90, 100, "gfx942"}
    assert len(figures) == 2 * 2 * (3 + 3 + 1 + 1)


def test_no_kernel_spills(figures):
    assert [row for row in figures if row["spill"]] == []


def test_aligned_rows_move_in_128_bit_pieces(figures):
    aligned = [row for row in figures if row["C"] % 16 == 0 and "wide_share" in row]
    assert aligned
    assert [row for row in aligned if row["wide_share"] < 0.9] == []
