"""The ladder: every rung is right in every mode, counts fall where its text says so, one's own is told what is wrong."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tinygpt_kernels import ladder
from tinygpt_kernels.ladder import build

RUNGS = {op: ladder.rungs(op) for op in ladder.OPS}
FOUND = [pytest.param(rung, id=f"{op}-{rung.title}") for op, found in RUNGS.items() for rung in found]


@pytest.fixture(scope="session", autouse=True)
def compiler(simt):
    """None, no test: as for the simulation itself."""


def test_there_are_the_rungs_that_the_readme_names():
    assert [r.title for r in RUNGS["attention"]] == ["naive", "tiled", "online", "tensor cores", "pipelined"]
    assert [r.title for r in RUNGS["layer_norm"]] == ["naive", "one warp a row", "vectors"]


@pytest.mark.parametrize("rung", FOUND)
def test_a_rung_is_right(rung):
    verdict = ladder.judge(rung)
    assert verdict.wrong == ()
    assert verdict.runs >= 20


@pytest.mark.parametrize("rung", FOUND)
def test_a_rung_explains_itself(rung):
    assert rung.idea
    assert len(rung.why) > 200
    assert len(rung.path.read_text().splitlines()) < 130


@pytest.mark.parametrize("op", ladder.OPS)
def test_counts_fall_where_the_text_says_so(op):
    counted = ladder.costs(RUNGS[op])
    claims = 0
    for rung, before, after in zip(RUNGS[op][1:], counted, counted[1:], strict=False):
        for name in rung.lower:
            assert getattr(after, name) < getattr(before, name), f"{rung.title}: {name}"
            claims += 1
        assert rung.lower
        assert after.conflicts == 0
    assert claims >= len(counted)


def test_what_is_counted_is_what_can_be_counted_by_hand():
    naive, warp, vectors = ladder.costs(RUNGS["layer_norm"])
    rows, cols = 64, 768
    numbers = rows * cols * 2  # bytes of x or y
    assert warp.asked == 3 * numbers + 2 * numbers + numbers  # x three times, weight and bias for each row, y
    assert warp.requests == warp.asked // 64
    assert warp.moved == warp.asked
    assert vectors.asked == warp.asked - 2 * numbers
    assert vectors.requests == vectors.asked // 512
    assert vectors.wide == 1.0
    assert warp.shuffles == vectors.shuffles == rows * 2 * 5
    # A thread a row: x and y cost a sector each lane and number; weight and bias, the same for all lanes, one a warp.
    assert naive.moved == 4 * rows * cols * 32 + 2 * rows // 32 * cols * 32
    pipelined = ladder.costs(RUNGS["attention"])[-1]
    tiles = sum(range(1, 256 // 64 + 1))  # of 64 x 64 scores that a causal row of blocks sees
    assert pipelined.products == tiles * 4 * (2 * 8 * 4)  # 4 warps, two products of 16 x 64 x 64
    assert pipelined.barriers == tiles


def mine(tmp_path, change, title="tiled", op="attention"):
    """A copy of a rung with a change, which must change something."""
    source = next(r for r in RUNGS[op] if r.title == title).path.read_text()
    changed = source.replace(*change, 1)
    assert changed != source
    path = tmp_path / "mine.cu"
    path.write_text(changed)
    return ladder.read(path)


@pytest.mark.parametrize(("change", "title", "told"), [
    (("if (t < a.T && s <= t) a.scores", "if (t < a.T && s < t) a.scores"), "tiled", "NaN|nobody has written|wrong numbers"),
    (("sum * kScale", "sum * 0.1f"), "naive", "wrong numbers"),
    (("        __syncthreads();  // the tile before is done with", ""), "online", "race: .* mine.cu|mine.cu:.*race"),
    (("count ? from[i]", "kTile ? from[i]"), "tiled", "mine.cu:.* (past the end|where no tensor)"),
    (("        __syncwarp();", "        __syncthreads(); if (x == 0) __syncwarp();"), "online", "mine.cu"),
    (("simt::cp_async_wait<0>();\n            __syncthreads", "simt::cp_async_wait<1>();\n            __syncthreads"), "pipelined",
     "cp.async"),
])  # fmt: skip
def test_a_rung_of_ones_own_is_told_what_is_wrong(tmp_path, change, title, told):
    verdict = ladder.judge(mine(tmp_path, change, title))
    assert verdict.wrong
    assert re.search(told, "\n".join(verdict.wrong)), verdict.wrong


def test_what_does_not_compile_is_said_in_the_compilers_words(tmp_path):
    rung = mine(tmp_path, ("const int row", "const itn row"), "one warp a row", "layer_norm")
    with pytest.raises(ladder.LadderError, match="itn"):
        ladder.judge(rung)


def test_a_file_that_is_no_rung(tmp_path):
    path = tmp_path / "other.cu"
    path.write_text("int main() { return 0; }\n")
    with pytest.raises(ladder.LadderError, match="TINYGPT_RUNG"):
        ladder.read(path)


def test_without_sources_or_a_compiler_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(ladder.LadderError, match="C\\+\\+ compiler"):
        build._compiler()
    monkeypatch.setattr(build, "CUDA", Path("/nowhere"))
    with pytest.raises(ladder.LadderError, match="clone the repository"):
        build._compiler()


def command(*args, cwd):
    return subprocess.run([sys.executable, "-m", "tinygpt", "ladder", *args], capture_output=True, text=True, cwd=cwd)


def test_the_command_prints_the_table_draws_the_plot_and_judges_a_rung(tmp_path):
    wrong = mine(tmp_path, ("sum(squares)", "sum(sum)"), "vectors", "layer_norm")
    done = command("--mine", str(wrong.path), cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "mine.cu is not right yet" in done.stdout
    assert "wrong numbers" in done.stdout
    for title in ("naive", "one warp a row", "vectors", "requests", "waited"):
        assert title in done.stdout
    assert "pipelined" not in done.stdout  # only the ladder that the file belongs to
    assert (tmp_path / "ladder.png").stat().st_size > 10_000
    right = replace(wrong, path=tmp_path / "right.cu")
    right.path.write_text(RUNGS["layer_norm"][0].path.read_text())
    done = command("layer_norm", "--mine", "right.cu", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"op": "layer_norm"') == 4


@pytest.mark.parametrize(("args", "told"), [
    (("atention",), "did you mean attention"), (("--mine", "none.cu"), "no such file: none.cu"),
    (("--plot", "nowhere/x.png"), "there is no directory"),
    *([] if build.shutil.which("nvcc") and Path("/dev/nvidia0").exists() else [(("layer_norm", "--time"), "--time needs")]),
])  # fmt: skip
def test_bad_arguments(tmp_path, args, told):
    done = command(*args, cwd=tmp_path)
    assert done.returncode != 0
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.gpu
def test_every_rung_on_a_gpu():
    """Right there too, compiled by nvcc; the times are positive."""
    import torch

    from tinygpt_kernels.ladder import climb

    for op, found in RUNGS.items():
        for rung in found:
            inputs = [x.normal_() for x in climb._inputs(op, "cuda")]
            call, argument, y, _kept = climb._prepared(op, build.for_gpu(rung.path), *inputs)
            assert call(climb.ctypes.byref(argument), torch.cuda.current_stream().cuda_stream) is None
            if op == "attention":
                expected = torch.nn.functional.scaled_dot_product_attention(
                    *(x.float()[None] for x in inputs), is_causal=True
                )[0]
            else:
                expected = torch.nn.functional.layer_norm(
                    inputs[0].float(), inputs[0].shape[1:], *(x.float() for x in inputs[1:])
                )
            torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)
        assert all(s > 0 for s in ladder.seconds(found))
