"""The portable layer itself: its wrappers compute what the PTX manual says, and what must not pass does not.

Fragments and matrices are laid out here from the manual's figures (mma.m16n8k16, ldmatrix), not from the simulation's code.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

NAN = float("nan")
MODES = [("fast", 0), ("seeded", 1), ("seeded", 2), ("check", 3)]
FORMATS = {"bf16": torch.bfloat16, "f16": torch.float16}


@pytest.fixture(params=MODES, ids=lambda m: f"{m[0]}-{m[1]}")
def mode(request, simt):
    simt.mode(*request.param)
    simt.watch_nothing()
    yield request.param[0]
    simt.mode("fast")
    simt.watch_nothing()


def watch(simt, *, read=(), written=()):
    for i, x in enumerate(read):
        simt.watch(x.data_ptr(), list(x.shape), list(x.stride()), x.element_size(), False, True, f"in {i}")
    for i, x in enumerate(written):
        simt.watch(x.data_ptr(), list(x.shape), list(x.stride()), x.element_size(), True, False, f"out {i}")


def bits(x):
    return x.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)


# ---------------------------------------------------------------------------------------------------------------- wrappers


@pytest.mark.parametrize("name", FORMATS)
def test_mma_multiplies_fragments_as_the_manual_lays_them_out(simt, mode, name):
    torch.manual_seed(0)
    dtype = FORMATS[name]
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    fragments, start = np.zeros((32, 6), np.uint32), torch.zeros(32, 4)
    for lane in range(32):
        group, member = lane >> 2, lane % 4
        # a0..a7: row = group for a0, a1, a4, a5, else group + 8; column = 2 member + (i & 1), plus 8 from a4 on
        elements = [
            a[group + (0 if i in (0, 1, 4, 5) else 8), 2 * member + (i & 1) + (8 if i >= 4 else 0)] for i in range(8)
        ]
        # b0..b3: row = 2 member + (i & 1), plus 8 from b2 on; column = group
        elements += [b[2 * member + (i & 1) + (8 if i >= 2 else 0), group] for i in range(4)]
        halves = bits(torch.stack(elements))
        fragments[lane] = halves[0::2] | halves[1::2] << 16
        for i in range(4):  # c0..c3: row = group, plus 8 from c2 on; column = 2 member + (i & 1)
            start[lane, i] = c[group + (8 if i >= 2 else 0), 2 * member + (i & 1)]
    fragments, out = torch.from_numpy(fragments.view(np.int32)), torch.full((32, 4), NAN)
    watch(simt, read=[fragments, start], written=[out])
    simt.mma(name == "bf16", fragments.data_ptr(), start.data_ptr(), out.data_ptr())
    exact = c.double() + a.double() @ b.double()
    for lane in range(32):
        for i in range(4):
            truth = exact[(lane >> 2) + (8 if i >= 2 else 0), 2 * (lane % 4) + (i & 1)].item()
            assert abs(out[lane, i].item() - truth) < 1e-5


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_ldmatrix_hands_out_matrices_as_the_manual_draws_them(simt, mode, count, transposed):
    matrices = torch.arange(count * 64, dtype=torch.int16).view(count, 8, 8)
    out = torch.full((32, count), -1, dtype=torch.int32)
    watch(simt, read=[matrices], written=[out])
    simt.ldmatrix(count, transposed, matrices.data_ptr(), out.data_ptr())
    for lane in range(32):
        for m in range(count):
            matrix = matrices[m].T if transposed else matrices[m]
            low, high = matrix[lane // 4, 2 * (lane % 4)].item(), matrix[lane // 4, 2 * (lane % 4) + 1].item()
            assert out[lane, m].item() == low | high << 16


def test_shuffles(simt, mode):
    x, out = torch.randn(32), torch.full((4, 32), NAN)
    watch(simt, read=[x], written=[out])
    simt.shuffle(x.data_ptr(), out.data_ptr())
    lanes = torch.arange(32)
    assert torch.equal(out[0], x[lanes ^ 5])
    assert torch.equal(out[1], x[(3 * lanes + 1) % 32])
    assert torch.equal(out[2], torch.cat([x[7:], x[25:]]))
    torch.testing.assert_close(out[3], x.sum().expand(32))
    assert (out[3] == out[3, 0]).all()


def test_copies_arrive_group_by_group_and_zeros_where_not_valid(simt, mode):
    x, out = torch.randn(3, 128), torch.full((3, 128), NAN)
    watch(simt, read=[x], written=[out])
    simt.copy(x.data_ptr(), out.data_ptr())
    expected = x.clone()
    expected[2].view(32, 4)[1::2] = 0
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_rounded_as_pytorch_rounds_them(simt, mode, name):
    x = torch.tensor([0.0, -0.0, 1.0, -2.5, 1e-8, 6e-8, 3e-5, 65519.0, 65520.0, 1e30, -1e-45, 3.4e38, float("inf"), -float("inf"),
                      NAN, 1.0009765625, 1.00048828125, 1.00146484375])  # fmt: skip
    x = torch.cat([x, torch.randn(64 - len(x)) * 10.0 ** torch.randint(-9, 9, (64 - len(x),))])
    out, back = torch.zeros(32, dtype=torch.int32), torch.zeros(32)
    watch(simt, read=[x], written=[out, back])
    simt.pack(name == "bf16", x.data_ptr(), out.data_ptr(), back.data_ptr())
    rounded = x.to(FORMATS[name])
    torch.testing.assert_close(out.view(FORMATS[name]), rounded, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, rounded[::2].float(), rtol=0, atol=0, equal_nan=True)


def test_vectors_are_stored_whole(simt, mode):
    x, out = torch.randn(192), torch.full((192,), NAN)
    watch(simt, read=[x], written=[out])
    simt.store(x.data_ptr(), out.data_ptr())
    assert torch.equal(out, x)


def test_powers_of_two(simt, mode):
    x, out = (
        torch.cat([torch.randn(28) * 20, torch.tensor([0.0, -126.0, -float("inf"), float("inf")])]),
        torch.full((32,), NAN),
    )
    watch(simt, read=[x], written=[out])
    simt.power(x.data_ptr(), out.data_ptr())
    torch.testing.assert_close(out, x.double().exp2().float(), rtol=3e-7, atol=1.2e-38)


def test_atomics_of_many_blocks_add_up(simt, mode):
    total = torch.zeros(1)
    simt.watch(total.data_ptr(), [1], [1], 4, True, True, "total")
    simt.count(total.data_ptr())
    assert total.item() == 192


def test_threads_and_blocks_have_their_coordinates(simt, mode):
    out = torch.full((4, 3, 2, 4), NAN)
    watch(simt, written=[out])
    simt.number(out.data_ptr())
    by, bx, z, y, x = torch.meshgrid(*(torch.arange(n) for n in (2, 2, 3, 2, 4)), indexing="ij")
    assert torch.equal(out, (x + 10 * y + 100 * z + 1000 * bx + 10000 * by).float().view(4, 3, 2, 4))


# ---------------------------------------------------------------------------------------------------------- what must not pass

# kernel of wrappers.cu -> what the message must say; the line is looked up in the source. In every mode:
ALWAYS = {
    "divergent": "while others of its warp are in __shfl_xor_sync",
    "exited": "has exited, while its warp waits for it|which has exited",
    "not_in_mask": "with mask 0000ffff, in which it is not",
    "exited_barrier": "has exited, while thread .* waits at this __syncthreads",
    "two_barriers": "waits at this __syncthreads, while thread .* waits at that of wrappers.cu:",
    "barrier_and_shuffle": "waits for its warp, while thread 40 waits at the __syncthreads of wrappers.cu:",
    "too_much_shared": "needs 512 bytes of dynamic shared memory, but the launch gave 256",
    "misaligned_copy": "cp.async needs addresses that are multiples of 16",
    "misaligned_matrix": "ldmatrix needs addresses that are multiples of 16",
    "misaligned_vector": "reads 16 bytes at an address that is no multiple of 16",
}
CHECKED = {
    "race": "reads what nobody has written, in shared memory|race: .* in shared memory",
    "race_after_read": "race: (writes what .* read|reads what .* wrote), with nothing between, in shared memory",
    "shuffle_as_fence": "race: reads what thread .* wrote|reads what nobody has written",
    "writes_input": "writes to in 0, which is only read",
    "past_the_end": "reads 4 bytes where no tensor of the call lies|beside|past the end",
    "past_shared": "writes outside of every array and view, beside shared memory",
    "between_elements": "writes outside of every array and view, beside out 0",
    "uninitialised": "reads what nobody has written, in shared memory",
    "reads_output": "reads what nobody has written, in out 0",
    "before_the_wait": "reads what a cp.async is still to bring, in shared memory",
    "wait_without_barrier": "reads what nobody has written|race: reads|a cp.async is still to bring",
    "never_waits": "ends with a cp.async that it never waited for",
    "adds_without_atomics": "reads what nobody has written, in out 0",
    "blocks_share": "race: writes what thread .* of block .* wrote, with nothing between, in out 0",
}
RIGHT = ("reversed", "warp_fence")


def attempt(simt, kernel):
    x = torch.randn(64)
    out = torch.full((128,), NAN)
    watch(simt, read=[x], written=[out[::2] if kernel == "between_elements" else out[:64]])
    simt.run(kernel, x.data_ptr(), out.data_ptr(), 2 if kernel == "blocks_share" else 1, 256)
    return x, out


@pytest.mark.parametrize("kernel", ALWAYS)
def test_in_every_mode_what_no_gpu_could_do_is_told_with_its_place(simt, mode, kernel):
    with pytest.raises(RuntimeError, match=ALWAYS[kernel]) as told:
        attempt(simt, kernel)
    message = str(told.value)
    assert message.startswith(f"{kernel}: block (0, 0, 0), thread ")
    assert ", wrappers.cu:" in message


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kernel", CHECKED)
def test_the_checker_tells_of_every_race_and_stray_access(simt, kernel, seed):
    simt.watch_nothing()
    simt.mode("check", seed)
    with pytest.raises(RuntimeError, match=CHECKED[kernel]):
        attempt(simt, kernel)
    simt.mode("fast")


@pytest.mark.parametrize("kernel", RIGHT)
def test_what_is_right_passes(simt, mode, kernel):
    x, out = attempt(simt, kernel)
    assert torch.equal(out[:64], x.flip(0) if kernel == "reversed" else x[torch.arange(64) ^ 1])
    assert out[64:].isnan().all()


def test_parity_alone_would_not_have_found_them(simt):
    """In the order of their numbers the threads of nearly all of these kernels do no harm: that is what the checker is for."""
    simt.mode("fast")
    harmless = 0
    for kernel in CHECKED:
        attempt(simt, kernel)
        harmless += 1
    assert harmless == len(CHECKED)


def test_the_line_of_an_access_is_in_the_message(simt):
    simt.watch_nothing()
    simt.mode("check", 1)
    with pytest.raises(RuntimeError) as told:
        attempt(simt, "reads_output")
    simt.mode("fast")
    source = (__import__("pathlib").Path(__file__).parent / "wrappers.cu").read_text().splitlines()
    line = next(i for i, text in enumerate(source, 1) if "void reads_output" in text)
    assert f"wrappers.cu:{line}" in str(told.value) or f"wrappers.cu:{line + 1}" in str(told.value)


@pytest.mark.slow
def test_fibers_switch_without_assembly_too():
    """What other processors than x86-64 do."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "not fibers"]
    found = subprocess.run(
        command, env={**os.environ, "TINYGPT_SIMT_FLAGS": "-DSIMT_PORTABLE"}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout[-3000:]
    assert "passed" in found.stdout


def test_an_unknown_mode_is_refused(simt):
    with pytest.raises(ValueError, match="mode slow is none of fast, seeded, check"):
        simt.mode("slow")
