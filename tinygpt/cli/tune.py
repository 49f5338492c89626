"""`tinygpt tune`: attention's tiles, measured on this GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ..errors import UserError
from .arguments import Tune

_DTYPES = ("bfloat16", "float16", "float32")


def plan(args: Tune) -> Callable[[], int]:
    """Check the arguments, and return the measurement.

    Raises:
        UserError: a dtype that is none, a head dimension or a length out of range, no GPU.
    """
    from tinygpt_kernels.interpreter import gpu_present
    from tinygpt_kernels.spec import unknown

    if args.list and args.clear:
        raise UserError("--list and --clear are not allowed together")
    if args.dtype not in _DTYPES:
        raise UserError(unknown("dtype", args.dtype, _DTYPES))
    for name, values, most in (("head-dim", args.head_dim, 256), ("length", args.length, 1 << 16)):
        for value in values:
            if not 1 <= value <= most:
                raise UserError(f"--{name} {value} is not within 1 to {most}")
    if args.list:
        return _list
    if args.clear:
        return _clear
    if not gpu_present():
        raise UserError(
            "there is no GPU here, and tuning measures one; the shipped tables serve, and `tinygpt gpu-report` reads the code "
            "they compile to"
        )
    return lambda: _tune(args)


def _list() -> int:
    from tinygpt_kernels.triton_ops import tuning

    found = tuning.load()
    if not found:
        print(f"nothing was measured yet ({tuning.path()} is absent or empty)")
    for identity, calls in found.items():
        print(identity)
        for call, by_kernel in calls.items():
            print(f"  {call}")
            for kernel, (queries, keys, warps, stages, descriptors) in by_kernel.items():
                print(
                    f"    {kernel:<20}{queries} x {keys}, {warps} warps, {stages} stages{', descriptors' * descriptors}"
                )
    return 0


def _clear() -> int:
    from tinygpt_kernels.triton_ops import tuning

    print(f"deleted {tuning.path()}" if tuning.clear() else "nothing was measured yet")
    return 0


def _tune(args: Tune) -> int:
    import torch
    from triton.testing import do_bench

    from tinygpt_kernels.triton_ops import tuning

    device = torch.device(args.device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise UserError(f"--device {args.device} cannot be used by this torch ({torch.__version__})")
    dtype = getattr(torch, args.dtype)
    print(tuning.identity(device))
    for D in args.head_dim:
        for T in args.length:
            B, H = max(1, 16384 // T), max(1, 1024 // D)
            print(f"{tuning.call_name(D, dtype, T)}: B={B} T={T} H={H}", flush=True)
            for kernel, tile, milliseconds in tuning.tune(device, D, dtype, B, T, H, do_bench):
                print(f"  {kernel:<44}{tile.BLOCK_T:>4} x {tile.BLOCK_S:<4}{tile.num_warps} warps  {milliseconds:8.3f} ms",
                      file=sys.stderr, flush=True)  # fmt: skip
    print(f"the fastest are kept in {tuning.path()}; `tinygpt tune --list` shows them, `--clear` deletes them")
    return 0
