"""Rows and entries picked by number, as an embedding does; the derivative adds up the gradients of each number."""

from __future__ import annotations

import numpy as np

from distprop.functional.check import floating, valid_axis
from distprop.rows import add_rows
from distprop.tape import Array, Out
from distprop.tensor import Operand, Tensor, as_tensor, record

_BLOCK = 32768  # numbers


def embedding(input: Operand, weight: Operand, padding_idx: int | None = None) -> Tensor:
    """y = W[ids]: one row of the table for each id.

    Shapes: ids = input, integers `(...)`; W = weight `(num_embeddings, embedding_dim)`; y `(..., embedding_dim)`.
    Derivative: dW[i] = Σ of the g at the places where the id is i, and 0 for `padding_idx`.

    Raises:
        IndexError: an id, or `padding_idx`, outside the table.
        TypeError: ids that are not integers, or a table that is not floating point.
        ValueError: a table without exactly two axes.
    """
    ids, table = as_tensor(input).data, as_tensor(weight)
    if table.ndim != 2:
        raise ValueError(f"embedding needs a weight of shape (num_embeddings, embedding_dim), got {table.shape}")
    floating("embedding", table)
    count = table.shape[0]
    check_indices("embedding", ids, count, negative=False)
    ids = ids.astype(np.intp, copy=False)
    if padding_idx is not None:
        if not -count <= padding_idx < count:
            raise IndexError(f"embedding got padding_idx {padding_idx} for a table of {count} rows")
        padding_idx %= count

    def vjp(grad: Array, out: Out) -> list[Array]:
        dw = np.empty_like(table.data, order="C") if out[0] is None else out[0]
        add_rows(ids.reshape(-1), grad.reshape(ids.size, table.shape[1]), dw)
        if padding_idx is not None:
            dw[padding_idx] = 0
        return [dw]

    return record(table.data.take(ids, axis=0), (table,), vjp)


def take(input: Operand, indices: Operand, dim: int | None = None) -> Tensor:
    """The entries of x numbered `indices` along `dim`; without `dim` those of x flattened, as `torch.take`.

    An entry may be taken several times; negative numbers count from the end. Shapes: x = input
    `(*before, n, *after)`, indices `(...)`, result `(*before, ..., *after)`.
    Derivative: each entry of x gets the sum of the gradients of the places that took it.

    Raises:
        IndexError: an index, or `dim`, out of range.
        TypeError: indices that are not integers.
    """
    x, index = as_tensor(input), as_tensor(indices).data
    axis = None if dim is None else valid_axis("take", dim, x.shape)
    count = x.data.size if axis is None else x.shape[axis]
    check_indices("take", index, count, negative=True)
    wrapped = index.astype(np.intp)
    wrapped[wrapped < 0] += count

    def vjp(grad: Array, out: Out) -> list[Array]:
        if not index.size:
            return [np.zeros(x.shape, x.dtype)]
        if axis is None or axis == x.ndim - 1:
            dx = np.empty(x.shape, x.dtype)
            _add_entries(wrapped.reshape(-1), grad.reshape(-1, index.size), dx.reshape(-1, count))
            return [dx]
        dx = np.empty((count, *x.shape[:axis], *x.shape[axis + 1 :]), x.dtype)
        rows = np.moveaxis(grad, range(axis, axis + index.ndim), range(index.ndim))
        add_rows(wrapped.reshape(-1), rows.reshape(index.size, dx.size // count), dx.reshape(count, dx.size // count))
        return [np.moveaxis(dx, 0, axis)]

    return record(x.data.take(wrapped, axis=axis), (x,), vjp)


def _add_entries(numbers: Array, rows: Array, out: Array) -> None:
    """out[r, i] = Σ of the entries of row r whose number is i, in blocks of rows that stay in the cache."""
    count = out.shape[1]
    step = max(1, _BLOCK // max(len(numbers), count))
    places = (np.arange(min(step, len(rows)))[:, None] * count + numbers).reshape(-1)
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        sums = np.bincount(places[: block.size], block.reshape(-1), len(block) * count)
        out[start : start + step] = sums.reshape(len(block), count)


def check_indices(operation: str, indices: Array, count: int, *, negative: bool) -> None:
    """Raise unless `indices` are integers in [0, count), or [−count, count) with `negative`."""
    if indices.dtype.kind not in "iu":
        raise TypeError(f"{operation} needs integer indices, got dtype {indices.dtype}")
    first = -count if negative else 0
    if indices.size and (indices.min() < first or indices.max() >= count):
        where = tuple(int(i) for i in np.argwhere((indices < first) | (indices >= count))[0])
        raise IndexError(
            f"{operation} got index {indices[where]} at position {', '.join(map(str, where))} of shape "
            f"{indices.shape}; indices go from {first} to {count - 1}"
        )
