"""Running statistics, such as batch norm's, over the examples of the global batch.

A forward pass moves a module's buffers by what it saw, and each rank (or shard) sees something else. Left alone, the
ranks would evaluate different models. So every forward pass starts from the same buffers, its change is noted and taken
back, and the changes travel with the gradients. Afterwards the buffers are what they were plus the mean change over the
examples. An integer, such as a count of batches, changes by the same on every rank, and so it does in the mean.
"""

from __future__ import annotations

import numpy as np

from distprop.nn.module import Module
from distprop.tape import Array


class RunningStatistics:
    """The buffers of `module` as one stretch of a message: `size` numbers, the last one counts examples."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._before: list[Array] = []
        total = sum(buffer.size for buffer in module.buffers())
        self.size = total + 1 if total else 0

    def begin(self) -> None:
        """Before a forward pass in training mode: note where it starts from."""
        self._before = [np.array(buffer) for buffer in self._module.buffers()]

    def end(self, examples: float, message: Array) -> None:
        """After it: add the change, weighed by `examples`, to `message`, and take it back."""
        start = 0
        for buffer, before in zip(self._module.buffers(), self._before, strict=True):
            change = message[start : start + buffer.size].reshape(buffer.shape)
            change += examples * (buffer - before)
            buffer[...] = before
            start += buffer.size
        message[-1] += examples

    def apply(self, message: Array) -> None:
        """Move the buffers by the mean change in a summed `message`."""
        examples = message[-1]
        if not examples:
            return
        start = 0
        for buffer in self._module.buffers():
            change = message[start : start + buffer.size].reshape(buffer.shape) / examples
            buffer += np.rint(change).astype(buffer.dtype) if buffer.dtype.kind in "iu" else change.astype(buffer.dtype)
            start += buffer.size
