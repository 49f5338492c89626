"""tinygpt's compiled kernels. Pointers are integers, strides count elements, 0 stands for an absent tensor.

dtype codes: 0 float32, 1 float16, 2 bfloat16.
"""

def layer_norm_fwd(
    x: int,
    x_stride: int,
    dtype: int,
    weight: int,
    weight_dtype: int,
    bias: int,
    bias_dtype: int,
    y: int,
    mean: int,
    rstd: int,
    rows: int,
    cols: int,
    eps: float,
) -> None: ...
def layer_norm_bwd(
    dy: int,
    dy_stride: int,
    x: int,
    x_stride: int,
    dtype: int,
    weight: int,
    weight_dtype: int,
    mean: int,
    rstd: int,
    dx: int,
    dweight: int,
    dbias: int,
    bias_dtype: int,
    rows: int,
    cols: int,
) -> None: ...
def isa() -> str: ...
def supported_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
