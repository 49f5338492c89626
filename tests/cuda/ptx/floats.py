"""Floating-point arithmetic. What PTX calls approximate is rounded from float64."""

import numpy as np

from .numbers import add_exactly, fma_double, fma_float, narrowed, to_float
from .rules import FLOAT, rule, same


@rule(rf"(?P<op>add|sub|mul)(\.rn)?{FLOAT}")
@rule(r"(?P<op>add|sub|mul)(\.rn)?(?P<ftz>\.ftz)?(?P<sat>\.sat)\.(?P<t>f32)")
def _(m):
    return same(m, 2, {"add": np.add, "sub": np.subtract, "mul": np.multiply}[m["op"]])


@rule(r"(?P<op>add|sub|mul)\.(?P<mode>rz|rm|rp)(?P<ftz>\.ftz)?\.(?P<t>f32)")
def _(m):
    mode = m["mode"]
    exact = {
        "add": lambda a, b: add_exactly(a, b, mode),
        "sub": lambda a, b: add_exactly(a, -b, mode),
        "mul": lambda a, b: (a * b, np.zeros(1)),
    }[m["op"]]
    return same(m, 2, lambda *x: to_float(*exact(*(v.astype(np.float64) for v in x)), mode))


@rule(r"fma\.(?P<mode>rn|rz|rm|rp)(?P<ftz>\.ftz)?(?P<sat>\.sat)?\.(?P<t>f32)")
def _(m):
    return same(m, 3, lambda a, b, c: fma_float(a, b, c, m["mode"]))


@rule(r"fma\.rn\.(?P<t>f64)")
def _(m):
    return same(m, 3, fma_double)


@rule(rf"(?P<op>min|max)(?P<nan>\.NaN)?{FLOAT}")
def _(m):
    pick, sign = (np.fmin, np.logical_or) if m["op"] == "min" else (np.fmax, np.logical_and)

    def choose(a, b):  # -0 is less than 0
        zero = np.where(sign(np.signbit(a), np.signbit(b)), a.dtype.type(-0.0), a.dtype.type(0))
        found = np.where((a == 0) & (b == 0), zero, pick(a, b))
        return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), found) if m["nan"] else found

    return same(m, 2, choose)


@rule(rf"(?P<op>neg|abs){FLOAT}")
def _(m):
    return same(m, 1, {"neg": np.negative, "abs": np.abs}[m["op"]])


@rule(r"copysign\.(?P<t>f32|f64)")
def _(m):
    return same(m, 2, lambda sign, size: np.copysign(size, sign))


@rule(r"div\.(rn|full|approx)(?P<ftz>\.ftz)?\.(?P<t>f32)")
@rule(r"div\.rn\.(?P<t>f64)")
def _(m):
    return same(m, 2, np.divide)


@rule(r"rcp\.(rn|approx)(?P<ftz>\.ftz)?\.(?P<t>f32)")
@rule(r"rcp\.rn\.(?P<t>f64)")
def _(m):
    return same(m, 1, lambda x: x.dtype.type(1) / x)


@rule(r"sqrt\.(rn|approx)(?P<ftz>\.ftz)?\.(?P<t>f32)")
@rule(r"sqrt\.rn\.(?P<t>f64)")
def _(m):
    return same(m, 1, np.sqrt)


APPROXIMATE = {
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@rule(r"(?P<op>rsqrt|ex2|lg2|sin|cos)\.approx(?P<ftz>\.ftz)?\.(?P<t>f32)")
@rule(r"(?P<op>tanh)\.approx\.(?P<t>f32)")
def _(m):
    return same(m, 1, lambda x: narrowed(APPROXIMATE[m["op"]](x.astype(np.float64))))
