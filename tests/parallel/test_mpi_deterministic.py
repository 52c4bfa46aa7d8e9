"""The same bits under real MPI, on every number of ranks, as one process makes."""

from collections.abc import Callable

import pytest

from deterministic_suite import CASES, Interruption, fingerprint, folder_of_rank_0, hash_of_files, train
from distprop.comm import Communicator, SoloCommunicator

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_the_bits_of_one_process(case: tuple[str, str, str], comm: Communicator) -> None:
    expected = on_rank_0(comm, lambda alone: fingerprint(alone, *case))
    assert fingerprint(comm, *case) == expected


@pytest.mark.parametrize("order", ["fewer ranks", "more ranks"])
def test_the_bits_of_a_run_that_was_not_interrupted(order: str, comm: Communicator, some: Communicator | None) -> None:
    """A run is interrupted in the middle of an epoch and goes on with another number of ranks."""
    case = ("convolutional", "augmented", "Adam")

    def whole(alone: Communicator) -> str:
        with folder_of_rank_0(alone) as folder:
            train(alone, folder, *case)
            return hash_of_files(alone, folder)

    expected = on_rank_0(comm, whole)
    before, after = (comm, some) if order == "fewer ranks" else (some, comm)
    with folder_of_rank_0(comm) as folder:
        if before is not None:
            with pytest.raises(Interruption):
                train(before, folder, *case, interrupt_at=7)
        comm.barrier()
        if after is not None:
            train(after, folder, *case, resume=True)
            assert hash_of_files(after, folder) == expected


def on_rank_0(comm: Communicator, function: Callable[[Communicator], str]) -> str:
    """What one process finds, on all ranks; computed once, since there may be more ranks than cores."""
    found = function(SoloCommunicator()) if comm.rank == 0 else ""
    return comm.allgather(found.encode())[0].decode()


@pytest.fixture(scope="module")
def some(comm: Communicator) -> Communicator | None:
    """A world of the first two thirds of the ranks, on those."""
    from mpi4py import MPI

    from distprop.comm.mpi import MPICommunicator

    belongs = comm.rank < max(1, comm.size * 2 // 3)
    split = MPI.COMM_WORLD.Split(0 if belongs else MPI.UNDEFINED)
    return MPICommunicator(split) if belongs else None
