"""A PTX interpreter: runs what nvcc emitted for a kernel, inline assembly included, on NumPy arrays.

The CPU simulation (csrc/cuda/simt_host.*) never compiles the assembly of simt.cuh; this knows nothing of simt.cuh, only
NVIDIA's "Parallel Thread Execution ISA". It is for right and wrong, on tiny shapes: all threads of a launch go abreast, and an
instruction is a NumPy operation over those that stand at it. An opcode it does not know is an error that names it.

parse        the kernels of a module of PTX, and the instructions of one
numbers      rounding, where NumPy has none
rules        opcodes that make a value of values; integers, floats and choices have them
memory       spaces of memory, and who may touch what
transfer     opcodes that move data: ld, st, atom, cp.async
warp         opcodes of a whole warp: shfl, vote, ldmatrix, mma
machine      who runs when: branches, barriers, the end
device       compiles csrc/cuda with nvcc, and stands in for the module `_simt`
"""
