import contextlib
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from communicator_suite import suite
from distprop.comm import mpi, node, world
from distprop.comm.recorder import here
from distprop.nn import Linear
from distprop.optim import SGD
from distprop.parallel import DataParallel

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("scenario", suite.under_mpi())
def test_communicator(scenario, comm):
    scenario(comm)


@pytest.mark.mpi(min_size=2)
def test_communicator_of_a_part_of_the_world():
    """Even and odd ranks by themselves: nothing may count on rank 0 of MPI's world."""
    from mpi4py import MPI

    part = MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank % 2, -MPI.COMM_WORLD.rank)
    comm = mpi.MPICommunicator(part)
    assert (comm.rank, comm.size) == (part.rank, part.size)
    suite.run_all(comm)
    part.Free()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("ranks_per_node", [1, 2, 3])
def test_communicator_of_several_nodes(ranks_per_node):
    """Neighbours play the ranks of a node; the last node may have fewer than the others."""
    comm = mpi.MPICommunicator(ranks_per_node=ranks_per_node)
    suite.run_all(comm)
    if ranks_per_node > 1:
        assert comm.node.size == min(ranks_per_node, comm.size - comm.rank // ranks_per_node * ranks_per_node)
        assert len(comm.node.arrays(comm.allocate(10, np.float32))) == comm.node.size


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_what_crosses_a_network_is_summed_in_pieces(ranks_per_node, monkeypatch):
    monkeypatch.setattr(mpi, "EAGER_BYTES", 64)
    comm = mpi.MPICommunicator(ranks_per_node=ranks_per_node)
    suite.run_all(comm)


@pytest.mark.mpi(min_size=2)
def test_what_a_part_of_the_world_calls_has_no_number_among_the_worlds_collectives(comm):
    """Parts may call more or less than others, as when each host's link is measured for a second."""
    before = here.sequence
    part = mpi.group(comm.rank % 2)
    suite.run_all(part)
    assert here.sequence == before


@pytest.mark.mpi(min_size=2)
def test_ranks_of_one_node_share_their_messages(comm):
    assert len(comm.node.arrays(comm.allocate(10, np.float32))) == comm.size


@pytest.mark.mpi(min_size=2)
def test_without_shared_memory_the_library_sums(monkeypatch, tmp_path):
    monkeypatch.setattr(node, "_FOLDER", str(tmp_path / "missing"))
    comm = mpi.MPICommunicator()
    assert comm.node.arrays(comm.allocate(10, np.float32)) is None
    suite.run_all(comm)


@pytest.mark.mpi(min_size=3)
def test_how_gradients_are_summed_follows_from_the_nodes():
    across = mpi.MPICommunicator(ranks_per_node=2)
    assert DataParallel(Linear(2, 1), across).reduction == "shared memory on each node, one message between nodes"
    assert DataParallel(Linear(2, 1), across, shards=4).reduction == "one message, a fixed tree of 4 shards"
    assert DataParallel(Linear(2, 1), mpi.MPICommunicator(ranks_per_node=1)).reduction == "one message"


@pytest.mark.mpi(min_size=2)
def test_one_rank_without_shared_memory_is_enough_for_all_to_do_without(monkeypatch, tmp_path):
    comm = mpi.MPICommunicator()
    if comm.rank == comm.size - 1:
        monkeypatch.setattr(node, "_map", lambda path, size: None)
    message = comm.allocate(10, np.float32)
    message += comm.rank
    assert comm.allreduce(message)[0] == sum(range(comm.size))
    assert comm.node.arrays(message) is None


def empty_files():
    """What a rank leaves that could make a file, and got no memory for it; those of other jobs have their length."""
    for file in Path("/dev/shm").glob("distprop-*"):
        with contextlib.suppress(FileNotFoundError):
            if file.is_file() and not file.stat().st_size:
                yield file


@pytest.fixture
def cramped():
    """No file grows beyond 64 kB, not in /dev/shm either."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("options", [{}, {"sharded_update": True}, {"shards": 4}, {"wire": "bf16"}])
def test_gradients_for_which_shared_memory_is_too_small_are_summed_by_messages(comm, cramped, options):
    """It refuses the first rank that asks for it, once a file has a name; the others must not look for its memory."""
    files = set(empty_files())
    model = Linear(1, 10_000, bias=False)  # 40 kB, which there would be room for once
    model.weight.data[...] = 0
    parallel = DataParallel(model, comm, **options)
    assert parallel.reduction == "one message" + ", a fixed tree of 4 shards" * ("shards" in options)
    assert set(empty_files()) <= files
    assert model.weight.buffer.sharers is None
    optimizer = SGD(model.parameters(), lr=1.0)
    if "shards" in options:
        for shard in range(comm.rank, 4, comm.size):
            parallel(np.full((1, 1), 1 + shard, np.float32)).sum().backward()
            parallel.end_shard()
        parallel.reduce_shards()
    else:
        parallel(np.full((1, 1), 1 + comm.rank * 2**-10, np.float32)).sum().backward()
    expected = 2.5 if "shards" in options else np.mean([1 + rank * 2**-10 for rank in range(comm.size)])
    optimizer.step()
    np.testing.assert_allclose(model.weight.data, -expected, rtol=1e-7)  # float32; bf16 would round by 2⁻⁹


@pytest.mark.mpi(min_size=2)
def test_shared_memory_has_no_name_and_goes_with_its_array(comm):
    def mapped():
        return [line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/distprop-" in line]

    before = mapped()
    for _ in range(20):
        message = comm.allocate(1_000_000, np.float32)
        comm.allreduce(message)
    assert 1 <= len(mapped()) - len(before) <= 2
    assert all(line.endswith("(deleted)") for line in mapped())
    comm.barrier()


def test_the_world_is_one_object(comm):
    from mpi4py import MPI

    assert world() is comm
    assert isinstance(comm, mpi.MPICommunicator)
    assert (comm.rank, comm.size) == (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size)


@pytest.mark.mpi(min_size=2)
def test_an_uncaught_exception_would_end_the_job(comm):
    assert sys.excepthook.__module__ == mpi.__name__


@pytest.mark.mpi(min_size=2)
def test_messages_of_the_users_own_do_not_meet_ours(comm):
    """A receive for anything from anyone is open all the time, and gets what the user sends."""
    from mpi4py import MPI

    received = np.zeros(4)
    request = MPI.COMM_WORLD.Irecv(received, source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG)
    suite.run_all(comm)
    assert not request.Test()
    comm.barrier()
    MPI.COMM_WORLD.Send(np.full(4, 7.0 + comm.rank), dest=(comm.rank + 1) % comm.size)
    request.Wait()
    np.testing.assert_array_equal(received, 7.0 + (comm.rank - 1) % comm.size)


def test_no_rank_passes_a_barrier_before_the_last_has_arrived(comm):
    for last in range(comm.size):
        comm.barrier()
        arrived = np.zeros(1)
        if comm.rank == last:
            time.sleep(0.05)
            arrived[0] = time.monotonic()
        comm.barrier()
        left = time.monotonic()
        assert left >= comm.allreduce(arrived)[0] - 0.005  # one clock: the ranks of these tests share a machine
