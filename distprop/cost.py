"""What an Allreduce costs: three classical algorithms over two kinds of link, within a host and between hosts.

A message of n bytes takes α + nβ from one rank to another (Hockney's model). The algorithms trade messages against
bytes, and a library takes the one that is fastest for p ranks and n bytes; so does this model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """Between two ranks, a message of n bytes takes `latency` + n · `per_byte` seconds (α and β)."""

    latency: float
    per_byte: float

    @property
    def gigabits(self) -> float:
        """What the link carries, in Gbit/s."""
        return 8e-9 / self.per_byte if self.per_byte else math.inf


@dataclass(frozen=True)
class Cluster:
    """Hosts with `ranks_per_host` ranks each. On the way, one sum leaves each host, once."""

    ranks_per_host: int
    within: Link
    between: Link

    def allreduce_seconds(self, ranks: int, size: float) -> float:
        """First among the ranks of each host, then among the hosts; `size` in bytes."""
        local = allreduce_seconds(min(ranks, self.ranks_per_host), size, self.within)
        return local + allreduce_seconds(self.hosts(ranks), size, self.between)

    def hosts(self, ranks: int) -> int:
        """How many hosts `ranks` ranks fill."""
        return math.ceil(ranks / self.ranks_per_host)


def allreduce_seconds(ranks: int, size: float, link: Link) -> float:
    """The fastest of recursive doubling, Rabenseifner's algorithm and the ring, for `size` bytes on `ranks` ranks.

    Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH" (2005).
    """
    return min(messages * link.latency + passes * size * link.per_byte for messages, passes in algorithms(ranks))


def algorithms(ranks: int) -> tuple[tuple[float, float], ...]:
    """How many messages one after the other, and how often the whole data, a rank sends; for each algorithm.

    >>> algorithms(4)        # recursive doubling, Rabenseifner, ring
    ((2, 2), (4, 1.5), (6, 1.5))
    """
    doublings, share = math.ceil(math.log2(ranks)), 2 * (ranks - 1) / ranks
    return (doublings, doublings), (2 * doublings, share), (2 * (ranks - 1), share)


def fit_link(ranks: int, empty_seconds: float, size: float, seconds: float) -> Link:
    """The link for which an Allreduce of a few bytes and one of `size` bytes take as long as they were seen to."""
    latency = empty_seconds / math.ceil(math.log2(ranks))
    # With the largest of these no algorithm is faster than what was seen, and one takes exactly as long.
    per_byte = max((seconds - messages * latency) / (passes * size) for messages, passes in algorithms(ranks))
    return Link(latency, max(per_byte, 0.0))
