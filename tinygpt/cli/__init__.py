"""The command line. Whatever can be said without torch is said before torch is imported.

Exit codes: 0 done; 1 failed while computing; 2 wrong arguments, nothing was begun; 130, 143 stopped by Ctrl-C, SIGTERM.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from .. import __version__
from ..errors import UserError

__all__ = ["main"]

FAILED, WRONG, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (None: this process's) and return its exit code.

    What a user can mend becomes one message on stderr; any other exception is a bug and keeps its traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # sampled text may hold what the terminal's encoding does not
            stream.reconfigure(errors="replace")
    if list(argv) == ["--version"]:
        print(f"tinygpt {__version__}")
        return 0
    code = WRONG
    try:
        work = _plan(argv)
        code = FAILED
        done = work()
        sys.stdout.flush()
        return done
    except SystemExit as end:  # tyro has said what there is to say
        return end.code if isinstance(end.code, int) else 0
    except UserError as error:
        return _fail(error, code)
    except RuntimeError as error:
        from tinygpt_kernels import BackendError  # imports torch, which whatever raises it has done before

        if not isinstance(error, BackendError):
            raise
        return _fail(error, code)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; what is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _plan(argv: Sequence[str]) -> Callable[[], int]:
    """Check a command line, and return what carries it out."""
    from .arguments import Backends, Bench, Check, Data, Eval, Generate, GpuReport, Ladder, Lesson, Train, Tune, parse

    command = parse(argv)
    module = {
        Train: "train", Generate: "generate", Eval: "evaluate", Backends: "backends", Check: "check", Bench: "bench",
        Data: "data", GpuReport: "gpu_report", Ladder: "ladder", Lesson: "lesson", Tune: "tune",
    }[type(command)]  # fmt: skip
    plan: Callable[[], int] = import_module(f".{module}", __name__).plan(command)
    return plan


def _fail(error: Exception, code: int) -> int:
    print(f"tinygpt: error: {error}", file=sys.stderr)
    return code
