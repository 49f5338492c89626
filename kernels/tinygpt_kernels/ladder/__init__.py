"""The ladder: one operation as CUDA kernels from naive to fast, each rung run on the CPU, held to the truth, and counted.

The rungs are csrc/cuda/ladder/*.cu; the simulation that runs them is csrc/cuda's (README.md there). `rungs` says what there is,
`build` compiles, `climb` runs.
"""

from .build import LadderError
from .climb import Costs, Verdict, costs, judge, seconds
from .rungs import OPS, Rung, read, rungs

__all__ = ["OPS", "Costs", "LadderError", "Rung", "Verdict", "costs", "judge", "read", "rungs", "seconds"]
