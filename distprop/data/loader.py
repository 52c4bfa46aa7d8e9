"""Deals the rows of every global batch out to the ranks.

The order of an epoch is a function of (seed, epoch), the same on every rank, so ranks agree on every batch without a
message. A batch is a run of that order, and a rank's share is a contiguous run of the batch: the concatenation of the
shares over the ranks is the batch, whatever their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from distprop.data.background import ahead
from distprop.data.dataset import Dataset, at_epoch, check_dataset
from distprop.random import Stream, at, generator


class Ranks(Protocol):
    """What a `Loader` asks of a communicator."""

    @property
    def rank(self) -> int:
        """This process's number, from 0 to `size - 1`."""

    @property
    def size(self) -> int:
        """The number of ranks."""


def order(seed: int, epoch: int, length: int, shuffle: bool = True) -> NDArray[np.int64]:
    """The order `(length,)` in which epoch `epoch` visits the examples: a function of (seed, epoch), never of the rank.

    >>> order(seed=0, epoch=0, length=4, shuffle=False)
    array([0, 1, 2, 3])
    """
    if not shuffle:
        return np.arange(length, dtype=np.int64)
    return generator(seed, Stream.SHUFFLE, epoch).permutation(length).astype(np.int64, copy=False)


def share(rows: int, rank: int, size: int) -> slice:
    """The contiguous part of `rows` rows that belongs to `rank` of `size`.

    The parts follow one another in the order of the ranks, and their lengths differ by one at most, the longer ones
    first. With more ranks than rows the last ones are empty. ValueError if `rank` is not in 0..size-1.

    >>> [share(5, rank, 3) for rank in range(3)]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    if rows < 0 or not 0 <= rank < size:
        raise ValueError(f"share({rows}, rank={rank}, size={size}) needs rows >= 0 and 0 <= rank < size")
    each, longer = divmod(rows, size)  # the first `longer` ranks get one more
    start = rank * each + min(rank, longer)
    return slice(start, start + each + (rank < longer))


class Loader:
    """This rank's share of each global batch: `for x, y in Loader(train, batch_size=128, comm=comm, seed=0)`.

    Each iteration is one epoch, and the next one has a new order. Every example is served exactly once an epoch, over
    all ranks together; all ranks get the same number of batches. The last batch of an epoch may be smaller (or is left
    out with `drop_last`), and a rank's share of it may be empty, arrays of shape `(0, ...)`: such a rank still takes
    part in the step. Before each batch `distprop.random.at` is told where it is, so that dropout does not depend on the
    number of ranks.

    `batch_size` is the number of examples of the global batch, where PyTorch's `DataLoader` counts those of one
    process. With `shards` each global batch is cut into so many pieces, and a rank gets whole ones. With `prefetch`
    so many batches are loaded ahead in a background thread, see `ahead`. `comm` needs only `rank` and `size`; without
    it this is a world of one. `epoch` is the number of the next epoch and may be set. A dataset with `at_epoch` is
    asked for its examples of each epoch. Raises TypeError if `batch_size` is not an integer, and ValueError if it is
    below 1, or `shards` is, if the seed is negative, or if an epoch would have no batch.

    >>> from distprop.data.dataset import ArrayDataset
    >>> loader = Loader(ArrayDataset(np.arange(5)), batch_size=2, shuffle=False)
    >>> [x.tolist() for (x,) in loader], loader.epoch
    ([[0, 1], [2, 3], [4]], 1)
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        comm: Ranks | None = None,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        shards: int | None = None,
        prefetch: int = 0,
    ) -> None:
        check_dataset(dataset)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer):
            raise TypeError(f"batch_size must be an integer, got {batch_size!r} of type {type(batch_size).__name__}")
        if batch_size < 1:
            raise ValueError(f"batch_size is the number of examples of a global batch, 1 or more; got {batch_size}")
        if shards is not None and shards < 1:
            raise ValueError(f"shards is the number of pieces of a global batch, 1 or more; got {shards}")
        if seed < 0:
            raise ValueError(f"the seed must be 0 or more, got {seed}")
        if prefetch < 0:
            raise ValueError(f"prefetch is the number of batches loaded ahead, 0 or more; got {prefetch}")
        if len(dataset) == 0:
            raise ValueError("the dataset is empty; a Loader needs at least one example")
        if drop_last and len(dataset) < batch_size:
            raise ValueError(
                f"drop_last would leave no batch: batch_size is {batch_size} and there are {len(dataset)} examples"
            )
        self.dataset = dataset
        self.batch_size = int(batch_size)
        self.rank = 0 if comm is None else comm.rank
        self.size = 1 if comm is None else comm.size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.shards = shards
        self.prefetch = prefetch
        self.epoch = 0

    def __len__(self) -> int:
        """The number of batches of an epoch, equal on all ranks."""
        whole, rest = divmod(len(self.dataset), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[NDArray[Any], ...]]:
        """Serve the epoch `self.epoch`, and count it as started."""
        batches = self.batches(self.epoch)
        self.epoch += 1
        return batches

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[NDArray[Any], ...]]:
        """This rank's share of the batches `start` to the last of `epoch`; `self.epoch` stays as it is.

        A run that resumes in the middle of an epoch asks for the rest of it here. Raises ValueError if `epoch` is
        negative or `start` is not in 0..len(self).
        """
        if epoch < 0 or not 0 <= start <= len(self):
            raise ValueError(f"batches(epoch={epoch}, start={start}) needs epoch >= 0 and 0 <= start <= {len(self)}")
        return self._serve(epoch, start)

    def _serve(self, epoch: int, start: int) -> Iterator[tuple[NDArray[Any], ...]]:
        batches = self._load(epoch, start)
        for step, first_row, examples in ahead(batches, self.prefetch) if self.prefetch else batches:
            at(self.seed, step, first_row)  # here and not in `_load`, which may run in a thread, in another context
            yield examples

    def _load(self, epoch: int, start: int) -> Iterator[tuple[int, int, tuple[NDArray[Any], ...]]]:
        """(step, first row, examples) of each batch."""
        dataset = at_epoch(self.dataset, epoch)
        if len(dataset) != len(self.dataset):
            name = type(self.dataset).__name__
            raise ValueError(f"epoch {epoch} of {name} has {len(dataset)} examples, where it said {len(self.dataset)}")
        indices = order(self.seed, epoch, len(dataset), self.shuffle)
        for batch in range(start, len(self)):
            whole = indices[batch * self.batch_size : (batch + 1) * self.batch_size]
            mine = self.share_of(len(whole))
            examples = dataset[whole[mine]]
            self._check(examples, mine.stop - mine.start)
            yield epoch * len(self) + batch, mine.start, examples

    def rows(self, batch: int) -> int:
        """The number of examples of the global batch number `batch` of an epoch."""
        return min(self.batch_size, len(self.dataset) - batch * self.batch_size)

    def share_of(self, rows: int) -> slice:
        """This rank's part of a global batch: an even share, or with `shards` whole shards, evenly shared."""
        if self.shards is None:
            return share(rows, self.rank, self.size)
        run = share(self.shards, self.rank, self.size)
        if run.start == run.stop:
            return slice(rows, rows)
        return slice(share(rows, run.start, self.shards).start, share(rows, run.stop - 1, self.shards).stop)

    def _check(self, examples: tuple[NDArray[Any], ...], rows: int) -> None:
        """A dataset of the user's own may return anything; found here, it has a name, and no gradient is wrong yet."""
        if not isinstance(examples, tuple) or any(len(array) != rows for array in examples):
            got = (
                tuple(np.shape(array) for array in examples) if isinstance(examples, tuple) else type(examples).__name__
            )
            raise ValueError(
                f"{type(self.dataset).__name__}[indices of shape ({rows},)] returned {got}; "
                f"a dataset returns a tuple of arrays, each with {rows} rows"
            )
