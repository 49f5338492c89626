from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tinygpt.data import consecutive_batches, random_batch, random_batches

TOKENS = np.arange(1000, dtype=np.uint16)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_targets_are_the_next_tokens_of_windows_that_reach_both_ends(dtype: type[np.unsignedinteger]) -> None:
    tokens = (np.arange(40, dtype=np.int64) * 1000).astype(dtype)
    starts = set()
    for step in range(100):
        x, y = random_batch(tokens, 12, 32, seed=1, step=step)
        assert x.dtype == y.dtype == torch.int64
        assert x.shape == y.shape == (12, 32)
        assert x.is_contiguous()
        assert y.is_contiguous()
        torch.testing.assert_close(y, x + 1000, rtol=0, atol=0)
        torch.testing.assert_close(x - x[:, :1], torch.arange(32).expand(12, 32) * 1000, rtol=0, atol=0)
        starts |= set((x[:, 0] // 1000).tolist())
    assert starts == set(range(8))  # the last window ends with the last token


def test_tokens_of_exactly_one_block_and_its_target_give_the_only_window() -> None:
    x, y = random_batch(TOKENS[:17], 3, 16, seed=5, step=9)
    assert x.tolist() == [list(range(16))] * 3
    assert y.tolist() == [list(range(1, 17))] * 3


def starts(**place: int | str) -> tuple[int, ...]:
    return tuple(random_batch(TOKENS, 8, 4, **{"seed": 1, "step": 2} | place)[0][:, 0].tolist())  # type: ignore[arg-type]


def test_windows_depend_on_seed_step_microbatch_and_stream_and_nothing_before() -> None:
    first = starts()
    others = [starts(seed=seed) for seed in (2, -1, 1 << 63)]
    others += [starts(step=step) for step in (1, 3, 1 << 40)]
    others += [starts(micro=1), starts(step=1, micro=2), starts(stream="estimate"), starts(stream="evaluation")]
    assert len({first, *others}) == 11
    np.random.seed(0)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert starts() == first
    assert torch.equal(torch.get_rng_state(), before)


def test_windows_are_the_same_on_every_machine_and_in_every_version(run: Callable[..., str]) -> None:
    # Draws of Philox4x64-10: they may never change, or runs could not be resumed.
    pinned = (558, 535, 815, 364, 720, 41, 46, 346)
    assert starts() == pinned
    code = """
import numpy as np
from tinygpt.data import random_batch
print(random_batch(np.arange(1000, dtype=np.uint16), 8, 4, seed=1, step=2)[0][:, 0].tolist())
"""
    assert run(code).strip() == str(list(pinned))


def test_starts_are_spread_evenly() -> None:
    drawn = np.concatenate([random_batch(TOKENS[:20], 100, 10, seed=0, step=s)[0][:, 0].numpy() for s in range(100)])
    counts = np.bincount(drawn, minlength=10)
    assert len(counts) == 10
    # 10 000 draws over 10 places: chi-squared with 9 degrees of freedom exceeds 27.9 once in a thousand.
    assert ((counts - 1000) ** 2 / 1000).sum() < 27.9


def test_the_estimates_batches_are_fixed_and_apart_from_training() -> None:
    def batches() -> list[list[int]]:
        return [x[:, 0].tolist() for x, _ in random_batches(TOKENS, 5, 8, 4, seed=1)]

    assert batches() == batches()
    assert len({tuple(b) for b in batches()}) == 5
    assert tuple(batches()[2]) == starts(stream="estimate") != starts()


def test_a_batch_costs_little() -> None:
    tokens = np.arange(1_000_000, dtype=np.uint16)
    rounds = []
    for _ in range(5):
        began = time.perf_counter()
        for step in range(200):
            random_batch(tokens, 12, 64, seed=1, step=step)
        rounds.append((time.perf_counter() - began) / 200)
    assert min(rounds) < 100e-6


@pytest.mark.parametrize("length", [2, 5, 16, 17, 18, 64, 65, 66, 100, 129])
def test_a_full_pass_makes_every_token_but_the_first_a_target_once(length: int) -> None:
    tokens = np.arange(100, 100 + length, dtype=np.uint16)
    targets: list[int] = []
    for x, y in consecutive_batches(tokens, 2, 16):
        assert x.shape == y.shape == (2, 16)
        assert x.dtype == y.dtype == torch.int64
        counted = y != -100
        assert (y[counted] == x[counted] + 1).all()
        assert (x[~counted] == 0).all()
        assert counted.any()
        for row in range(2):  # padding only behind
            assert counted[row].tolist() == sorted(counted[row].tolist(), reverse=True)
        targets += y[counted].tolist()
    assert targets == tokens[1:].tolist()


@pytest.mark.parametrize("length", [0, 1])
def test_nothing_can_be_predicted_in_fewer_than_two_tokens(length: int) -> None:
    assert list(consecutive_batches(TOKENS[:length], 2, 16)) == []


def test_a_fixed_subset_is_spread_over_the_whole_split() -> None:
    def subset(count: int) -> list[int]:
        return [int(s) for x, _ in consecutive_batches(TOKENS, 2, 10, count=count) for s in x[:, 0]]

    assert subset(3) == subset(3) == [0, 160, 330, 500, 660, 830]
    assert len(subset(1)) == 2
    everything = [int(s) for x, _ in consecutive_batches(TOKENS, 2, 10) for s in x[:, 0]]
    assert subset(50) == subset(1000) == everything
    assert all(torch.equal(x + 1, y) for x, y in consecutive_batches(TOKENS, 2, 10, count=3))


@pytest.mark.gpu
def test_batches_arrive_on_the_gpu_unchanged() -> None:
    here = random_batch(TOKENS, 8, 16, seed=1, step=2)
    there = random_batch(TOKENS, 8, 16, seed=1, step=2, device="cuda")
    assert all(tensor.is_cuda for tensor in there)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
    digest = hashlib.sha256()
    for x, y in consecutive_batches(TOKENS, 8, 16, device="cuda"):
        digest.update(x.cpu().numpy().tobytes() + y.cpu().numpy().tobytes())
    assert (
        digest.digest()
        == hashlib.sha256(
            b"".join(x.numpy().tobytes() + y.numpy().tobytes() for x, y in consecutive_batches(TOKENS, 8, 16))
        ).digest()
    )
