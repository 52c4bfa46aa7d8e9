"""What every communicator does, whatever carries the numbers."""

import itertools

import numpy as np
import pytest

from distprop.comm import Communicator, ThreadCommunicator, recorder
from scenario import Suite

suite = Suite()


@suite.scenario()
def what_is_no_number_is_not_summed(comm: Communicator) -> None:
    for array in (np.array([True]), np.array(["a"])):
        with pytest.raises(TypeError, match=r"allreduce sums numbers, got (bool|<U1)"):
            comm.allreduce(array)


@suite.scenario()
def what_is_refused_on_one_rank_does_not_count_as_its_collective(comm: Communicator) -> None:
    """The others may not be refused, and ranks compare the numbers of their collectives."""
    before, column, pieces = recorder.here.sequence, np.zeros((2, 2))[:, 0], [slice(0, 0)] * comm.size
    if comm.rank == comm.size - 1 and comm.size > 1:
        for call, error in (
            (lambda: comm.allreduce(column), ValueError),
            (lambda: comm.allreduce(np.array(["a"])), TypeError),
            (lambda: comm.broadcast(column), ValueError),
            (lambda: comm.broadcast(np.zeros(2), root=comm.size), ValueError),
        ):
            with pytest.raises(error):
                call()
        if not isinstance(comm, ThreadCommunicator):
            with pytest.raises(ValueError, match="C-contiguous"):
                comm.alltoall(np.zeros(2), pieces, column, pieces)
    assert recorder.here.sequence == before
    comm.barrier()


@suite.scenario()
def rank_and_size_number_the_ranks(comm: Communicator) -> None:
    assert [int(message) for message in comm.allgather(str(comm.rank).encode())] == list(range(comm.size))


@suite.scenario()
def allreduce_sums_in_place_and_returns_its_argument(comm: Communicator) -> None:
    for dtype in (np.float32, np.float64, np.int32, np.int64):
        for shape in ((), (1,), (7,), (2, 3), (0,)):
            array = np.full(shape, comm.rank + 1, dtype)
            array.flat[:1] = 10 * comm.rank
            assert comm.allreduce(array) is array
            assert array.dtype == dtype
            expected = np.full(shape, sum(rank + 1 for rank in range(comm.size)), dtype)
            expected.flat[:1] = sum(10 * rank for rank in range(comm.size))
            np.testing.assert_array_equal(array, expected)


@suite.scenario()
def allreduce_of_a_slice_leaves_its_neighbours_alone(comm: Communicator) -> None:
    array = np.full(10, comm.rank + 1.0)
    comm.allreduce(array[3:6])
    total = comm.size * (comm.size + 1) / 2
    np.testing.assert_array_equal(array, [comm.rank + 1.0] * 3 + [total] * 3 + [comm.rank + 1.0] * 4)


@suite.scenario()
def allocated_messages_are_zeros_and_sum_like_any_other(comm: Communicator) -> None:
    for dtype in (np.float32, np.float64):
        for length in (0, 1, 5, 17, 1000, 200_001):  # empty, shorter than the number of ranks, longer than a piece
            message = comm.allocate(length, dtype)
            assert (message.shape, message.dtype, message.any()) == ((length,), dtype, False)
            for turn in range(3):
                message[:] = np.arange(length) % 1000 + turn * comm.rank
                assert comm.allreduce(message) is message
                total = comm.size * (np.arange(length) % 1000) + turn * sum(range(comm.size))
                np.testing.assert_array_equal(message, total.astype(dtype))


@suite.scenario()
def a_part_of_an_allocated_message_can_be_summed(comm: Communicator) -> None:
    message = comm.allocate(10, np.float64)
    message[:] = comm.rank + 1
    comm.allreduce(message[3:6])
    total = comm.size * (comm.size + 1) / 2
    np.testing.assert_array_equal(message, [comm.rank + 1.0] * 3 + [total] * 3 + [comm.rank + 1.0] * 4)


@suite.scenario()
def ranks_of_a_node_see_each_others_messages(comm: Communicator) -> None:
    if comm.node is None:
        return
    node, message = comm.node, comm.allocate(100, np.float32)
    every, common = node.arrays(message), node.allocate_common(5, np.int64)
    if every is not None and common is not None:
        every[(node.rank + 1) % node.size][:] = node.rank
        common[node.rank % 5] = node.rank
        node.barrier()
        assert (message == (node.rank - 1) % node.size).all()
        assert common[(node.size - 1) % 5] == node.size - 1
    assert node.arrays(np.zeros(100, np.float32)) is None


@suite.scenario()
def allreduce_gives_every_rank_the_same_bits(comm: Communicator) -> None:
    for length in (1, 1000, 300_000):  # MPI libraries change their algorithm with the length
        for array in (np.empty(length, np.float32), comm.allocate(length, np.float32)):
            array[:] = np.random.default_rng(comm.rank).standard_normal(length)
            comm.allreduce(array)
            messages = comm.allgather(array.tobytes())
            assert messages.count(messages[0]) == comm.size
            brought = [np.random.default_rng(rank).standard_normal(length) for rank in range(comm.size)]
            np.testing.assert_allclose(array, np.sum(brought, axis=0), rtol=1e-5, atol=1e-5)


@suite.scenario()
def allreduce_passes_on_what_is_not_finite(comm: Communicator) -> None:
    array = np.array([np.nan if comm.rank == comm.size - 1 else 1.0, np.inf if comm.rank == 0 else 1.0, 1.0])
    comm.allreduce(array)
    np.testing.assert_array_equal(array, [np.nan, np.inf, comm.size])


@suite.scenario()
def sums_on_one_node_find_what_is_not_finite(comm: Communicator) -> None:
    node, message, checked = comm.node, comm.allocate(200_001, np.float32), 200_000
    if node is None or not node.check_sums(message, checked):
        assert node is None or node.size < comm.size or node.arrays(message) is None
        return
    for place in (None, 0, 70_000, checked - 1, checked):
        message[:] = 1e30  # whose squares are infinite
        if place is not None and comm.rank == comm.size - 1:
            message[:place] = np.inf
            message[place] = np.nan
        assert comm.allreduce(message) is message
        last = None if place is None else min(place, checked - 1)
        assert node.not_finite(message) == [None] * (comm.size - 1) + [last]


@suite.scenario()
def broadcast_overwrites_with_the_roots_array(comm: Communicator) -> None:
    for root in range(comm.size):
        for array in (np.full((2, 3), comm.rank + 0.5), np.array(comm.rank), np.full(4, comm.rank == root)):
            expected = np.full_like(array, {"f": root + 0.5, "i": root, "b": True}[array.dtype.kind])
            assert comm.broadcast(array, root) is array
            np.testing.assert_array_equal(array, expected)


@suite.scenario()
def broadcast_comes_from_rank_0_unless_told_otherwise(comm: Communicator) -> None:
    assert comm.broadcast(np.array([comm.rank + 7]))[0] == 7


@suite.scenario()
def a_root_outside_the_world_is_an_error(comm: Communicator) -> None:
    for root in (comm.size, -1):
        with pytest.raises(ValueError, match=f"root {root} is not a rank of a world of {comm.size}"):
            comm.broadcast(np.zeros(2), root)
    comm.barrier()


@suite.scenario()
def allgather_takes_messages_of_any_length(comm: Communicator) -> None:
    expected = [b"x" * (1000 * rank) + bytes([rank]) * (rank > 0) for rank in range(comm.size)]  # rank 0's is empty
    assert comm.allgather(expected[comm.rank]) == expected
    assert comm.allgather(b"") == [b""] * comm.size
    assert all(type(message) is bytes for message in comm.allgather(b"abc"))


def cut(lengths: list[int]) -> list[slice]:
    """Slices one after the other."""
    ends = np.cumsum([0, *lengths]).tolist()
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


@suite.scenario()
def alltoall_delivers_slices_of_any_length(comm: Communicator) -> None:
    """Rank s sends r numbers, each 100 s + r, to rank r; so rank 0 receives nothing."""
    for dtype in (np.float32, np.float64, np.int64):
        send = np.concatenate([np.full(rank, 100 * comm.rank + rank, dtype) for rank in range(comm.size)])
        receive = np.full(comm.size * comm.rank, -1, dtype)
        comm.alltoall(send, cut(list(range(comm.size))), receive, cut([comm.rank] * comm.size))
        np.testing.assert_array_equal(receive, np.repeat(100 * np.arange(comm.size) + comm.rank, comm.rank))


@suite.scenario()
def alltoall_leaves_the_rest_of_the_array_alone(comm: Communicator) -> None:
    """The places need not follow one another, and may lie in the array that is sent from."""
    array = np.arange(5.0 * comm.size) + 1000 * comm.rank
    expected = array.copy()
    starts = range(0, 5 * comm.size, 5)
    comm.alltoall(array, [slice(s, s + 2) for s in starts], array, [slice(s + 3, s + 5) for s in starts])
    for rank, start in enumerate(starts):
        expected[start + 3 : start + 5] = 1000 * rank + 5 * comm.rank + np.arange(2)
    np.testing.assert_array_equal(array, expected)


@suite.scenario()
def no_rank_passes_a_barrier_before_all_have_arrived(comm: Communicator) -> None:
    for _ in range(3):
        comm.barrier()


@suite.scenario()
def many_collectives_in_a_row_do_not_mix(comm: Communicator) -> None:
    for number in range(50):
        assert comm.allreduce(np.array([number]))[0] == number * comm.size
        assert comm.broadcast(np.array([number + comm.rank]), number % comm.size)[0] == number + number % comm.size
        assert comm.allgather(bytes([number, comm.rank])) == [bytes([number, rank]) for rank in range(comm.size)]


@suite.scenario()
def what_is_not_one_writeable_block_of_memory_is_refused(comm: Communicator) -> None:
    read_only = np.zeros(3)
    read_only.flags.writeable = False
    for collective in (comm.allreduce, comm.broadcast):
        for array in (np.zeros((4, 4))[:, 1], np.zeros((4, 4)).T[1:], read_only, [1.0, 2.0], 3.0):
            with pytest.raises(ValueError, match="C-contiguous"):
                collective(array)
    comm.barrier()
