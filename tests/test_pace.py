"""A slow rank is told from noise and from a rank with more to do."""

import pytest

from distprop import pace
from distprop.pace import Pace


def test_a_rank_that_is_slow_twice_in_a_row_is_reported_once() -> None:
    judge = Pace()
    times = [0.005, 0.0052, 0.05, 0.0049]
    assert judge.compare(times) == []
    (line,) = judge.compare(times)
    assert line.startswith("rank 2 is slow: 50.0 ms a step of its own, 5.0 ms on the others")
    assert judge.compare(times) == judge.compare(times) == []


@pytest.mark.parametrize(
    "times",
    [
        [0.02, 0.005, 0.005],  # 4 times
        [0.0015, 0.0001, 0.0001],  # 15 times, but 1.4 ms
        [0.005, 0.0, 0.5],  # a rank has not measured long enough
        [0.5],
    ],
)
def test_other_differences_are_not_reported(times: list[float]) -> None:
    judge = Pace()
    assert judge.compare(times) == judge.compare(times) == []


def test_slow_once_is_an_accident() -> None:
    judge = Pace()
    for times in ([0.5, 0.005], [0.005, 0.005], [0.5, 0.005]):
        assert judge.compare(times) == []


def test_time_in_collectives_is_not_a_ranks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(pace.here, "waited", 7.0)
    judge = Pace()
    now[0] += 0.5
    assert judge.own_seconds(10) == 0.0  # too short
    now[0] += 1.5
    pace.here.waited += 0.4
    assert judge.own_seconds(10) == pytest.approx(0.16)
