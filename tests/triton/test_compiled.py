"""The machine code of GPUs that are not here: what it must be whatever the version of Triton, and what it was for this one.

budgets/triton-X.Y.json holds the figures of the kernels for one version of Triton, tile sizes beside them. After a change for
the better: `python tests/triton/test_compiled.py` writes the file for the version installed.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import triton

VERSION = ".".join(triton.__version__.split(".")[:2])
BUDGET = Path(__file__).parent / "budgets" / f"triton-{VERSION}.json"
# The best public kernels, non-MMA instructions per unit of the unmasked loop (bfloat16, Triton 3.9), and 5 % above.
PEERS = {
    ("attention_fwd", 64): {80: 4.52, 90: 3.95}, ("attention_fwd", 128): {80: 3.36, 90: 1.97},
    ("attention_bwd_dkdv", 64): {80: 2.98, 90: 2.41}, ("attention_bwd_dkdv", 128): {80: 3.36, 90: 2.09},
    ("attention_bwd_dq", 64): {80: 2.85, 90: 2.62}, ("attention_bwd_dq", 128): {80: 2.15, 90: 2.25},
}  # fmt: skip
# Thread-instructions per byte of device memory.
PER_BYTE = {
    "layer_norm C=768: layer_norm_fwd": 6.5, "layer_norm C=4096: layer_norm_fwd": 4.8,
    "layer_norm C=768: layer_norm_bwd": 5.4, "layer_norm C=4096: layer_norm_bwd": 2.9,
    "cross_entropy V=50304: cross_entropy_fwd": 4.0, "cross_entropy V=50304: cross_entropy_bwd": 4.0,
    "cross_entropy V=50257: cross_entropy_fwd": 5.8, "cross_entropy V=50257: cross_entropy_bwd": 5.8,
    "gelu none: gelu_fwd": 5.5, "gelu none: gelu_bwd": 5.5, "gelu tanh: gelu_fwd": 5.5, "gelu tanh: gelu_bwd": 5.5,
}  # fmt: skip


def report(*options, cache):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-m", "tinygpt", "gpu-report", "--backend", "triton", "--json", *options]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-4000:]
    assert "FP_FUSION" not in found.stderr  # every launch asks for fusion itself
    return [json.loads(line) for line in found.stdout.splitlines()]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    with ThreadPoolExecutor() as pool:
        parts = pool.map(lambda arch: report("--arch", arch, cache=tmp_path_factory.mktemp("triton")), ("80", "90"))
        return [row for part in parts for row in part]


def by_kernel(rows, arch):
    return {row["kernel"]: row for row in rows if row["arch"] == arch}


def test_nothing_spills_and_enough_warps_are_resident(rows):
    assert len(rows) > 50
    assert [(r["kernel"], r["arch"], r["spill"]) for r in rows if r["spill"]] == []
    assert [(r["kernel"], r["arch"]) for r in rows if r["resident_warps"] < 8] == []


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("kernel", "D"), PEERS, ids=str)
def test_attention_keeps_tensor_cores_as_busy_as_the_best_peers_do(rows, kernel, D, arch):
    row = by_kernel(rows, arch)[f"attention D={D} bfloat16: {kernel}"]
    unmasked = min(row["non_mma_per_unit"])
    assert unmasked <= 1.05 * PEERS[kernel, D][arch]
    shape = "HGMMA" if arch == 90 else "HMMA.16816"
    assert all(name.startswith(shape) for name in row["tensor_core"])


@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_that_wait_for_memory_issue_few_instructions_and_wide_accesses(rows, arch):
    found = by_kernel(rows, arch)
    for name, most in PER_BYTE.items():
        assert found[name]["per_byte"] <= most, name
        # 0.947: beside nine 128-bit accesses, layer norm's backward loads two numbers per row, the same for a whole warp
        assert round(found[name]["wide_share"], 2) >= 0.95, name


def test_descriptors_are_what_hopper_loads_with(rows):
    assert by_kernel(rows, 90)["attention D=128 bfloat16: attention_fwd"]["options"]["TMA"]
    assert not by_kernel(rows, 80)["attention D=128 bfloat16: attention_fwd"]["options"]["TMA"]


def budget(rows):
    """What is recorded: sizes of tiles, and the figures that must not grow."""
    kept = ("registers", "spill", "shared", "resident_warps", "non_mma_per_unit", "per_byte", "wide_share")
    found = {}
    for row in rows:
        tile = {k: v for k, v in row["options"].items() if k.startswith(("BLOCK", "ROWS", "num_"))}
        found[f"sm_{row['arch']} {row['kernel']}"] = {"tile": tile} | {k: row[k] for k in kept if k in row}
    return found


@pytest.mark.skipif(not BUDGET.exists(), reason=f"no figures were recorded for Triton {triton.__version__}")
def test_figures_stay_within_the_budget_of_this_triton(rows):
    recorded, now = json.loads(BUDGET.read_text()), budget(rows)
    assert now.keys() == recorded.keys()
    worse = []
    for name, then in recorded.items():
        assert now[name]["tile"] == then["tile"], f"{name}: record the figures of the new tile"
        for figure in ("spill", "non_mma_per_unit", "per_byte"):
            before, after = (x.get(figure) for x in (then, now[name]))
            pairs = zip(before, after, strict=True) if isinstance(before, list) else [(before, after)]
            worse += [(name, figure, b, a) for b, a in pairs if b is not None and a > 1.03 * b]
        if now[name]["resident_warps"] < then["resident_warps"]:
            worse.append((name, "resident_warps", then["resident_warps"], now[name]["resident_warps"]))
    assert worse == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["100", "gfx942"])
def test_other_targets_compile(arch, tmp_path):
    found = report("--arch", arch, cache=tmp_path)
    assert {"attention D=64 bfloat16: attention_bwd_dkdv", "cross_entropy V=50257: cross_entropy_fwd"} <= {
        r["kernel"] for r in found
    }
    if arch == "100":  # tcgen05's tensor memory, not registers, holds what is accumulated
        assert any(n.startswith("UTC") for r in found if "attention" in r["kernel"] for n in r["tensor_core"])


# What a compiler spills all the same, by (version, architecture): float32 is not tuned, and 8 bytes are one register of a thread.
SPILLS = {("3.8", "90"): [("attention D=256 float32: attention_fwd", 8)]}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90"])
def test_every_kind_of_call_compiles_without_a_spill(arch, tmp_path):
    found = report("--arch", arch, "--every", cache=tmp_path)
    assert len(found) > 80
    assert [(r["kernel"], r["spill"]) for r in found if r["spill"]] == SPILLS.get((VERSION, arch), [])
    assert [r["kernel"] for r in found if r["registers"] == 32 and r["spill"]] == []


if __name__ == "__main__":
    import tempfile

    BUDGET.parent.mkdir(exist_ok=True)
    BUDGET.write_text(json.dumps(budget(report("--arch", "80", "90", cache=tempfile.mkdtemp())), indent=1) + "\n")
    print(f"wrote {BUDGET}")
