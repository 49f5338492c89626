"""Many tensors as views of one buffer: an optimizer then has one long row to walk instead of a hundred short ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_ALIGNMENT = 64  # elements: every view begins on a cache line, and on what vector loads like, in any dtype


class Flat:
    """Zeros, as named views of one buffer, in the order given.

    Args:
        shapes: shape by name.
        dtype, device: of all of them.

    Attributes:
        buffer: [N]; what lies between two views stays 0.
        views: a tensor of each shape by name, contiguous.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], dtype: torch.dtype, device: torch.device) -> None:
        self._begin: dict[str, int] = {}
        end = 0
        for name, shape in shapes.items():
            self._begin[name] = end
            end += -(-shape.numel() // _ALIGNMENT) * _ALIGNMENT
        self.buffer = torch.zeros(end, dtype=dtype, device=device)
        self.views = {
            name: self.buffer[self._begin[name] : self._begin[name] + shape.numel()].view(shape)
            for name, shape in shapes.items()
        }

    def until(self, name: str | None) -> Tensor:
        """The buffer's part before the view of that name; all of it for None."""
        return self.buffer if name is None else self.buffer[: self._begin[name]]

    def since(self, name: str) -> Tensor:
        """The buffer's part from the view of that name on."""
        return self.buffer[self._begin[name] :]
