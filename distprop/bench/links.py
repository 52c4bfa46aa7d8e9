"""How fast ranks exchange numbers: Allreduce's latency and bandwidth within each host and between hosts.

Between hosts one rank of each takes part. All figures are medians, of the rank that took longest.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distprop.comm import Communicator
from distprop.cost import Link, fit_link

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class HostLinks:
    """A host with its ranks; `link` is None for one rank alone."""

    name: str
    ranks: tuple[int, ...]
    link: Link | None


@dataclass(frozen=True)
class Links:
    """Every host of a world, and the link between hosts if there are several."""

    hosts: tuple[HostLinks, ...]
    between: Link | None

    @property
    def slowest_within(self) -> Link | None:
        """The link of the host whose ranks exchange a message of 1 MB most slowly."""
        links = [host.link for host in self.hosts if host.link is not None]
        return max(links, key=lambda link: link.latency + MEGABYTE * link.per_byte, default=None)


def measure_links(
    comm: Communicator,
    size: int = 4 * MEGABYTE,
    seconds: float = 2.0,
    host: str | None = None,
    before: Callable[[], object] | None = None,
) -> Links:
    """Time Allreduce of a few bytes and of `size` bytes, each for about `seconds`. Collective.

    `host` is this rank's; two names on one machine make two hosts of it. `before` is what a rank does before each
    large message, such as computing a step: see `time_allreduce`.
    """
    by_host = ranks_by_host(comm, host)
    names, mine = list(by_host), next(ranks for ranks in by_host.values() if comm.rank in ranks)
    own = _fit(_group(comm, mine), size, seconds, before)
    links = [_read(message) for message in comm.allgather(_write(own))]
    leaders = [ranks[0] for ranks in by_host.values()]
    between = _fit(_group(comm, leaders), size, seconds, before) if len(names) > 1 else None
    between = _read(comm.allgather(_write(between))[0])
    hosts = tuple(HostLinks(name, tuple(ranks), links[ranks[0]]) for name, ranks in by_host.items())
    return Links(hosts, between)


def ranks_by_host(comm: Communicator, host: str | None = None) -> dict[str, list[int]]:
    """The ranks of each host, hosts in the order of their first rank. Collective."""
    by_host: dict[str, list[int]] = {}
    for rank, name in enumerate(comm.allgather((host or os.uname().nodename).encode())):
        by_host.setdefault(name.decode(), []).append(rank)
    return by_host


def time_allreduce(comm: Communicator, size: int, seconds: float, before: Callable[[], object] | None = None) -> float:
    """Median seconds of an Allreduce of `size` bytes of float32, repeated for about `seconds`. Collective.

    With `before`, what the Allreduce adds to a loop of that: waiting for ranks that are late, caches that it fills with
    other data, and a processor that computes and moves data at once are part of it.
    """
    array = comm.allocate(max(1, size // 4), np.float32)  # as gradients are: ranks of a host sum them in their memory
    if before is None:
        return time_together(comm, lambda: comm.allreduce(array), seconds)

    def step() -> None:
        before()
        comm.allreduce(array)

    return max(0.0, time_loop(comm, step, seconds) - time_together(comm, before, seconds / 2))


def time_together(comm: Communicator, function: Callable[[], object], seconds: float) -> float:
    """Median over calls of what the slowest rank took, all calling at once for about `seconds`. Collective."""
    return float(np.median(_taken(comm, function, seconds).max(axis=0)))


def time_loop(comm: Communicator, step: Callable[[], object], seconds: float) -> float:
    """Median seconds of a step in a loop, where ranks wait for each other in `step` only. Collective.

    Of each step it is the mean over the ranks. A rank that is late makes the other one late, but finds the other's
    message there and is early the next time: they take turns, and none holds up the loop for as long as it took itself.
    """
    return float(np.median(_taken(comm, step, seconds).mean(axis=0)))


def _taken(comm: Communicator, function: Callable[[], object], seconds: float) -> NDArray[np.float64]:
    """What each call took, `(ranks, calls)`, in about `seconds`."""

    def taken() -> float:
        began = time.perf_counter()
        function()
        return time.perf_counter() - began

    taken()  # opens connections and touches pages
    repeats = np.array([min(1000, max(3, seconds / taken()))], np.float64)
    comm.broadcast(repeats)
    mine = np.array([taken() for _ in range(int(repeats[0]))])
    return np.array([np.frombuffer(message) for message in comm.allgather(mine.tobytes())])


def measure_speed(comm: Communicator) -> list[float]:
    """Each rank's median seconds for a matrix product of 512³, all ranks at once. Collective."""
    a = np.ones((512, 512), np.float32)
    out = np.empty_like(a)
    comm.barrier()
    taken: list[float] = []
    end = time.perf_counter() + 0.5
    while time.perf_counter() < end or len(taken) < 3:
        began = time.perf_counter()
        np.matmul(a, a, out=out)
        taken.append(time.perf_counter() - began)
    return [float(message) for message in comm.allgather(repr(float(np.median(taken))).encode())]


def _fit(group: Communicator | None, size: int, seconds: float, before: Callable[[], object] | None) -> Link | None:
    if group is None or group.size == 1:
        return None
    empty = time_allreduce(group, 8, seconds / 4)
    if size > MEGABYTE:  # a slow link gets what it carries in half a second
        size = int(min(size, MEGABYTE * max(1, 0.5 / time_allreduce(group, MEGABYTE, seconds / 4))))
    link = fit_link(group.size, empty, size, time_allreduce(group, size, seconds, before))
    if link.per_byte:
        return link
    # The message's time was lost in that of what came before it, or in the latency: a larger one alone shows its own.
    return fit_link(group.size, empty, MEGABYTE, time_allreduce(group, MEGABYTE, seconds))


def _group(comm: Communicator, ranks: list[int]) -> Communicator | None:
    """A communicator of these ranks, None for the others; the world's own where they are the whole world."""
    if len(ranks) == comm.size:
        return comm
    from distprop.comm import mpi

    group = mpi.group(ranks[0] if comm.rank in ranks else None)
    return group if comm.rank in ranks else None


def _write(link: Link | None) -> bytes:
    return b"" if link is None else np.array([link.latency, link.per_byte]).tobytes()


def _read(message: bytes) -> Link | None:
    return Link(*np.frombuffer(message).tolist()) if message else None
