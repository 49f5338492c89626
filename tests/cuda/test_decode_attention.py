"""decode_attention on CUDA kernels, executed on the CPU: how the cache is split, and what lies in it beyond a row's length."""

import pytest
import simulation
import torch

from tinygpt_kernels import dispatch, ops
from tinygpt_kernels.native.cuda import decode_attention as launcher

dispatch.load_backend("cuda")
F32, F16 = 0, 1  # the module's numbers for dtypes


@pytest.mark.parametrize(("B", "S", "H", "K", "D", "dtype"), [
    (1, 1024, 12, 12, 64, F16), (1, 2048, 32, 8, 128, F16), (1, 4096, 4, 1, 64, F32), (4, 1024, 6, 6, 64, F16),
    (1, 8192, 8, 1, 32, F16),
])  # fmt: skip
def test_few_rows_fill_a_gpu(simt, B, S, H, K, D, dtype):
    heads = K * -(-H // K // 4)  # blocks of a row: up to four heads of a group in each
    splits = simt.cuda_decode_attention_splits(B, S, H, K, D, dtype)
    assert 100 <= B * heads * splits <= 400


@pytest.mark.parametrize(("sizes", "splits"), [
    ((64, 1024, 12, 12, 64, F16), 1),  # the batch fills it
    ((1, 64, 1, 1, 64, F16), 1),  # as many keys as a block reads at once
    ((1, 65, 1, 1, 64, F16), 2),
    ((1, 65, 1, 1, 64, F32), 3),
    ((1, 1 << 20, 1, 1, 64, F16), 128),
    ((0, 64, 1, 1, 64, F16), 1),
    ((1, 0, 1, 1, 64, F16), 1),
])  # fmt: skip
def test_splits(simt, sizes, splits):
    assert simt.cuda_decode_attention_splits(*sizes) == splits


@pytest.mark.parametrize("S", [40, 700])
def test_what_lies_beyond_a_rows_length_does_not_matter(simt, S):
    q, k, v = torch.randn(3, 4, 64), torch.randn(3, S, 2, 64), torch.randn(3, S, 2, 64)
    lengths = torch.tensor([S // 2, 1, 0], dtype=torch.int32)
    expected = ops.decode_attention.on("reference")(q, k, v, lengths)
    for b, length in enumerate(lengths):
        k[b, length:] = v[b, length:] = torch.nan
    out = torch.full_like(q, torch.nan)
    with simulation.simulated(simt, "check", 1):
        (y,) = launcher.decode_attention_fwd(q, k, v, lengths, None, out=(out,))
    assert y is out
    torch.testing.assert_close(y, expected)
    assert (y[2] == 0).all()


def test_a_long_row_is_not_weighed_by_its_first_score_alone(simt):
    """Scores that grow along the cache: every slot, warp and split has to shrink what it added up before."""
    q, k, v = (
        torch.ones(1, 1, 32),
        torch.linspace(-0.5, 0.5, 600).view(1, 600, 1, 1).expand(1, 600, 1, 32),
        torch.randn(1, 600, 1, 32),
    )
    lengths = torch.tensor([600])
    for keys in (k, k.flip(1)):
        with simulation.simulated(simt, "check", 1):
            (y,) = launcher.decode_attention_fwd(q, keys, v, lengths, 1.0)
        torch.testing.assert_close(y, ops.decode_attention.on("reference")(q, keys, v, lengths, 1.0))


def test_a_buffer_that_does_not_fit_is_refused(simt):
    q, cache = torch.randn(2, 2, 32), torch.randn(2, 5, 2, 32)
    with (
        simulation.simulated(simt, "fast"),
        pytest.raises(ValueError, match="decode_attention on cuda: an out buffer must be"),
    ):
        launcher.decode_attention_fwd(q, cache, cache, torch.tensor([1, 1]), None, out=(torch.empty(2, 2, 16),))
