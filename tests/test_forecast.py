"""The arithmetic of a prediction, by hand; and that it says plainly when more ranks would be slower."""

import pytest

from distprop.cost import Cluster, Link, allreduce_seconds
from distprop.forecast import RANKS, Steps, parse_link, parse_seconds, predict, verdicts

STEPS = Steps(rows=(1, 100, 200), seconds=(2e-3, 4e-3, 6e-3), message_bytes=1_000_000)
SLOW, FAST = Link(1e-3, 1e-7), Link(1e-6, 1e-12)


def alone(link: Link) -> Cluster:
    return Cluster(1, link, link)


def test_computation_is_interpolated_between_what_was_measured_and_goes_on_beyond() -> None:
    assert STEPS.compute_seconds(100) == 4e-3
    assert STEPS.compute_seconds(150) == pytest.approx(5e-3)
    assert STEPS.compute_seconds(400) == pytest.approx(10e-3)
    for rows in (50, 150, 400):
        assert STEPS.rows_that_take(STEPS.compute_seconds(rows)) == pytest.approx(rows)


def test_weak_scaling_keeps_the_rows_of_a_rank() -> None:
    two = predict(STEPS, alone(SLOW), 100)[1]
    assert (two.ranks, two.hosts, two.rows) == (2, 2, 100)
    assert two.allreduce_seconds == pytest.approx(1e-3 + 0.1)
    assert two.step_seconds == pytest.approx(4e-3 + 0.101)
    assert two.rate == pytest.approx(200 / 0.105)
    assert two.efficiency == pytest.approx(4e-3 / 0.105)


def test_strong_scaling_shares_the_batch_and_the_rank_with_most_rows_counts() -> None:
    eight = predict(STEPS, alone(FAST), 100, "strong")[3]
    assert eight.rows == 13
    assert eight.rate == pytest.approx(100 / eight.step_seconds)
    many = predict(STEPS, alone(FAST), 100, "strong")[-1]
    assert many.rows == 1


def test_the_batch_at_which_communication_stops_mattering() -> None:
    for forecast in predict(STEPS, alone(SLOW), 100)[1:]:
        compute = STEPS.compute_seconds(forecast.enough_rows)
        assert forecast.allreduce_seconds / (compute + forecast.allreduce_seconds) == pytest.approx(0.1)


def test_from_1_to_4096_ranks() -> None:
    assert [forecast.ranks for forecast in predict(STEPS, alone(FAST), 100)] == list(RANKS)
    assert (RANKS[0], RANKS[-1]) == (1, 4096)


def test_it_says_when_a_few_ranks_are_slower_than_one() -> None:
    forecasts = predict(STEPS, alone(SLOW), 100)
    slower = [forecast.ranks for forecast in forecasts if forecast.speedup < 1]
    assert slower == [2, 4, 8, 16, 32]
    assert verdicts(forecasts)[0].startswith("2 to 32 ranks would be slower than 1: ")


def test_it_says_from_where_on_more_ranks_are_slower() -> None:
    forecasts = predict(STEPS, Cluster(4, FAST, SLOW), 200, "strong")
    assert max(forecasts, key=lambda forecast: forecast.rate).ranks == 4
    assert verdicts(forecasts)[0].startswith("More than 4 ranks would be slower than 4: ")


def test_it_says_so_when_more_ranks_are_always_faster() -> None:
    assert verdicts(predict(STEPS, alone(FAST), 100)) == ["More ranks are faster, up to 4,096"]


def test_links_are_written_as_rate_and_latency() -> None:
    link = parse_link("25gbit,10us")
    assert link.latency == 10e-6
    assert allreduce_seconds(2, 1e9, link) == pytest.approx(8 / 25 * 1538 / 1448, rel=1e-3)
    assert parse_link("100Mbit/s, 0.2ms").gigabits == pytest.approx(0.0941, rel=1e-2)
    assert parse_seconds("250ns") == pytest.approx(250e-9)


@pytest.mark.parametrize("text", ["25gbit", "25,10us", "gbit,10us", "0gbit,1us", "25gbit,10", "25gb,10us", ""])
def test_a_link_that_cannot_be_read_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="as in 25gbit,10us"):
        parse_link(text)
