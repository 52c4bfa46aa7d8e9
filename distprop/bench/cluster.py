"""What `distprop predict` has to know about a job, measured in under a minute: a step alone, the links, a real step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from distprop.bench.links import measure_links, time_loop
from distprop.bench.workload import Workload, time_alone
from distprop.comm import Communicator, SoloCommunicator
from distprop.cost import Link

ROUNDS, ROUNDS_SECONDS = 5, 30.0  # at most
STEP_SECONDS = 1.0  # in all rounds, for one number of rows
LINK_SECONDS = 3.0  # for one size; a network's times scatter more than a processor's
LONGEST_BEFORE_SECONDS = 0.2  # a step that takes longer is not made before each message
LONGEST_CHECK_SECONDS = 4.0  # a real step that takes longer is not made


@dataclass(frozen=True)
class Measured:
    """A step without messages for several numbers of rows, and what the ranks were that were measured."""

    name: str
    batch: int
    rows: tuple[float, ...]
    seconds: tuple[float, ...]
    message_bytes: int
    hosts: tuple[str, ...]
    ranks: int
    ranks_per_host: int
    within: Link | None
    between: Link | None
    step_seconds: float | None  # with messages, on all these ranks

    def to_json(self) -> str:
        """One line."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str) -> Measured:
        """The reverse of `to_json`."""
        return msgspec.json.decode(text, type=cls)


def measure(comm: Communicator, workload: Workload, batch: int, host: str | None = None) -> Measured:
    """Measure with `batch` rows on each rank. Collective; `host` as in `measure_links`.

    Everything is measured in several rounds, so that a machine that is slower for a while is so for all of it alike.
    """
    step = workload.step(comm, batch) if comm.size > 1 else None
    began, rounds = time.monotonic(), [_measure_once(comm, workload, batch, host, step)]
    while _time_for_another(comm, len(rounds), time.monotonic() - began):
        rounds.append(_measure_once(comm, workload, batch, host, step))
    return replace(
        rounds[0],
        seconds=tuple(np.median([found.seconds for found in rounds], axis=0).tolist()),
        within=_median_link([found.within for found in rounds]),
        between=_median_link([found.between for found in rounds]),
        step_seconds=_median([found.step_seconds for found in rounds]),
    )


def _measure_once(
    comm: Communicator, workload: Workload, batch: int, host: str | None, step: Callable[[], None] | None
) -> Measured:
    """One round; `step` is the real one, with messages."""
    points = time_alone(workload, comm, batch, STEP_SECONDS / ROUNDS)
    alone = dict(points)[batch]
    before = workload.step(SoloCommunicator(), batch) if alone < LONGEST_BEFORE_SECONDS else None
    links = measure_links(comm, workload.message_bytes, LINK_SECONDS / ROUNDS, host, before)
    link = links.between or links.slowest_within
    expected = alone + (2 * workload.message_bytes * link.per_byte if link else 0)
    real = time_loop(comm, step, LINK_SECONDS / ROUNDS) if step and expected < LONGEST_CHECK_SECONDS else None
    return Measured(
        name=workload.name,
        batch=batch,
        rows=tuple(float(rows) for rows, _ in points),
        seconds=tuple(seconds for _, seconds in points),
        message_bytes=workload.message_bytes,
        hosts=tuple(host.name for host in links.hosts),
        ranks=comm.size,
        ranks_per_host=max(len(host.ranks) for host in links.hosts),
        within=links.slowest_within,
        between=links.between,
        step_seconds=real,
    )


def _time_for_another(comm: Communicator, rounds: int, seconds: float) -> bool:
    """Whether another round like those so far has time; rank 0 decides for all."""
    another = np.array([rounds < ROUNDS and seconds * (rounds + 1) / rounds < ROUNDS_SECONDS], np.float64)
    return bool(comm.broadcast(another)[0])


def _median(seconds: Sequence[float | None]) -> float | None:
    known = [value for value in seconds if value is not None]
    return float(np.median(known)) if known else None


def _median_link(links: Sequence[Link | None]) -> Link | None:
    known = [(link.latency, link.per_byte) for link in links if link is not None]
    return Link(*np.median(known, axis=0).tolist()) if known else None
