"""Batch normalisation: each channel made to have mean 0 and variance 1 over the examples, of this rank or of all.

The work goes through memory in blocks that stay in the cache, in the order in which the numbers lie there, be it
channels first or channels last.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from distprop.allocator import aligned_like
from distprop.comm.base import Communicator, allgather_for
from distprop.functional.check import affine_inputs
from distprop.functional.pointwise import placed
from distprop.tape import Array, Out
from distprop.tensor import Operand, Tensor, as_tensor, record

_BLOCK = 32768  # numbers: measured on a second-level cache of 2 MiB; twice as many are 9 to 14 % slower
_SHORT = 256  # images of fewer pixels are cheaper with a pattern of all channels than with one number a channel


def batch_norm(
    input: Operand,
    running_mean: Operand | None,
    running_var: Operand | None,
    weight: Operand | None = None,
    bias: Operand | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    comm: Communicator | None = None,
) -> Tensor:
    """y = γ x̂ + β with x̂ = (x − mean)/√(var + ε), mean and var of each channel.

    Shapes: x `(batch, channels, ...)`; γ = weight, β = bias, running_mean and running_var `(channels,)`.

    When `training`, mean and var are those of the batch, var dividing by the count n. The running estimates, where they
    are given, are moved towards them in place by the share `momentum`, the variance dividing by n − 1 there. They stay
    as they are if the channels have no value or one, which says nothing of a variance; PyTorch refuses one, but here a
    rank's share of the last batch may be a single example. Otherwise mean and var are the running estimates.

    Derivative when training: dx = γ/√(var + ε) (g − ⟨g⟩ − x̂ ⟨g x̂⟩), ⟨ ⟩ being the mean over the n values of the
    channel; with the running estimates only its first term. dγ = Σ g x̂, dβ = Σ g.

    With `comm` the batch is the one of all ranks. Their counts, means and sums of squared deviations are gathered and
    combined (Chan et al., 1979), so the result does not depend on how the examples are shared out. In the backward pass
    Σ g and Σ g x̂ are summed over the ranks, and n counts all examples: this is exact if every rank's g is the
    derivative of one loss that is the sum over all examples. `DataParallel` sees to that, for it multiplies each rank's
    mean loss by the rank's number of examples before the walk. dγ and dβ stay local: they are summed with the other
    gradients. A rank without examples takes part with an empty x.

    Source: Ioffe and Szegedy, 2015, arXiv:1502.03167.

    Raises:
        ValueError: shapes that do not fit; no running estimates when not training.
        TypeError: the dtypes differ or are not floating point.
    """
    x, weight, bias = affine_inputs("batch_norm", input, weight, bias)
    estimates = tuple(as_tensor(p).data for p in (running_mean, running_var) if p is not None)
    _check(x, weight, bias, estimates, training)
    channels = _Channels(x.data)
    rows = channels.rows(x.data)
    if training:
        count, mean, squares = channels.moments(rows)
        if comm is not None:
            count, mean, squares = _combined(comm, count, mean, squares)
        var = squares / max(count, 1)
        if count > 1 and estimates:
            for estimate, new in zip(estimates, (mean, squares / (count - 1)), strict=True):
                estimate[...] = (1 - momentum) * estimate + momentum * new
    else:
        comm, count, (mean, var) = None, 0, (estimate.astype(np.float64) for estimate in estimates)
    scale = 1 / np.sqrt(var + eps)
    slope = scale if weight is None else scale * weight.data
    value = channels.affine(rows, mean, slope, None if bias is None else bias.data)

    def vjp(grad: Array, out: Out) -> list[Array | None]:
        g = channels.rows(grad)
        sums = channels.sums(g, rows, mean)  # Σ g and Σ g (x − mean)
        gradients: list[Array | None] = [None]
        if x.requires_grad and training:
            whole = sums if comm is None else comm.allreduce(sums.copy())
            whole = whole / max(count, 1)
            along = scale**2 * whole[1]
            gradients[0] = channels.restore(channels.centred(g, rows, slope, along, whole[0] - mean * along))
        elif x.requires_grad:
            gradients[0] = channels.restore(channels.affine(g, None, slope, None))
        for tensor, d in ((weight, sums[1] * scale), (bias, sums[0])):
            if tensor is not None:
                gradients.append(placed(d if tensor.requires_grad else None, tensor, out[len(gradients)]))
        return gradients

    inputs = tuple(tensor for tensor in (x, weight, bias) if tensor is not None)
    result = record(channels.restore(value), inputs, vjp)
    if comm is not None and result.node is not None and x.requires_grad:
        result.node.absent = partial(comm.allreduce, np.zeros((2, x.shape[1])))
    return result


class _Channels:
    """Where the numbers of one channel lie in memory, and sums and products that run in that order.

    Channels last: rows `(batch · pixels, channels)`. Channels first: rows `(batch, channels, pixels)`.
    """

    def __init__(self, x: Array) -> None:
        self.shape, self.dtype = x.shape, x.dtype
        count, self.number = x.shape[:2]
        self.pixels = int(np.prod(x.shape[2:], dtype=np.int64))
        order = np.moveaxis(x, 1, -1)
        self.last = self.pixels == 1 or (order.flags.c_contiguous and not x.flags.c_contiguous)
        self.step = max(1, _BLOCK // max(1, self.number if self.last else self.number * self.pixels))
        self.ones = np.ones(min(self.step, count * self.pixels) if self.last else self.pixels, x.dtype)

    def rows(self, array: Array) -> Array:
        if self.last:
            return np.ascontiguousarray(np.moveaxis(array, 1, -1)).reshape(-1, self.number)
        return np.ascontiguousarray(array).reshape(self.shape[0], self.number, self.pixels)

    def restore(self, rows: Array) -> Array:
        """The inverse of `rows`."""
        if self.last:
            return np.moveaxis(rows.reshape(self.shape[0], *self.shape[2:], self.number), -1, 1)
        return rows.reshape(self.shape)

    def pattern(self, numbers: Array) -> Array:
        """One number a channel, laid out so that it meets a block of rows in long runs."""
        numbers = numbers.astype(self.dtype)
        if self.last:
            return np.tile(numbers, (len(self.ones), 1))
        if self.pixels < _SHORT:
            return np.repeat(numbers, self.pixels).reshape(1, self.number, self.pixels)
        return numbers[None, :, None]

    def blocks(self, rows: Array) -> Iterator[slice]:
        return (slice(start, start + self.step) for start in range(0, len(rows), self.step))

    def sum(self, block: Array) -> Array:
        """The sum of each channel over a block."""
        return self.ones[: len(block)] @ block if self.last else (block @ self.ones).sum(axis=0)

    def moments(self, rows: Array) -> tuple[int, Array, Array]:
        """Count, mean and sum of squared deviations of each channel, in one pass.

        Deviations are taken from the mean of the first block, K of the N values. What that costs in cancellation is
        bounded: a mean that lies δ away has a variance of at least δ² K/N.
        """
        count = len(rows) * (1 if self.last else self.pixels)
        first, squares = np.zeros((2, self.number))
        shift = np.zeros(self.number, self.dtype)
        spare = aligned_like(rows[: self.step])
        for block in self.blocks(rows):
            x = rows[block]
            if block.start == 0:
                shift = self.sum(x) / self.dtype.type(max(len(x) * count // len(rows), 1))
                pattern = self.pattern(shift)
            deviation = np.subtract(x, pattern[: len(x)], out=spare[: len(x)])
            first += self.sum(deviation)
            deviation *= deviation
            squares += self.sum(deviation)
        distance = first / max(count, 1)
        return count, shift + distance, np.maximum(squares - first * distance, 0)

    def affine(self, rows: Array, mean: Array | None, slope: Array, bias: Array | None) -> Array:
        """(rows − mean) · slope + bias."""
        result = aligned_like(rows)
        m, b = (None if numbers is None else self.pattern(numbers) for numbers in (mean, bias))
        s = self.pattern(slope)
        for block in self.blocks(rows):
            x, y = rows[block], result[block]
            if m is not None:
                x = np.subtract(x, m[: len(y)], out=y)
            np.multiply(x, s[: len(y)], out=y)
            if b is not None:
                y += b[: len(y)]
        return result

    def sums(self, grad: Array, rows: Array, mean: Array) -> Array:
        """Σ g and Σ g (x − mean) of each channel, `(2, channels)`."""
        totals = np.zeros((2, self.number))
        pattern, spare = self.pattern(mean), aligned_like(rows[: self.step])
        for block in self.blocks(rows):
            g, x = grad[block], rows[block]
            product = np.subtract(x, pattern[: len(x)], out=spare[: len(x)])
            product *= g
            totals[0] += self.sum(g)
            totals[1] += self.sum(product)
        return totals

    def centred(self, grad: Array, rows: Array, slope: Array, along: Array, level: Array) -> Array:
        """(g − rows · along − level) · slope."""
        result, spare = aligned_like(rows), aligned_like(rows[: self.step])
        a, c, s = (self.pattern(numbers) for numbers in (along, level, slope))
        for block in self.blocks(rows):
            g, x, y = grad[block], rows[block], result[block]
            normal = np.multiply(x, a[: len(x)], out=spare[: len(x)])
            normal += c[: len(x)]
            np.subtract(g, normal, out=y)
            y *= s[: len(x)]
        return result


def _combined(comm: Communicator, count: int, mean: Array, squares: Array) -> tuple[int, Array, Array]:
    """The moments of all ranks' values together; the same bits on every rank."""
    messages = allgather_for("SyncBatchNorm", comm, np.concatenate([[count], mean, squares]).tobytes())
    table = np.array([np.frombuffer(message) for message in messages])
    counts, means, all_squares = table[:, :1], table[:, 1 : 1 + len(mean)], table[:, 1 + len(mean) :]
    total = int(counts.sum())
    mean = (counts * means).sum(axis=0) / max(total, 1)
    return total, mean, (all_squares + counts * (means - mean) ** 2).sum(axis=0)


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, estimates: tuple[Array, ...], training: bool) -> None:
    if x.ndim < 2:
        raise ValueError(f"batch_norm needs x of shape (batch, channels, ...), got {x.shape}")
    if len(estimates) == 1:
        raise ValueError("batch_norm needs both running_mean and running_var, or neither")
    if not training and not estimates:
        raise ValueError("batch_norm needs running_mean and running_var when it is not training")
    for name, given in zip(("weight", "bias", "running_mean", "running_var"), (weight, bias, *estimates), strict=False):
        if given is not None and given.shape != (x.shape[1],):
            raise ValueError(
                f"batch_norm of x of shape {x.shape} got a {name} of shape {given.shape}; "
                f"it must be one number for each of the {x.shape[1]} channels"
            )
