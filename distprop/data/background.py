"""Loading ahead: the next batch is made in a thread while this one is trained on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_END = object()


def ahead(items: Iterable[T], count: int = 1) -> Iterator[T]:
    """The same items in the same order, each asked for in a background thread `count` items before it is wanted.

    An exception in `items` is raised here, at its place in the order. The thread starts with the first item and has
    ended when the iteration has, also where the consumer stops early: what is being loaded then is waited for. It has
    a context of its own, so context variables that `items` sets, or reads, are not those of the consumer.

    It is worth its thread where loading waits for a disk, or where a core is idle; NumPy holds the interpreter's lock
    during much of an augmentation. Raises ValueError if `count` is below 1.

    >>> list(ahead(range(3)))
    [0, 1, 2]
    """
    if count < 1:
        raise ValueError(f"ahead() loads at least one item ahead, got count={count}")
    return _ahead(iter(items), count)


def _ahead(items: Iterator[T], count: int) -> Iterator[T]:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(
        max_workers=1, thread_name_prefix="distprop-ahead"
    ) as thread:  # leaving it joins the thread
        pending = deque(thread.submit(next, items, _END) for _ in range(count))
        try:
            while (item := pending.popleft().result()) is not _END:
                pending.append(thread.submit(next, items, _END))
                yield item  # type: ignore[misc] # not _END, so a T
        finally:
            for future in pending:
                future.cancel()
