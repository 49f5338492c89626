"""What must serve: op x feature x backend x device x dtype, committed. A cell that starts to refuse turns this red.

To accept a change, look at the difference and run `python tests/kernels/test_matrix.py > tests/kernels/serving_matrix.txt`.
"""

import difflib
from dataclasses import replace
from pathlib import Path

import torch

from tinygpt_kernels import dispatch, parity
from tinygpt_kernels.cases import CASES
from tinygpt_kernels.spec import BUILTIN

COMMITTED = Path(__file__).with_name("serving_matrix.txt")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def matrix():
    """One line per cell; asks the capability data alone, so it is the same on every machine."""
    calls = {}
    for case in CASES:
        call = parity.call_of(dispatch.all_ops()[case.op], case, torch.float32)
        features = "+".join((*call.features, *(["grad"] if call.grad else []))) or "plain"
        calls.setdefault((case.op, features), []).append(call)
    lines = []
    for (op, features), kinds in calls.items():
        for backend in BUILTIN:
            for device, sm in (("cpu", None), ("cuda:0", 80)):
                served = [
                    str(dtype).removeprefix("torch.")
                    for dtype in DTYPES
                    if all(
                        dispatch.reason(backend, replace(c, device=device, sm=sm, dtype=dtype), anywhere=True) is None
                        for c in kinds
                    )
                ]
                if served:
                    lines.append(f"{op:<22}{features:<28}{backend:<11}{device:<8}{' '.join(served)}")
    return lines


def test_nothing_that_served_refuses_and_nothing_serves_unannounced():
    committed = COMMITTED.read_text().splitlines()
    difference = list(difflib.unified_diff(committed, matrix(), "committed", "now", lineterm="", n=0))
    assert not difference, "\n".join(difference)


if __name__ == "__main__":
    print("\n".join(matrix()))
