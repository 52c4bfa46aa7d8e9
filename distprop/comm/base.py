"""The one seam between training and the outside world: what a group of ranks can do together.

Ten names, the same on every backend. Training code calls them without asking how many ranks there are; in a world of
one they do nothing. Only numbers and bytes travel, never pickled objects.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

if TYPE_CHECKING:
    from distprop.comm.node import Node

Array = TypeVar("Array", bound=NDArray[Any])

_END_OF_TAG = b"\0\n"  # between purpose and message


class CollectiveError(RuntimeError):
    """A collective could not be completed, since another rank failed or called another; `culprits` if known which."""

    def __init__(self, message: str, culprits: Sequence[int] = ()) -> None:
        super().__init__(message)
        if culprits:
            self.culprits = tuple(culprits)


class Communicator(Protocol):
    """A group of `size` ranks; this process (or thread) is number `rank`.

    All methods but `abort` are collective: every rank calls them, in the same order.
    """

    @property
    def rank(self) -> int:
        """This process's number, from 0 to `size - 1`."""

    @property
    def size(self) -> int:
        """The number of ranks."""

    @property
    def node(self) -> Node | None:
        """The ranks that share this one's memory, if there are any."""

    def allocate(self, length: int, dtype: DTypeLike) -> NDArray[Any]:
        """Zeros `(length,)` for a message that will be summed often; `allreduce` of it takes the fastest way."""

    def allreduce(self, array: Array) -> Array:
        """Sum `array` over the ranks, in place; all ranks pass the same shape and dtype. Returns `array`."""

    def broadcast(self, array: Array, root: int = 0) -> Array:
        """Overwrite `array` with the one of rank `root`, in place. Returns `array`."""

    def allgather(self, message: bytes) -> list[bytes]:
        """Every rank's message, by rank. The lengths may differ."""

    def alltoall(
        self, send: Array, send_slices: Sequence[slice], receive: Array, receive_slices: Sequence[slice]
    ) -> None:
        """Send `send[send_slices[r]]` to each rank r, and put what comes from it into `receive[receive_slices[r]]`.

        Both arrays have one axis and the same dtype on all ranks; the lengths agree between sender and receiver. They
        may be the same array if no number is both sent and received.
        """

    def barrier(self) -> None:
        """Return once every rank has arrived."""

    def abort(self, status: int = 1) -> None:
        """End every rank of the job now, with exit status `status`. Not collective: one rank is enough."""


def allgather_for(purpose: str, comm: Communicator, message: bytes) -> list[bytes]:
    """Every rank's message, by rank, all for one purpose. Collective.

    Raises:
        CollectiveError: on all ranks; some gather for another purpose, such as one that evaluates alone. Without this
            they would take each other's messages for their own.
    """
    tag = purpose.encode() + _END_OF_TAG
    messages = comm.allgather(tag + message)
    if not all(other.startswith(tag) for other in messages):
        raise _different_places(messages)
    return [other[len(tag) :] for other in messages]


def allgather_json(purpose: str, comm: Communicator, value: Any) -> list[Any]:
    """`allgather_for` of what JSON can say, so a tuple arrives as a list. Collective."""
    messages = allgather_for(purpose, comm, json.dumps(value, separators=(",", ":")).encode())
    return [json.loads(message) for message in messages]


def _different_places(messages: Sequence[bytes]) -> CollectiveError:
    at: dict[str, list[int]] = {}
    for rank, message in enumerate(messages):
        name, end, _ = message.partition(_END_OF_TAG)
        at.setdefault(name.decode(errors="replace") if end else "something else", []).append(rank)
    places = "; ".join(f"rank{'s' * (len(at[name]) > 1)} {', '.join(map(str, at[name]))}: {name}" for name in at)
    return CollectiveError(
        f"the ranks are at different places ({places}); all ranks must make the same calls in the same order, also "
        "those of evaluate()",
        odd_ranks({rank: name for name, ranks in at.items() for rank in ranks}),
    )


def odd_ranks(values: Mapping[int, Hashable]) -> tuple[int, ...]:
    """Of values by rank, the ranks whose value most do not have; all of them where two camps are of one size."""
    counts = Counter(values.values()).most_common()
    tied = len(counts) > 1 and counts[0][1] == counts[1][1]
    return tuple(sorted(rank for rank, value in values.items() if tied or value != counts[0][0]))


def check_root(root: int, size: int) -> None:
    """Refuse a root that is no rank of the world."""
    if not 0 <= root < size:
        raise ValueError(f"root {root} is not a rank of a world of {size}")


def check_summable(array: np.ndarray[Any, Any]) -> None:
    """Refuse what cannot be summed over the ranks in place."""
    check_contiguous(array)
    if array.dtype.kind not in "iufc":
        raise TypeError(f"allreduce sums numbers, got {array.dtype}; count True as 1 with .astype(np.int64)")


def check_contiguous(array: np.ndarray[Any, Any]) -> None:
    """Collectives work in place on memory, so they refuse what is not one block of it."""
    if not isinstance(array, np.ndarray) or not array.flags.c_contiguous or not array.flags.writeable:
        raise ValueError(
            f"a collective works in place on a writeable, C-contiguous NumPy array; got "
            f"{type(array).__name__} of shape {np.shape(array)}; pass np.ascontiguousarray(...) of it"
        )
