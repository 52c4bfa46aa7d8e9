"""Tests on MPI ranks: `python tests/mpirun.py 1 2 3 4`, or by hand

    mpirun -n 3 python -m pytest --with-mpi tests/parallel

Every rank runs every test, and they begin each test together. A test that fails on some ranks may leave the others in a
collective, where they would wait for ever: the job ends then, within seconds and with the reason.
"""

import faulthandler
import os
import sys
import tempfile
import time

import pytest

from distprop.comm import Communicator, world

LIMIT_SECONDS = 60  # for one test; then the stacks are shown and the job ends
PATIENCE_SECONDS = 10  # for the slowest rank, after another one has failed


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Leave this folder out of ordinary runs."""
    return None if config.getoption("with_mpi", default=False) else True


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main(config: pytest.Config):
    """Every rank has a temporary folder of its own: ranks that clean up pytest's common one trip over each other."""
    if not config.getoption("with_mpi", default=False):
        return (yield)
    with tempfile.TemporaryDirectory(prefix="distprop-tests-") as folder:
        config.option.basetemp = f"{folder}/pytest"
        return (yield)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Rank 0 tells how it goes; the others speak only if they fail."""
    if config.getoption("with_mpi", default=False):
        config.pluginmanager.register(Ranks(world()))
        if world().rank != 0:
            config.pluginmanager.unregister(name="terminalreporter")


class Ranks:
    """Keeps the ranks at the same test."""

    def __init__(self, comm: Communicator) -> None:
        from mpi4py import MPI

        self.rank, self.size = comm.rank, comm.size
        self.apart = MPI.COMM_WORLD.Dup()  # so that its messages cannot meet those of a test that went wrong
        self.failed = False
        self.stderr = os.dup(2)  # the real one; tests have theirs captured

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        """One test, from its beginning on all ranks to its end on all ranks."""
        self.failed = False
        faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True, file=self.stderr)
        result = yield
        self.meet(item.nodeid)
        faulthandler.cancel_dump_traceback_later()
        return result

    def pytest_unconfigure(self) -> None:
        """Launchers end a job at the first rank that leaves with a failure; rank 0 has a summary to show."""
        self.meet("the end")

    def meet(self, where: str) -> None:
        """Wait for all ranks; after a failure not for ever."""
        all_here = self.apart.Ibarrier()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not all_here.Test():
            if self.failed and time.monotonic() > deadline:
                self.say(f"rank {self.rank} failed {where}, and others still wait in it; ending the job")
                self.apart.Abort(1)
            time.sleep(0.0005)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Say at once what failed: the summary at the end may never come."""
        if report.failed:
            self.failed = True
            self.say(f"=== rank {self.rank} of {self.size}, {report.nodeid}\n{report.longreprtext}")

    def say(self, text: str) -> None:
        os.write(self.stderr, f"\n{text}\n".encode())
        sys.stderr.flush()


@pytest.fixture(scope="session")
def comm() -> Communicator:
    """The world."""
    return world()
