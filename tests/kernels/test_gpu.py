"""On a real GPU: every backend that serves there, against the oracle, and against its own CPU results."""

import pytest
import torch

from tinygpt_kernels import dispatch, parity
from tinygpt_kernels.cases import CASES
from tinygpt_kernels.dispatch import all_ops, known_backends


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.name}")
def test_parity_on_the_gpu(case, dtype):
    served = [
        backend
        for backend in known_backends()
        if dispatch.reason(backend, parity.call_of(all_ops()[case.op], case, dtype, "cuda")) is None
    ]
    assert "reference" in served
    failures = []
    for backend in served:
        try:
            parity.check(case, backend, dtype, "cuda")
        except Exception as error:
            failures.append(f"{backend}: {type(error).__name__}: {error}")
    assert not failures, "\n\n".join(failures)
