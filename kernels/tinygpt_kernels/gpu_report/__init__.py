"""What a Triton kernel becomes on a GPU, read from its machine code on a machine without one.

    from tinygpt_kernels.gpu_report import compiled, sass

`compiled` compiles a kernel, or everything a launcher launches, for a target; `sass` reads the result; `shipped` names this
package's own kernels at the sizes their figures are recorded for. On the command line: `tinygpt gpu-report`.

Triton's interpreter must be off in the process (TRITON_INTERPRET unset): a kernel that is interpreted cannot be compiled.
"""
