"""Peak memory of one call or one step, each in a process of its own.

    python benchmarks/memory.py op attention cpp B=1,H=2,T=8192,D=64
    python benchmarks/memory.py step 'tinygpt, cpp' char-cpu

Prints JSON, in bytes. Of an op, `peak` is how far the process's resident memory rose above where it stood before the call, and
`temporaries` what of it is neither output nor gradient; of a step, the most the process ever held. The system's high-water mark is
read, so that nothing escapes: torch's allocator, the extension's buffers, a library's workspace. It counts pages: below a
megabyte it means little.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

MEMORY = {
    "attention": tuple(f"B=1,H=2,T={T},D=64" for T in (1024, 2048, 4096, 8192)),
    "linear_cross_entropy": ("R=8192,C=384,V=50304",),
}


def of_op(op: str, backend: str, shape: str) -> dict[str, int]:
    """Forward and backward of an op, in a process of its own; `shape` as `tinygpt bench --shape` takes it."""
    return _asked("op", op, backend, shape)


def of_step(candidate: str, config: str) -> dict[str, int]:
    """A few training steps in a process of its own: the most it ever held, Python and libraries included."""
    return _asked("step", candidate, config)


def _asked(*arguments: str) -> dict[str, int]:
    found = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(
            f"{' '.join(arguments)}: {found.stderr.strip().splitlines()[-1] if found.stderr else found.returncode}"
        )
    answer: dict[str, int] = json.loads(found.stdout.splitlines()[-1])
    return answer


def _rise(run: Callable[[], object]) -> tuple[int, object]:
    """How far the resident memory rose while something ran, and what that returned."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident now
    before = _status("VmRSS")
    kept = run()
    return _status("VmHWM") - before, kept


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}: peak memory is read on Linux only")


def _op(op: str, backend: str, shape: str) -> dict[str, int]:
    import torch

    from tinygpt_kernels.dispatch import all_ops
    from tinygpt_kernels.workloads import Workload, workload

    asked = workload(op, shape)
    sizes = dict(asked.sizes)
    small = {"attention": {"T": 64.0, "S": 64.0}, "attention_qkv": {"T": 64.0}}.get(
        op, {"R": 16.0} if "R" in sizes else {}
    )

    def prepared(of: Workload) -> Callable[[], list[torch.Tensor]]:
        args, kwargs = of.case.build(torch.float32)
        named = dict(zip(all_ops()[op].order, all_ops()[op].flatten(*args, **kwargs), strict=True))
        leaves = [t.requires_grad_() for t in named.values() if isinstance(t, torch.Tensor) and t.is_floating_point()]
        bound = all_ops()[op].on(backend)

        def run() -> list[torch.Tensor]:
            out = bound(**named)
            outputs = list(out) if isinstance(out, tuple) else [out]
            upstream = [torch.ones((), dtype=o.dtype).expand(o.shape) for o in outputs]
            return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]

        return run

    prepared(Workload(op, tuple((sizes | small).items())))()  # what a first call loads is no part of it
    peak, kept = _rise(prepared(asked))
    assert isinstance(kept, list)
    results = sum(t.untyped_storage().nbytes() for t in kept)
    return {"peak": peak, "results": results, "temporaries": max(0, peak - results)}


def _step(candidate: str, config: str) -> dict[str, int]:
    import bench_training_step as steps

    run = steps.MAKERS[candidate](steps.CONFIGS[config][0])
    for _ in range(5):
        run()
    return {"peak": _status("VmHWM")}


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    print(json.dumps({"op": _op, "step": _step}[kind](*rest)))
