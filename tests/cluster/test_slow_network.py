"""`distprop predict` between hosts whose network is as slow as it is told: predicted and measured steps agree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from containers import Hosts

TOLERANCE = 0.15


@contextmanager
def slow_network(hosts: Hosts, rate: str) -> Iterator[None]:
    """node1 and node2 send no faster than `rate`."""
    nodes = ("node1", "node2")
    limit = ["root", "tbf", "rate", rate, "burst", "32kb", "latency", "50ms"]
    try:
        for node in nodes:
            done = hosts.on(node, "tc", "qdisc", "add", "dev", "eth0", *limit, options=["--privileged", "-u", "root"])
            assert done.returncode == 0, done.stderr
        yield
    finally:
        for node in nodes:
            hosts.on(node, "tc", "qdisc", "del", "dev", "eth0", "root", options=["--privileged", "-u", "root"])
