"""How a buffer's message is summed over the ranks, and whether a gradient in it is not finite.

On one node the sum looks for that itself, while it has the numbers in the cache. Elsewhere each rank looks through its
own gradients before they are sent, a pass of its own, and the control lane tells the others.

One dot product tells that all is well. If it is finite, no number is more than the root of the largest one, 1.8e19 in
float32, and no sum over ranks can overflow. So the sum itself has to be looked at only if some rank's is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from distprop.buffer import FlatBuffer
from distprop.comm import Communicator
from distprop.comm.base import allgather_for


class MessageSum:
    """Sums `buffer.message` again and again. Making one is collective.

    Args:
        comm: the ranks.
        buffer: gradients, and what travels with them.
        names: of the buffer's parameters, by id.
        wire: the format of gradients between nodes; see `distprop.comm.wire`.
        shard_by_shard: the sum is another's, a `FixedTree`'s, and `allreduce` is never called.

    Attributes:
        bad_parameter: the first parameter, in the model's order, whose gradient was not finite on this rank, or "".
    """

    def __init__(
        self,
        comm: Communicator,
        buffer: FlatBuffer,
        names: Mapping[int, str],
        *,
        wire: Literal["bf16", "fp16"] | None = None,
        shard_by_shard: bool = False,
    ) -> None:
        self._buffer, self._names = buffer, names
        self.bad_parameter = ""
        node = comm.node
        looks_itself = not shard_by_shard and node is not None and node.check_sums(buffer.message, buffer.grad.size)
        self._node = node if looks_itself else None
        self._comm, self._wire_sum = comm, None
        if wire is not None:
            from distprop.comm.wire import WireSum  # few need it

            self._wire_sum = WireSum(comm, wire, buffer.grad.size)

    def look(self) -> bool:
        """Before the sum: whether this rank's gradients are not finite or very large, unless the sum will see that."""
        if self._node is not None:
            return False
        grad = self._buffer.grad
        with np.errstate(all="ignore"):
            if math.isfinite(np.dot(grad, grad)):
                return False
        for parameter in reversed(self._buffer.parameters):
            start, stop = self._buffer.span(parameter)
            if not np.isfinite(grad[start:stop]).all():
                self.bad_parameter = self.bad_parameter or self._names[id(parameter)]
                break
        return True  # if nothing was found, these are large numbers, whose squares are infinite

    def allreduce(self) -> bool:
        """Replace the message by its sum over the ranks; whether it saw what `look` looks for on any rank."""
        (self._wire_sum or self._comm).allreduce(self._buffer.message)
        if self._node is None or not self._node.suspicious(self._buffer.message):
            return False
        own = self._node.not_finite(self._buffer.message)[self._node.rank]
        if own is not None:
            ends = ((self._buffer.span(parameter)[1], parameter) for parameter in self._buffer.parameters)
            self.bad_parameter = next(self._names[id(parameter)] for end, parameter in ends if own < end)
        return True

    def first_bad_parameters(self) -> list[str] | None:
        """After the sum, if `look` or `allreduce` has seen something: is it of no use? Collective; None if it is good.

        Otherwise the `bad_parameter` of each rank; all are empty if the sum has overflowed.
        """
        messages = allgather_for("a gradient that is not finite", self._comm, self.bad_parameter.encode())
        found = [name.decode() for name in messages]
        self.bad_parameter = ""
        return found if any(found) or not np.isfinite(self._buffer.grad).all() else None

    def rescale(self, factor: float) -> None:
        """The gradients in the message have been multiplied by `factor` since they were summed."""
        if self._wire_sum is not None:
            self._wire_sum.rescale(factor)
