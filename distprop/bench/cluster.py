"""What `distprop predict` has to know about a job, measured in under a minute: a step alone, the links, a real step."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from distprop.bench.links import measure_links, time_loop
from distprop.bench.workload import Workload, time_alone
from distprop.comm import Communicator, SoloCommunicator
from distprop.cost import Link

LINK_SECONDS = 4.0  # for one size; a network's times scatter more than a processor's
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
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Measured:
        """The reverse of `to_json`."""
        values = json.loads(text)
        for name in ("within", "between"):
            values[name] = values[name] and Link(**values[name])
        for name in ("rows", "seconds", "hosts"):
            values[name] = tuple(values[name])
        return cls(**values)


def measure(comm: Communicator, workload: Workload, batch: int, host: str | None = None) -> Measured:
    """Measure with `batch` rows on each rank. Collective; `host` as in `measure_links`."""
    points = time_alone(workload, comm, batch)
    alone = dict(points)[batch]
    before = workload.step(SoloCommunicator(), batch) if alone < LONGEST_BEFORE_SECONDS else None
    links = measure_links(comm, workload.message_bytes, LINK_SECONDS, host, before)
    link = links.between or links.slowest_within
    expected = alone + (2 * workload.message_bytes * link.per_byte if link else 0)
    real = None
    if comm.size > 1 and expected < LONGEST_CHECK_SECONDS:
        real = time_loop(comm, workload.step(comm, batch), LINK_SECONDS)
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
