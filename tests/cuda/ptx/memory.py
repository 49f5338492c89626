"""Spaces of memory: bytes, and which of them may be read and written. An access beside them is a fault, never a crash."""

import ctypes

import numpy as np

SHARED, LOCAL = np.uint64(1 << 60), np.uint64(2 << 60)  # where generic addresses of these spaces begin
GAP = 64  # between arrays: one past the end is nobody's
FIRST = 1024  # address of the first array: small numbers are no addresses of shared or local memory


class Fault(Exception):
    """An access that may not be: which of the addresses, and why."""

    def __init__(self, which, why):
        super().__init__(why)
        self.which = which


class Region:
    """Bytes from `begin` on, the same addresses for each owner (a block, a thread) `pitch` bytes further on in `data`."""

    def __init__(self, begin, data, readable, writable, pitch=0):
        self.begin, self.end, self.data, self.pitch = begin, begin + len(readable), data, pitch
        self.may = {False: readable, True: writable}
        self.all = {False: readable.all(), True: writable.all()}

    def places(self, addresses, bytes, write, owners):
        """Where the accesses lie in `data`, all of them allowed."""
        if (crooked := addresses % np.uint64(bytes) != 0).any():
            raise Fault(int(crooked.argmax()), f"{told(write, bytes)} at an address that is no multiple of {bytes}")
        at = (addresses - np.uint64(self.begin)).view(np.int64)
        outside = (at < 0) | (at + bytes > self.end - self.begin)
        if not self.all[write] and not outside.any():
            outside = ~self.may[write][at[:, None] + np.arange(bytes)].all(1)
        if outside.any():
            which = int(outside.argmax())
            there = self.may[False][int(at[which])] if 0 <= at[which] < self.end - self.begin else False
            raise Fault(
                which,
                "writes to what is only read"
                if write and there
                else f"{told(write, bytes)} outside of every array and tensor",
            )
        return at + owners * self.pitch

    def load(self, addresses, bytes, owners=0):
        return self.data.view(f"V{bytes}")[self.places(addresses, bytes, False, owners) // bytes]

    def store(self, addresses, values, owners=0):
        bytes = values.dtype.itemsize
        self.data.view(f"V{bytes}")[self.places(addresses, bytes, True, owners) // bytes] = values


def told(write, bytes):
    return f"{'writes' if write else 'reads'} {bytes} bytes"


class Global:
    """The process's memory, as far as views of tensors were announced."""

    def __init__(self):
        self.views, self._regions = [], None

    def add(self, address, sizes, strides, itemsize, writable):
        if all(sizes):
            self.views.append((address, list(sizes), list(strides), itemsize, writable))
            self._regions = None

    @property
    def regions(self):
        """One for each stretch of memory that views share, sorted."""
        if self._regions is None:
            spans = sorted(
                (a, a + (sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) + 1) * item)
                for a, sizes, strides, item, _ in self.views
            )
            merged = []
            for begin, end in spans:
                begin, end = begin & ~15, (end + 15) & ~15
                if merged and begin <= merged[-1][1]:
                    merged[-1][1] = max(end, merged[-1][1])
                else:
                    merged.append([begin, end])
            self._regions = [self._region(begin, end) for begin, end in merged]
            self._begins = np.array([region.begin for region in self._regions], np.uint64)
        return self._regions

    def _region(self, begin, end):
        data = np.ctypeslib.as_array((ctypes.c_uint8 * (end - begin)).from_address(begin))
        readable, writable = np.zeros(end - begin, bool), np.zeros(end - begin, bool)
        for address, sizes, strides, itemsize, may_write in self.views:
            if begin <= address < end:
                shape, steps = (*sizes, itemsize), (*(s * itemsize for s in strides), 1)
                for mask in (readable, writable)[: 1 + may_write]:
                    np.lib.stride_tricks.as_strided(mask[address - begin :], shape, steps)[...] = True
        return Region(begin, data, readable, writable)

    def _split(self, addresses, bytes, write):
        if not self.regions:
            raise Fault(0, f"{told(write, bytes)}, and the launch was given no tensor")
        number = np.searchsorted(self._begins, addresses, "right").astype(int) - 1
        if (number < 0).any():
            raise Fault(int((number < 0).argmax()), f"{told(write, bytes)} outside of every array and tensor")
        for one in np.unique(number):
            yield self._regions[one], np.flatnonzero(number == one)

    def load(self, addresses, bytes, owners=0):
        found = np.empty(len(addresses), f"V{bytes}")
        for region, chosen in self._split(addresses, bytes, False):
            with moved(chosen):
                found[chosen] = region.load(addresses[chosen], bytes)
        return found

    def store(self, addresses, values, owners=0):
        for region, chosen in self._split(addresses, values.dtype.itemsize, True):
            with moved(chosen):
                region.store(addresses[chosen], values[chosen])


class moved:
    """Of a part of the addresses: a fault's number is that among all of them."""

    def __init__(self, chosen):
        self.chosen = chosen

    def __enter__(self):
        return self

    def __exit__(self, kind, fault, trace):
        if isinstance(fault, Fault):
            fault.which = int(self.chosen[fault.which])


def owned(arrays, owners, given=0):
    """(Region of one copy of these arrays for each owner, NaN everywhere; address of each). `given`: bytes of those without a size."""
    used, places = FIRST, {}
    for array in sorted(arrays, key=lambda a: a.bytes is None):
        used += -used % array.align
        bytes = given if array.bytes is None else array.bytes
        places[array.name] = (used, bytes)
        used += bytes + GAP if array.bytes is not None else 0  # those without a size share what is given
    used += given
    length = used + -used % 128 - FIRST
    allowed = np.zeros(length, bool)
    for begin, bytes in places.values():
        allowed[begin - FIRST : begin - FIRST + bytes] = True
    data = np.full(owners * length, 0xFF, np.uint8)
    return Region(FIRST, data, allowed, allowed, length), {name: begin for name, (begin, _) in places.items()}
