"""What nvcc makes of the kernels: for every architecture they fit a GPU, spill nothing, and stay within recorded registers.

budgets.json holds the registers of a thread for one version of nvcc. After a change for the better:
    python tests/cuda/test_nvcc.py
"""

import json
from functools import lru_cache
from pathlib import Path

import pytest

from tinygpt_kernels import _C
from tinygpt_kernels.gpu_report import cuda

BUDGET = Path(__file__).with_name("budgets.json")
BUILT = getattr(_C, "cuda_architectures", None)
ARCHITECTURES = [int(a.removesuffix("-real")) for a in BUILT.split(",")] if BUILT else []
pytestmark = pytest.mark.skipif(not BUILT, reason="this build has no CUDA kernels: there was no nvcc")


reports = lru_cache(cuda.reports)


def registers():
    return {f"sm_{arch}": {r.kernel: r.registers for r in reports(arch)} for arch in ARCHITECTURES}


@pytest.mark.parametrize("arch", [pytest.param(a, marks=[pytest.mark.slow] * (a != 90)) for a in ARCHITECTURES])
def test_no_kernel_spills_and_an_sm_holds_at_least_eight_warps(arch):
    found = reports(arch)
    assert {r.kernel.split()[0] for r in found if ".cu " in r.kernel} == {
        p.name for p in (Path(__file__).parents[2] / "csrc/cuda").glob("*.cu")
    }
    assert [r.kernel for r in found if r.spill] == []
    assert [r.kernel for r in found if r.resident_warps < 8 and r.warps > 1] == []


@pytest.mark.slow
def test_registers_stay_within_the_budget_of_this_nvcc():
    recorded = json.loads(BUDGET.read_text())
    if recorded["nvcc"] != _C.cuda_compiler:
        pytest.skip(f"recorded for nvcc {recorded['nvcc']}, and this is {_C.cuda_compiler}")
    for arch, now in registers().items():
        if arch in recorded:
            assert now.keys() == recorded[arch].keys(), "a kernel is new or gone: record the budget anew"
            more = {name: (n, recorded[arch][name]) for name, n in now.items() if n > recorded[arch][name]}
            assert not more, f"{arch}: more registers than recorded: {more}"


@pytest.mark.parametrize(("mangled", "name"), [
    ("_ZN7tinygpt4cuda46_GLOBAL__N__eaa57a13_13_layer_norm_cu_ca36b8478backwardI13__nv_bfloat16Lb0EEEvNS_12LayerNormBwdEPf",
     "layer_norm.cu backward<bfloat16, false>"),
    ("_ZN7tinygpt4cuda45_GLOBAL__N__eaa57a13_12_optimizer_cu_ca36b84710one_kernelENS_5AdamWE", "optimizer.cu one_kernel"),
    ("_ZN7tinygpt4cuda10add_sharesILi2EEEvNS0_6SharesIXT_EEE", "add_shares<2>"),  # of a header
])  # fmt: skip
def test_names_can_be_read(mangled, name):
    assert cuda.readable(mangled) == name


if __name__ == "__main__":
    kept = {"counts": json.loads(BUDGET.read_text()).get("counts", {})}
    BUDGET.write_text(json.dumps({"nvcc": _C.cuda_compiler} | registers() | kept, indent=1) + "\n")
