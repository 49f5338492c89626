"""`tinygpt gpu-report` and `tinygpt tune` where there is no GPU."""

import json

import pytest
import torch

from tinygpt_kernels import interpreter
from tinygpt_kernels.triton_ops import tiles, tuning

KERNEL = """
import triton
import triton.language as tl


@triton.jit
def double_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, 2 * tl.load(x_ptr + i, mask=i < n), mask=i < n)
"""
ARGUMENTS = ("x_ptr=*bf16:16", "y_ptr=*bf16:16", "n=i32:16", "BLOCK=1024")


def test_a_kernel_of_ones_own_is_read(process, tmp_path):
    file = tmp_path / "my.py"
    file.write_text(KERNEL)
    answer = process(
        "-m", "tinygpt", "gpu-report", f"{file}:double_kernel", "--args", *ARGUMENTS, "--arch", "80", "90", "--json"
    )
    assert answer.code == 0, answer.err
    first, second = map(json.loads, answer.out.splitlines())
    assert (first["arch"], second["arch"]) == (80, 90)
    assert first["spill"] == 0
    assert first["wide_share"] == 1.0
    narrow = process("-m", "tinygpt", "gpu-report", f"{file}:double_kernel", "--args", "x_ptr=*bf16", "y_ptr=*bf16", "n=i32",
                     "BLOCK=1024", "--arch", "80", "--json")  # fmt: skip
    assert json.loads(narrow.out)["wide_share"] == 0.0  # nothing is known to be aligned
    table = process("-m", "tinygpt", "gpu-report", f"{file}:double_kernel", "--args", *ARGUMENTS, "--arch", "90")
    assert table.out.startswith("sm_90  double_kernel\n    tile 1024, 4 warps, 3 stages: ")
    assert "per byte" in table.out
    assert table.err == ""
    assert max(map(len, table.out.splitlines())) <= 110


def test_what_is_missing_is_named(process, tmp_path):
    file = tmp_path / "my.py"
    file.write_text(KERNEL)
    answer = process("-m", "tinygpt", "gpu-report", f"{file}:double_kernel", "--args", "BLOCK=64")
    assert "double_kernel needs x_ptr: give its type or value; add it to --args" in answer.error()
    assert (
        f"{file} has no Triton kernel triple_kernel"
        in process("-m", "tinygpt", "gpu-report", f"{file}:triple_kernel").error()
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("gpu-report my.py", "names no kernel; write FILE:KERNEL"),
        ("gpu-report nothing.py:kernel", "no such file: nothing.py"),
        ("gpu-report --arch ninety", "'ninety' is no architecture"),
        ("gpu-report --args BLOCK=3", "name it as FILE:KERNEL"),
        ("gpu-report --backend cpp", "--backend cpp: there are kernels for GPUs of triton and cuda"),
        (f"gpu-report {__file__}:kernel --backend cuda", "leave it out where you name your own"),
        ("tune --dtype bf16", "unknown dtype 'bf16'"),
        ("tune --head-dim 512", "--head-dim 512 is not within 1 to 256"),
        ("tune --list --clear", "not allowed together"),
    ],
)
def test_wrong_arguments(cli, arguments, says, monkeypatch):
    answer = cli(*arguments.split())
    assert says in answer.error()
    assert answer.code == 2


@pytest.mark.skipif(interpreter.gpu_present(), reason="speaks of machines without a GPU")
def test_tuning_needs_a_gpu(cli):
    assert "there is no GPU here" in cli("tune").error()


def test_measurements_are_listed_and_deleted(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path))
    assert "nothing was measured yet" in cli("tune", "--list").out
    found = dict.fromkeys(tiles.KERNELS, tiles.Tile(64, 128, 8, 2, True))
    tuning.save(torch.device("cpu"), "D=64 bfloat16 T>64", found)
    listed = cli("tune", "--list").out
    assert "interpreter, triton" in listed
    assert "attention_bwd_dq    64 x 128, 8 warps, 2 stages, descriptors" in listed
    assert "deleted" in cli("tune", "--clear").out
    assert "nothing was measured yet" in cli("tune", "--clear").out
