"""What a reduction costs in a training loop, on a network and with steps whose times are known to the last digit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distprop.bench.cluster import Measured, measure
from distprop.bench.links import measure_links, time_allreduce, time_loop, time_together
from distprop.comm import Communicator
from distprop.comm.threads import ThreadCommunicator, run_threads
from distprop.cost import Link
from distprop.predict import Question, answer

LINK = Link(latency=1e-4, per_byte=1e-8)
MESSAGE_BYTES = 2_000_000
MESSAGE_SECONDS = LINK.latency + MESSAGE_BYTES * LINK.per_byte


class Clock(threading.local):
    """Each rank's own, which goes on when it computes or waits."""

    now = 0.0

    def compute(self, seconds: float) -> None:
        self.now += seconds


class Network(ThreadCommunicator):
    """Two ranks on `LINK`, over which each sends without waiting for the other, as MPI does with an eager message.

    So a rank that comes late finds the other's message half arrived, or there.
    """

    def __init__(self, comm: ThreadCommunicator, clock: Clock) -> None:
        super().__init__(comm._meeting, comm.rank)
        self._clock = clock

    def _exchange(self, call: tuple[Any, ...], thing: Any) -> list[Any]:
        came, things = zip(*super()._exchange(call, (self._clock.now, thing)), strict=True)
        if call[0] == "allreduce":
            arrival = came[1 - self.rank] + LINK.latency + thing.nbytes * LINK.per_byte
            self._clock.now = max(self._clock.now, arrival)
        else:
            self._clock.now = max(came)
        return list(things)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("distprop.bench.links.time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def on_two_ranks(clock: Clock, function: Callable[[Network], Any]) -> list[Any]:
    return run_threads(2, lambda comm: function(Network(comm, clock)))


@dataclass
class Late:
    """Computing for 5 ms, and once, on one rank, for longer."""

    clock: Clock
    late: float
    calls: int = 0

    def __call__(self) -> None:
        self.calls += 1
        self.clock.compute(5e-3 + (self.late if self.calls == 3 else 0))


def test_ranks_that_are_late_by_turns_do_not_hold_up_the_loop(clock: Clock) -> None:
    def both(comm: Network) -> tuple[float, float]:
        array = np.zeros(MESSAGE_BYTES // 4, np.float32)
        found = []
        for timed in (time_loop, time_together):
            compute = Late(clock, late=4e-3 * comm.rank)
            found.append(timed(comm, lambda compute=compute: (compute(), comm.allreduce(array)), 0.5))
        return found[0], found[1]

    for loop, slowest in on_two_ranks(clock, both):
        assert loop == pytest.approx(5e-3 + MESSAGE_SECONDS)
        assert slowest == pytest.approx(5e-3 + MESSAGE_SECONDS + 4e-3)


def test_a_reduction_alone_costs_what_the_link_says(clock: Clock) -> None:
    for size in (8, MESSAGE_BYTES):
        found = on_two_ranks(clock, lambda comm, size=size: time_allreduce(comm, size, 0.5))
        assert found == pytest.approx([LINK.latency + size * LINK.per_byte] * 2)


def test_a_reduction_costs_what_it_adds_to_the_slowest_rank(clock: Clock) -> None:
    def added(comm: Network) -> float:
        return time_allreduce(comm, MESSAGE_BYTES, 0.5, lambda: clock.compute(5e-3 + 2e-3 * comm.rank))

    # A step takes 6 ms, the mean of the ranks, and the message; what the slowest takes alone is 7.
    assert on_two_ranks(clock, added) == pytest.approx([MESSAGE_SECONDS - 1e-3] * 2)


def test_a_rate_that_is_lost_in_the_step_is_that_of_a_larger_message(clock: Clock) -> None:
    def rate(comm: Network) -> float:
        link = measure_links(comm, 800, 0.5, before=lambda: clock.compute(5e-3 + 2e-3 * comm.rank)).hosts[0].link
        assert link is not None
        return link.per_byte

    assert on_two_ranks(clock, rate) == pytest.approx([LINK.per_byte] * 2, rel=0.01)


@dataclass(frozen=True)
class Workload:
    """A step of known length; rank 1 needs a fifth more."""

    clock: Clock
    rank: int
    name: str = "known"
    message_bytes: int = MESSAGE_BYTES

    def step(self, comm: Communicator, rows: int) -> Callable[[], None]:
        array = np.zeros(self.message_bytes // 4, np.float32)

        def step() -> None:
            self.clock.compute((1e-3 + rows * 1e-4) * (1 + self.rank / 5))
            if comm.size > 1:
                comm.allreduce(array)

        return step


def test_the_prediction_for_the_measured_ranks_is_their_step(clock: Clock) -> None:
    def measured(comm: Network) -> Measured:
        return measure(comm, Workload(clock, comm.rank), 64)  # type: ignore[arg-type]

    for found in on_two_ranks(clock, measured):
        check = answer(Question(None, (20, 5)), found).measured_ranks
        assert check is not None
        assert found.step_seconds == pytest.approx(7.4e-3 * 1.1 + MESSAGE_SECONDS)
        assert check.step_seconds == pytest.approx(found.step_seconds)
        assert check.allreduce_seconds == pytest.approx(MESSAGE_SECONDS, rel=0.05)
