"""All parameters of a model in one array and all their gradients in another.

The layout is last parameter first, the order in which backpropagation finishes gradients, so the gradient array fills
from the front. Behind the gradients lie a few spare numbers, the control lane: one Allreduce of `message` carries both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from distprop.comm.node import Node
from distprop.tape import Array
from distprop.tensor import Parameter

LANE_LENGTH = 16  # numbers behind the gradients


class FlatBuffer:
    """Moves `parameters` into one array each for values and gradients; each parameter becomes a view.

    `allocate(length, dtype)` gives the memory for the message, zeros; a communicator's is quicker to sum.

    Attributes:
        parameters: in layout order, that is reversed.
        data: all values, `(size,)`.
        grad: all gradients, `(size,)`.
        extra: room for other numbers that travel with the gradients, `(extra,)`.
        lane: the control lane, `(LANE_LENGTH,)`.
        message: gradients, extra and lane, one block of memory.
        sharers: the ranks of the node, which have one `data` between them, after `share`; else None.
        sums: how many times the gradients were summed over the ranks, where somebody does that and counts; else None.

    Raises:
        TypeError: the parameters have different dtypes.
    """

    def __init__(
        self, parameters: Sequence[Parameter], extra: int = 0, allocate: Callable[[int, Any], Array] = np.zeros
    ) -> None:
        self.parameters = tuple(reversed(parameters))
        dtypes = sorted({str(p.dtype) for p in self.parameters})
        if len(dtypes) != 1:
            raise TypeError(
                f"the parameters of a model need one dtype, got {', '.join(dtypes) or 'none'}; use model.to()"
            )
        size = sum(p.data.size for p in self.parameters)
        self.data: Array = np.empty(size, dtypes[0])
        self.message: Array = allocate(size + extra + LANE_LENGTH, dtypes[0])
        self.grad, self.extra, self.lane = np.split(self.message, [size, size + extra])
        self.sharers: Node | None = None
        self.sums: int | None = None
        self._starts: dict[int, int] = {}
        start = 0
        for parameter in self.parameters:
            self._starts[id(parameter)] = start
            start += parameter.data.size
        self._place()

    def span(self, parameter: Parameter) -> tuple[int, int]:
        """Where `parameter` lies: (start, stop)."""
        start = self._starts[id(parameter)]
        return start, start + parameter.data.size

    def share(self, sharers: Node, common: Array) -> None:
        """Keep the values in `common`, `(size,)`, which all `sharers` see; now they are the same on each of them.

        From now on each of them changes only its `own` part, between two barriers.
        """
        self.data, self.sharers = common, sharers
        self._place()

    @property
    def own(self) -> slice:
        """The part of `data` that this rank updates: all of it, or its slice among the sharers."""
        return slice(0, self.data.size) if self.sharers is None else self.sharers.own_slice(self.data)

    def allocate_like_data(self, size: int) -> Array:
        """Memory `(size,)` for what is updated together with the values; the sharers have one, and all call this.

        Raises:
            MemoryError: there is no shared memory left.
        """
        if self.sharers is None:
            return np.empty(size, self.data.dtype)
        common = self.sharers.allocate_common(size, self.data.dtype)
        if common is None:
            raise MemoryError(f"there are no {size * self.data.itemsize:,} bytes of shared memory (/dev/shm) to be had")
        return common

    def _place(self) -> None:
        for parameter in self.parameters:
            place = slice(*self.span(parameter))
            parameter.place_in(
                self, self.data[place].reshape(parameter.shape), self.grad[place].reshape(parameter.shape)
            )

    def holds(self, parameters: Iterable[Parameter]) -> bool:
        """Whether all of `parameters` still live here; a change of dtype or shape makes one leave."""
        return all(parameter.buffer is self for parameter in parameters)


def fill_missing(parameters: Iterable[Parameter]) -> list[Parameter]:
    """Give a zero gradient to every trainable parameter that has none this step, and return those."""
    missing = [parameter for parameter in parameters if parameter.requires_grad and not parameter.has_grad]
    for parameter in missing:
        parameter.grad = 0
    return missing
