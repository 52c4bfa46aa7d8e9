"""Scenarios: tests written as functions of a communicator.

Threads run them in one process, `tests/parallel` runs them on MPI ranks. A scenario compares what its rank gets with
what one process would get, and leaves no rank behind in a collective.
"""

from collections.abc import Callable, Iterable

import pytest

from distprop.comm import Communicator, SoloCommunicator, run_threads

TIMEOUT_SECONDS = 20

Scenario = Callable[[Communicator], None]


class Suite:
    """A list of scenarios and of what each needs."""

    def __init__(self) -> None:
        self._entries: list[tuple[str, Scenario, int, tuple[str, ...]]] = []

    def scenario(self, min_size: int = 1, ignore: tuple[str, ...] = ()) -> Callable[[Scenario], Scenario]:
        """Decorate a scenario for `min_size` ranks or more, in which the warnings `ignore` are expected."""

        def add(function: Scenario) -> Scenario:
            self.add(function.__name__, function, min_size, ignore)
            return function

        return add

    def add(self, name: str, function: Scenario, min_size: int = 1, ignore: tuple[str, ...] = ()) -> None:
        """One more scenario."""
        self._entries.append((name, function, min_size, ignore))

    def in_threads(self, sizes: Iterable[int]) -> list[object]:
        """Parameters (scenario, size) of a test that calls `run`."""
        return [
            pytest.param(function, size, id=f"{name}-{size}", marks=_filters(ignore))
            for name, function, min_size, ignore in self._entries
            for size in sizes
            if size >= min_size
        ]

    def under_mpi(self) -> list[object]:
        """Parameters (scenario) of a test on MPI ranks."""
        return [
            pytest.param(function, id=name, marks=[*_filters(ignore), pytest.mark.mpi(min_size=min_size)])
            for name, function, min_size, ignore in self._entries
        ]

    def run_all(self, comm: Communicator) -> None:
        """All scenarios on this rank, one after the other."""
        for _, function, min_size, _ in self._entries:
            if comm.size >= min_size:
                function(comm)


def run(scenario: Scenario, size: int) -> None:
    """The scenario on `size` threads; a world of one is the real one. Even numbers share memory, as on one node."""
    if size == 1:
        scenario(SoloCommunicator())
    else:
        run_threads(size, scenario, TIMEOUT_SECONDS, share_memory=size % 2 == 0)


def _filters(ignore: Iterable[str]) -> list[pytest.MarkDecorator]:
    return [pytest.mark.filterwarnings(f"ignore:{message}") for message in ignore]
