"""The sum over the shards has the same bits whoever holds them."""

import numpy as np
import pytest

from distprop.comm import SoloCommunicator, run_threads
from distprop.data.loader import share
from distprop.fixed_tree import FixedTree, subtrees


def by_hand(messages: list[np.ndarray]) -> np.ndarray:
    """The tree as its definition says it: pairs, then pairs of pairs; a missing partner counts as nothing."""
    while len(messages) > 1:
        messages = [
            messages[i] + messages[i + 1] if i + 1 < len(messages) else messages[i] for i in range(0, len(messages), 2)
        ]
    return messages[0]


def messages_of(shards: int, length: int, dtype: str) -> list[np.ndarray]:
    rng = np.random.default_rng(shards)
    return [(rng.normal(size=length) * 10.0 ** rng.integers(-6, 6, length)).astype(dtype) for _ in range(shards)]


def total(comm, messages: list[np.ndarray]) -> list[np.ndarray]:
    length, dtype = len(messages[0]), messages[0].dtype
    tree = FixedTree(comm, len(messages), length, dtype)
    results = []
    for _ in range(2):  # the second time with arrays that are used again
        for shard in range(len(messages))[tree.mine]:
            tree.add(messages[shard])
        out = comm.allocate(length, dtype)
        tree.total(out)
        results.append(out)
    return results


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("shards", [1, 2, 3, 5, 7, 8, 12, 16])
@pytest.mark.parametrize("share_memory", [False, True])
def test_the_sum_has_the_bits_of_the_definition_on_any_number_of_ranks(
    shards: int, ranks: int, share_memory: bool
) -> None:
    messages = messages_of(shards, 37, "float32")
    expected = by_hand([message.copy() for message in messages])
    for results in run_threads(ranks, lambda comm: total(comm, messages), share_memory=share_memory):
        for result in results:
            assert result.tobytes() == expected.tobytes()


def test_the_order_matters_for_these_numbers() -> None:
    messages = messages_of(8, 1000, "float32")
    assert sum(messages[1:], messages[0]).tobytes() != by_hand(messages).tobytes()


@pytest.mark.parametrize("length", [1, 2, 3, 7, 70_000])
@pytest.mark.parametrize("share_memory", [False, True])
def test_messages_shorter_than_the_number_of_ranks_or_longer_than_a_piece(length: int, share_memory: bool) -> None:
    messages = messages_of(8, length, "float64")
    expected = by_hand([message.copy() for message in messages])
    for results in run_threads(5, lambda comm: total(comm, messages), share_memory=share_memory):
        assert results[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_shared_memory_may_have_room_for_some_arrays_only(missing: int) -> None:
    messages = messages_of(6, 50, "float32")
    expected = by_hand([message.copy() for message in messages])

    def cramped(comm):
        allocate, arrays = comm.node.allocate, []

        def allocate_if_there_is_room(*arguments):
            arrays.append(arguments)
            return allocate(*arguments) if len(arrays) > missing else None

        comm.node.allocate = allocate_if_there_is_room
        return total(comm, messages)

    for results in run_threads(2, cramped, share_memory=True):
        for result in results:
            assert result.tobytes() == expected.tobytes()


def test_added_messages_may_be_overwritten() -> None:
    tree = FixedTree(SoloCommunicator(), 3, 2, np.float32)
    message = np.array([1.0, 2.0], np.float32)
    for _ in range(3):
        tree.add(message)
    message[:] = 100
    out = np.empty(2, np.float32)
    tree.total(out)
    assert out.tolist() == [3.0, 6.0]


def test_a_shard_too_many_or_too_few_is_an_error() -> None:
    tree = FixedTree(SoloCommunicator(), 2, 1, np.float32)
    tree.add(np.zeros(1, np.float32))
    with pytest.raises(RuntimeError, match="has added 1 of its shards only"):
        tree.total(np.empty(1, np.float32))
    tree.add(np.zeros(1, np.float32))
    with pytest.raises(RuntimeError, match="holds shards 0 to 1 only"):
        tree.add(np.zeros(1, np.float32))


@pytest.mark.parametrize("run", [slice(0, 8), slice(3, 8), slice(1, 6), slice(5, 5), slice(6, 7)])
def test_subtrees_cover_the_run_and_are_whole(run: slice) -> None:
    found = list(subtrees(run))
    assert [shard for start, size in found for shard in range(start, start + size)] == list(range(run.start, run.stop))
    assert all(start % size == 0 and size & (size - 1) == 0 for start, size in found)


def test_memory_is_one_message_for_each_level_of_the_tree() -> None:
    tree = FixedTree(SoloCommunicator(), 16, 1, np.float32)
    for _ in range(16):
        tree.add(np.ones(1, np.float32))
        assert len(tree._memory) <= 5
    assert share(16, 0, 1) == tree.mine
