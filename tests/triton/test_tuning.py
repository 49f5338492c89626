"""Tiles that a user measured: kept by what they hold for, used where they hold, deleted on request."""

import json

import pytest
import torch

from tinygpt_kernels.triton_ops import tiles, tuning
from tinygpt_kernels.triton_ops.tiles import Tile

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path))
    tuning._measured.cache_clear()
    yield
    tuning._measured.cache_clear()


def test_the_fastest_of_what_was_measured_is_kept_and_used(monkeypatch):
    favourites = {
        "attention_fwd": Tile(64, 64, 4, 2),
        "attention_bwd_dq": Tile(64, 64, 4, 2),
        "attention_bwd_dkdv": Tile(32, 64, 4, 2),
    }

    def timer(run):
        run()  # every candidate computes
        return sum(tiles._forced.get(k) != tile for k, tile in favourites.items())

    seen = list(tuning.tune(CPU, 32, torch.bfloat16, 1, 16, 1, timer))
    assert {kernel.split()[0] for kernel, _, _ in seen} == {"attention_fwd", "attention_bwd_dq"}
    assert len(seen) > 20
    x = torch.zeros(1, 16, 3, 32, dtype=torch.bfloat16)
    assert {k: tuning.lookup(k, x, 16) for k in tiles.KERNELS} == favourites
    assert tuning.lookup("attention_fwd", x, 65) is None  # longer rows were not measured
    assert tuning.lookup("attention_fwd", x.float(), 16) is None
    monkeypatch.setattr(tiles, "INTERPRETING", False)
    monkeypatch.setattr(tiles, "architecture", lambda device: 80)
    assert tiles.choose("attention_bwd_dkdv", x, 16, plain=True) == favourites["attention_bwd_dkdv"]
    assert tiles.choose("attention_fwd", x, 65, plain=True) == tiles.shipped("attention_fwd", 80, 2, 32, 65)


def test_another_kernel_or_gpu_finds_nothing(monkeypatch):
    found = dict.fromkeys(tiles.KERNELS, Tile(64, 64, 4, 2))
    tuning.save(CPU, tuning.call_name(64, torch.float16, 1024), found)
    x = torch.zeros(1, 1024, 3, 64, dtype=torch.float16)
    assert tuning.lookup("attention_fwd", x, 1024) == Tile(64, 64, 4, 2)
    monkeypatch.setattr(tuning, "identity", lambda device: "another GPU")
    tuning._measured.cache_clear()
    assert tuning.lookup("attention_fwd", x, 1024) is None


def test_tiles_of_backward_candidates_fit_each_other():
    for D in (16, 64, 128, 256):
        for itemsize in (2, 4):
            for kernel in tiles.KERNELS:
                assert tiles.shipped(kernel, 80, itemsize, D, 1024) in tuning.candidates(kernel, D, itemsize)


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_damaged_file_is_as_good_as_none(content):
    tuning.path().write_text(content)
    assert tuning.load() == {}
    tuning.save(CPU, "D=64 float16 T>64", dict.fromkeys(tiles.KERNELS, Tile(64, 64, 4, 2)))
    assert json.loads(tuning.path().read_text())[tuning.identity(CPU)]


def test_measurements_can_be_deleted():
    assert not tuning.clear()
    tuning.save(CPU, "D=64 float16 T>64", dict.fromkeys(tiles.KERNELS, Tile(64, 64, 4, 2)))
    assert tuning.clear()
    assert tuning.load() == {}
