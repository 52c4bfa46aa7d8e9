"""What a dataset is: a length, and many rows at once.

Asking for a whole batch by an index array costs one gather in NumPy; asking row by row would cost a Python call each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Dataset(Protocol):
    """Anything that hands out many examples at once. A class of your own needs these two methods, and no base class.

    One whose examples change from epoch to epoch has a third, `at_epoch(epoch)`, that returns the dataset of that
    epoch, as long as this one; a `Loader` calls it. It must be another object: the last epoch's batches may still be in
    use.
    """

    def __len__(self) -> int:
        """The number of examples."""

    def __getitem__(self, indices: NDArray[np.int64]) -> tuple[NDArray[Any], ...]:
        """The examples `indices (n,)`, as a tuple of arrays whose leading axes are all n. n may be 0."""


def check_dataset(dataset: Any) -> None:
    """Refuse what has not both methods, and arrays by themselves, which would be taken for examples.

    Raises:
        TypeError: it is no dataset; the message says what to do.
    """
    arrays = isinstance(dataset, tuple | list | Mapping | np.ndarray)
    if arrays or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        inside = "; pass its `dataset`" if hasattr(dataset, "dataset") else ""  # a Loader, PyTorch's too
        raise TypeError(
            f"expected a dataset, got a {type(dataset).__name__}{inside or '; wrap arrays in data.ArrayDataset(x, y)'}"
        )


def at_epoch(dataset: Dataset, epoch: int) -> Dataset:
    """The dataset of `epoch`, which is `dataset` itself where epochs make no difference."""
    change = getattr(dataset, "at_epoch", None)
    return dataset if change is None else change(epoch)


def split_target(arrays: Iterable[NDArray[Any]]) -> tuple[list[NDArray[Any]], NDArray[Any]]:
    """The inputs, and the target, which is the last of the `arrays` of a batch.

    Raises:
        ValueError: there is no input.
    """
    *inputs, target = arrays
    if not inputs:
        raise ValueError("training takes examples of inputs and a target, got one array; make ArrayDataset(x, y)")
    return inputs, target


class ArrayDataset:
    """Examples held in arrays that share their leading axis: `ArrayDataset(x, y)`, x `(n, ...)` and y `(n, ...)`.

    One array or more; nothing is copied, so a memory-mapped array stays on disk and only the rows asked for are read.
    Raises ValueError if the arrays differ in length, have no leading axis, or hold Python objects.

    >>> train = ArrayDataset(np.zeros((5, 3)), np.arange(5))
    >>> x, y = train[np.array([4, 0])]
    >>> x.shape, y
    ((2, 3), array([4, 0]))
    """

    def __init__(self, *arrays: ArrayLike) -> None:
        if not arrays:
            raise ValueError("ArrayDataset got no arrays; pass at least one, as in ArrayDataset(x, y)")
        # An ndarray is kept as it is: asarray would strip the type from a memory map.
        self.arrays = tuple(a if isinstance(a, np.ndarray) else np.asarray(a) for a in arrays)
        for number, array in enumerate(self.arrays):
            if array.ndim == 0 or array.dtype.hasobject:
                raise ValueError(
                    f"ArrayDataset got an array of shape {array.shape} and dtype {array.dtype} as array {number}; "
                    f"it needs numbers with a leading axis of examples"
                )
            if len(array) != len(self.arrays[0]):
                raise ValueError(
                    f"ArrayDataset got {len(self.arrays[0])} examples of shape {self.arrays[0].shape} as array 0 but "
                    f"{len(array)} of shape {array.shape} as array {number}; the leading axes must be equal"
                )

    @property
    def x(self) -> NDArray[Any]:
        """The first array `(n, ...)`, by convention the inputs."""
        return self.arrays[0]

    @property
    def y(self) -> NDArray[Any]:
        """The second array `(n, ...)`, by convention the targets. AttributeError if there is only one."""
        if len(self.arrays) < 2:
            raise AttributeError("this ArrayDataset holds only x; make it with ArrayDataset(x, y) to have y")
        return self.arrays[1]

    def __len__(self) -> int:
        return len(self.arrays[0])

    def __getitem__(self, indices: NDArray[np.int64] | slice | int) -> tuple[NDArray[Any], ...]:
        """Those rows of every array: views for a slice, copies for an index array. IndexError if out of range."""
        return tuple(array[indices] for array in self.arrays)

    def take(self, indices: NDArray[np.int64] | slice) -> ArrayDataset:
        """The dataset of the rows `indices` only. A slice shares memory with this one, and stays memory-mapped.

        >>> len(ArrayDataset(np.arange(10)).take(slice(0, 4)))
        4
        """
        return ArrayDataset(*self[indices])

    def __repr__(self) -> str:
        return f"ArrayDataset({', '.join(f'{array.shape} {array.dtype}' for array in self.arrays)})"
