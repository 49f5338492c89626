"""Types of PTX as types of NumPy, and the roundings that NumPy lacks."""

from fractions import Fraction

import numpy as np

TYPES = {"pred": np.bool_, "f16": np.float16, "bf16": np.uint16, "f32": np.float32, "f64": np.float64}
TYPES |= {
    f"{kind}{bits}": np.dtype(f"{'i' if kind == 's' else 'u'}{bits // 8}").type
    for kind in "usb"
    for bits in (8, 16, 32, 64)
}
TYPES = {name: np.dtype(t) for name, t in TYPES.items()}
MODES = {"rn": 0, "rz": 0, "rm": -np.inf, "rp": np.inf}  # where to


def unsigned(bytes):
    return np.dtype(f"u{bytes}")


def flushed(x, ftz=True):
    """Numbers below the smallest normal one become 0 of their sign."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x) if ftz else x


def bfloat_to_float(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bfloat(x, mode="rn"):
    """To the nearest, ties to even; towards zero with mode rz. NaN becomes 0x7fff, as on a GPU."""
    bits = x.view(np.uint32)
    if mode == "rn":
        bits = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return np.where(np.isnan(x), np.uint16(0x7FFF), (bits >> np.uint32(16)).astype(np.uint16))


def float_to_half(x, mode="rn"):
    found = x.astype(np.float16)
    if mode == "rz":
        found = np.where(np.abs(found.astype(x.dtype)) > np.abs(x), np.nextafter(found, np.float16(0)), found)
    return np.where(np.isnan(x), np.uint16(0x7FFF).view(np.float16), found)


def to_float(value, error, mode="rn"):
    """float32 of value + error, float64 both, the second less than half a unit of the first: rounded once.

    The sum is first rounded to odd: what is cut off then shows in its last bit, and the second rounding is right.
    """
    off = np.isfinite(error) & (error != 0) & np.isfinite(value)
    if off.any():
        even = (value.view(np.uint64) & np.uint64(1)) == 0
        value = np.where(off & even, np.nextafter(value, np.copysign(np.inf, error)), value)
    return narrowed(value, mode)


def narrowed(value, mode="rn"):
    """float32 of float64."""
    found = value.astype(np.float32)
    if mode == "rn":
        return found
    if mode == "rz":
        beyond, towards = np.abs(found) > np.abs(value), np.float32(0)
    else:
        towards = np.float32(MODES[mode])
        beyond = (found > value) if mode == "rm" else (found < value)
    return np.where(beyond, np.nextafter(found, towards), found)


def add_exactly(a, b, mode="rn"):
    """float64 a + b and what its rounding lost (Knuth, The Art of Computer Programming 2, 4.2.2)."""
    total = a + b
    part = total - a
    if mode == "rm":  # what cancels is -0 then
        total = np.where((total == 0) & (np.signbit(a) | np.signbit(b)), -0.0, total)
    return total, (a - (total - part)) + (b - part)


def fma_float(a, b, c, mode="rn"):
    product = a.astype(np.float64) * b.astype(np.float64)  # 48 bits: exact
    return to_float(*add_exactly(product, c.astype(np.float64), mode), mode)


def fma_double(a, b, c):
    def one(x, y, z):
        if not all(map(np.isfinite, (x, y, z))) or not (x * y + z):
            return x * y + z
        try:
            return float(Fraction(x) * Fraction(y) + Fraction(z))
        except OverflowError:
            return x * y + z

    return np.array([one(*map(float, t)) for t in np.broadcast(a, b, c)])


def to_integer(x, dtype, mode):
    """A number as an integer: rounded, kept within the type's limits, NaN as 0."""
    rounded = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x.astype(np.float64))
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    inside = (rounded >= low) & (rounded < float(high))
    found = np.where(inside, rounded, 0).astype(dtype)
    return np.where(rounded >= float(high), dtype.type(high), np.where(rounded < low, dtype.type(low), found))
