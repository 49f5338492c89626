"""One workload on several backends: right first, then timed in turn in one process.

The gate holds every backend to the parity rule on the very inputs that are timed; who fails it is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import dispatch, parity, saved, timing
from .dispatch import Call, all_ops
from .spec import known_backends
from .workloads import Work, Workload

# The op without gradients; the op under autograd; the pair of kernels over buffers that are there, as a written-out step runs it.
FORWARD, BOTH, KERNELS = "forward", "forward+backward", "kernels alone"
Times = dict[str, list[float]]
_TIE = 1.02  # below this ratio of medians nobody is called faster than torch


@dataclass(frozen=True)
class Measurement:
    """What was found. Seconds per call, one figure per round, by pass (forward, forward+backward, kernels alone) and backend.

    A backend without kernels of its own stands among the kernels with its forward and backward: that is what it costs there. On a
    GPU what stands among the kernels was captured into a graph, everybody's (timing.captured): only the GPU's time counts there.

    copies: of a copy that moves as many bytes as the pass, taken in the same rounds; only where the work is bytes.
    matmul_rate: FLOP/s of a large product, measured once per process. refused, wrong: who was not timed, and why.
    gated: what the gate looked at, where that was less than what is timed.
    """

    workload: Workload
    dtype: torch.dtype
    device: str
    threads: int
    work: Work
    seconds: dict[str, Times]
    copies: dict[str, list[float]]
    matmul_rate: float
    refused: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    gated: Workload | None = None

    def amount(self, pass_: str) -> float:
        """Operations or bytes of one pass."""
        return _amount(self.work, pass_)

    def rate(self, pass_: str, name: str) -> float:
        """Operations or bytes per second."""
        return self.amount(pass_) / timing.median(self.seconds[pass_][name])

    def ceiling(self, pass_: str) -> float:
        """What this machine does at most: its large matrix product's rate, or a copy's of the same size."""
        if self.work.unit == "FLOP":
            return self.matmul_rate
        return self.amount(pass_) / timing.median(self.copies.get(pass_, self.copies.get(BOTH, self.copies[FORWARD])))

    def ratio(self, pass_: str, name: str, peer: str = "torch") -> float | None:
        """How many times faster than a peer; None when that was not timed."""
        times = self.seconds[pass_]
        return timing.ratio(times[peer], times[name]) if peer in times and name in times else None

    def ranking(self, pass_: str) -> tuple[str, ...]:
        """Backends that were faster than `torch` in three of four rounds at least, the fastest first; without `torch` all."""
        times = self.seconds[pass_]
        names = [name for name in times if name in known_backends() and name not in ("reference", "torch")]
        if "torch" in times:
            names = [name for name in names if _clearly_faster(times["torch"], times[name])]
        return tuple(sorted(names, key=lambda name: timing.median(times[name])))

    def winner(self, pass_: str) -> str:
        """The fastest; `torch` where nobody is clearly faster than that."""
        return (*self.ranking(pass_), "torch")[0]

    def call(self, pass_: str) -> Call:
        """The kind of call that a pass is."""
        args, kwargs = unseeded(self.workload, self.dtype, self.device)
        return all_ops()[self.workload.op].call(*args, grad=pass_ != FORWARD, **kwargs)

    def auto(self, pass_: str) -> str:
        """What `auto` picks for it now."""
        return dispatch.choose(self.call(pass_), ("auto",)).backend

    def findings(self) -> list[saved.Entry]:
        """What there is to remember of it; nothing without `torch` among what was timed.

        Of calls with gradients the kernels alone decide: a training step runs those, and has to leave everything to autograd when
        one op is on `torch`. Under autograd a small op can be slower than PyTorch's, by what a function in Python costs.
        """
        entries = []
        for pass_, times in self.seconds.items():
            if "torch" in times and not (pass_ == BOTH and KERNELS in self.seconds):
                order = self.ranking(pass_)
                ratio = (self.ratio(pass_, order[0]) if order else None) or 1.0
                entries.append(saved.entry(self.call(pass_), order, round(ratio, 3)))
        return entries


def measure(
    workload: Workload, backends: Sequence[str], dtype: torch.dtype = torch.float32, device: str = "cpu", *,
    others: Mapping[str, Callable[..., Any]] | None = None, pairs: Mapping[str, timing.Run] | None = None,
    rounds: int = 25, budget: float = 20.0,
) -> Measurement:  # fmt: skip
    """Gate, then time backends and other functions on one workload.

    Args:
        others: functions with the op's signature, timed beside the backends; held to the same gate.
        pairs: of these, forward and backward without autograd, timed among the kernels.
        rounds, budget: as in timing.interleaved.
    """
    op = all_ops()[workload.op]
    runs: dict[str, Callable[..., Any]] = {name: op.on(name) for name in backends} | dict(others or {})
    refused, wrong = {}, {}
    gated = workload.for_oracle()
    for name in list(runs):
        why = refusal(workload, name, dtype, device) if name in backends else None
        if why:
            refused[name] = why
        elif found := gate(gated, runs[name], dtype, device, name if name in backends else None):
            wrong[name] = found
        if why or name in wrong:
            del runs[name]
    parity.truth.cache_clear()  # oracles of this size are not to be kept
    timing.keep_freed_memory()
    work = workload.work(dtype.itemsize)
    candidates: dict[tuple[str, str], timing.Run] = {}
    for name, run in runs.items():
        for pass_, closure in passes(workload, run, dtype, device).items():
            candidates[pass_, name] = closure
        pair = kernels(workload, name, dtype, device) if name in backends else (pairs or {}).get(name)
        if pair:
            candidates[KERNELS, name] = pair
    if work.unit == "B":
        for pass_ in {FORWARD, BOTH} & {pass_ for pass_, _ in candidates}:
            candidates[pass_, ""] = timing.copy(_amount(work, pass_), device)
    on_gpu = device.startswith("cuda")
    if on_gpu and any(pass_ == KERNELS for pass_, _ in candidates):
        bare = {name: run for (pass_, name), run in candidates.items() if pass_ in (BOTH, KERNELS) and name}
        candidates |= {(KERNELS, name): timing.captured(run) for name, run in bare.items()}
        if work.unit == "B":
            candidates[KERNELS, ""] = timing.captured(timing.copy(_amount(work, KERNELS), device))
    times = timing.interleaved(
        {f"{pass_}/{name}": run for (pass_, name), run in candidates.items()},
        rounds=rounds,
        budget=budget,
        device=device,
    )
    seconds: dict[str, Times] = {}
    for pass_, name in candidates:
        if name:
            seconds.setdefault(pass_, {})[name] = times[f"{pass_}/{name}"]
    copies = {pass_: times[f"{pass_}/"] for pass_, name in candidates if not name}
    if KERNELS in seconds:
        seconds[KERNELS] = seconds[BOTH] | seconds[KERNELS]
        if on_gpu:
            seconds[KERNELS] = {name: _each(of_all) for name, of_all in seconds[KERNELS].items()}
            copies |= {KERNELS: _each(copies[KERNELS])} if KERNELS in copies else {}
    return Measurement(workload, dtype, device, torch.get_num_threads(), work, seconds, copies,
                       matmul_rate(device, dtype), refused, wrong, None if gated == workload else gated)  # fmt: skip


def refusal(workload: Workload, backend: str, dtype: torch.dtype, device: str) -> str | None:
    """Why a backend cannot be timed on a workload, with its gradient where it has one; None when it can."""
    op, case = all_ops()[workload.op], workload.case
    args, kwargs = unseeded(workload, dtype, device)
    return dispatch.reason(backend, op.call(*args, grad=case.differentiable, **kwargs))


def gate(
    workload: Workload, run: Callable[..., Any], dtype: torch.dtype, device: str, backend: str | None = None
) -> str | None:
    """What is wrong with a function on a workload by the parity rule; None when nothing is.

    With dropout, what is no backend or takes no seed draws masks of its own: there is nothing to compare it with.
    """
    op, case = all_ops()[workload.op], workload.case
    if dict(workload.sizes).get("dropout"):
        call = parity.call_of(op, case, dtype, device)
        if backend is None or dispatch.reason(backend, call) is not None:
            return None
    bad = [str(error) for error in parity.errors_of(case, run, dtype, device) if not error.ok]
    return "; ".join(bad) or None


def unseeded(workload: Workload, dtype: torch.dtype, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs as a model passes them: dropout draws its own seed."""
    args, kwargs = workload.case.build(dtype, device)
    kwargs.pop("seed", None)
    return args, kwargs


def passes(workload: Workload, run: Callable[..., Any], dtype: torch.dtype, device: str) -> dict[str, timing.Run]:
    """What is timed of one function: the forward without gradients and, where the op has some, forward and backward."""
    op = all_ops()[workload.op]
    args, kwargs = unseeded(workload, dtype, device)

    def forward() -> object:
        with torch.no_grad():
            return run(*args, **kwargs)

    if not workload.case.differentiable:
        return {FORWARD: forward}
    flat = dict(zip(op.order, op.flatten(*args, **kwargs), strict=True))
    leaves = [t.detach().requires_grad_() for t in flat.values() if isinstance(t, Tensor) and t.is_floating_point()]
    found = iter(leaves)
    learning = {n: next(found) if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in flat.items()}
    if "seed" in learning:
        learning["seed"] = None
    outputs = run(**learning)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [torch.randn_like(o) for o in outputs]

    def both() -> object:
        out = run(**learning)
        return torch.autograd.grad(out if isinstance(out, tuple) else (out,), leaves, upstream)

    return {FORWARD: forward, BOTH: both}


def kernels(workload: Workload, backend: str, dtype: torch.dtype, device: str) -> timing.Run | None:
    """A backend's forward and backward kernels into buffers; None where it has no such pair, or the op no gradient."""
    op = all_ops()[workload.op]
    impl = dispatch.impls[workload.op, backend]
    if impl.fwd is None or impl.bwd is None or op.in_place:
        return None
    fwd, bwd = impl.fwd, impl.bwd
    args, kwargs = unseeded(workload, dtype, device)
    if dict(workload.sizes).get("dropout"):
        kwargs["seed"] = torch.ones(1, dtype=torch.int64, device=device)
    flat = op.flatten(*args, **kwargs)
    tensors, rest = flat[: op.tensors], flat[op.tensors :]
    needs = tuple(isinstance(t, Tensor) and t.is_floating_point() for t in tensors)
    with torch.no_grad():
        results = fwd(*flat)
        upstream = [torch.randn_like(o) for o in results[: op.outputs]]
        kept = results if op.saves_outputs else results[op.outputs :]
        gradients = bwd(*upstream, *tensors, *kept, *rest, needs=needs)

    def run() -> None:
        with torch.no_grad():
            fwd(*flat, out=results)
            bwd(*upstream, *tensors, *kept, *rest, needs=needs, out=gradients)

    return run


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """timing.matmul_rate of whoever multiplies fastest."""
    own = (backend.products for backend in dispatch.backends.values())
    return timing.matmul_rate(device, dtype, [products for products in own if products])


def _amount(work: Work, pass_: str) -> float:
    return work.forward + (0.0 if pass_ == FORWARD else work.backward)


def _each(replays: list[float]) -> list[float]:
    return [seconds / timing.REPLAYED for seconds in replays]


def _clearly_faster(torchs: list[float], others: list[float]) -> bool:
    ratios = sorted(timing.ratios(torchs, others))
    return timing.median(ratios) >= _TIE and ratios[len(ratios) // 4] > 1.0
