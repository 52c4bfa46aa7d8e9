"""The cost of an Allreduce: the textbook's numbers, and a link that is found again from what it costs."""

import math

import pytest

from distprop.cost import Cluster, Link, allreduce_seconds, fit_link

LINK = Link(latency=10e-6, per_byte=1e-9)


def test_one_rank_has_nothing_to_send() -> None:
    assert allreduce_seconds(1, 1e9, LINK) == 0


@pytest.mark.parametrize("ranks", [2, 4, 64, 4096])
def test_a_few_bytes_take_one_message_a_doubling(ranks: int) -> None:
    assert allreduce_seconds(ranks, 0, LINK) == pytest.approx(math.log2(ranks) * LINK.latency)


@pytest.mark.parametrize("ranks", [2, 3, 64])
def test_many_bytes_cross_a_link_not_quite_twice(ranks: int) -> None:
    seconds = allreduce_seconds(ranks, 1e12, LINK)
    assert seconds == pytest.approx(2 * (ranks - 1) / ranks * 1e12 * LINK.per_byte, rel=1e-3)


def test_the_ring_is_for_large_messages_of_few_ranks_only() -> None:
    # 4,096 ranks: the ring would wait 8,190 times for the latency, Rabenseifner's algorithm 24 times.
    assert allreduce_seconds(4096, 1e6, LINK) == pytest.approx(24 * 10e-6 + 2 * 4095 / 4096 * 1e-3)


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 16])
@pytest.mark.parametrize("size", [1000, 1e5, 1e7])
def test_a_link_is_found_again_from_what_it_costs(ranks: int, size: float) -> None:
    found = fit_link(ranks, allreduce_seconds(ranks, 0, LINK), size, allreduce_seconds(ranks, size, LINK))
    assert found.latency == pytest.approx(LINK.latency)
    assert allreduce_seconds(ranks, size, found) == pytest.approx(allreduce_seconds(ranks, size, LINK))


def test_a_host_sends_its_sum_once() -> None:
    cluster = Cluster(4, within=Link(0, 1e-10), between=Link(0, 1e-9))
    assert cluster.hosts(4) == 1
    assert cluster.allreduce_seconds(4, 1000) == pytest.approx(1.5 * 1000e-10)
    assert cluster.hosts(8) == 2
    assert cluster.allreduce_seconds(8, 1000) == pytest.approx(1.5 * 1000e-10 + 1000e-9)
    assert cluster.hosts(5) == 2
