"""Running statistics, such as batch norm's, over the examples of the global batch.

A forward pass moves a module's buffers by what it saw, and each rank (or shard) sees something else. Left alone, the
ranks would evaluate different models. So every forward pass starts from the same buffers, its change is noted and taken
back, and the changes travel with the gradients. Afterwards the buffers are what they were plus the mean change over the
examples. An integer, such as a count of batches, changes by the same on every rank, and so it does in the mean. What a
forward pass leaves as it is, such as a mask, stays so, whatever it holds; booleans are left to the module. A forward
pass without examples moves nothing: the mean over no rows may be no number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from distprop.nn.module import Module
from distprop.tape import Array


class RunningStatistics:
    """The buffers of `module` as one stretch of a message: `size` numbers, the last one counts examples."""

    def __init__(self, module: Module) -> None:
        self._module = module
        total = sum(buffer.size for buffer in self._buffers())
        self.size = total + 1 if total else 0

    @property
    def training(self) -> bool:
        """Whether a forward pass may move them."""
        return any(part.training for part in self._module.modules())

    @contextmanager
    def kept_back(self, examples: float, message: Array) -> Iterator[None]:
        """Around a forward pass: what it changes is added to `message`, weighed by `examples`, and taken back.

        If it raises, it is taken back only.
        """
        before = [np.array(buffer) for buffer in self._buffers()]
        changes = np.zeros_like(message)
        try:
            yield
            if not examples:
                return
            for (buffer, change), old in zip(self._with_parts(changes), before, strict=True):
                moved = buffer != old  # −∞ less −∞ is no number
                change[moved] = examples * np.subtract(buffer[moved], old[moved], dtype=_signed(buffer.dtype))
            changes[-1] = examples
            message += changes
        finally:
            for buffer, old in zip(self._buffers(), before, strict=True):
                buffer[...] = old

    def apply(self, message: Array) -> None:
        """Move the buffers by the mean change in a summed `message`."""
        examples = message[-1]
        if not examples:
            return
        for buffer, part in self._with_parts(message):
            change = part / examples
            buffer += np.rint(change).astype(buffer.dtype) if buffer.dtype.kind in "iu" else change.astype(buffer.dtype)

    def _buffers(self) -> list[Array]:
        return [buffer for buffer in self._module.buffers() if buffer.dtype.kind in "fiu"]

    def _with_parts(self, message: Array) -> Iterator[tuple[Array, Array]]:
        """Each buffer, and what belongs to it in a message, in its shape."""
        start = 0
        for buffer in self._buffers():
            yield buffer, message[start : start + buffer.size].reshape(buffer.shape)
            start += buffer.size


def _signed(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """In which to take the difference of two numbers."""
    return dtype if dtype.kind == "f" else np.dtype(np.float64)
