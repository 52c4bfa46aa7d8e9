"""The time line: clocks that differ are aligned, every span lies where it belongs, and the file is a Chrome trace."""

import json
import time
from pathlib import Path

import pytest

import distprop as dp
from distprop import functional as F
from distprop import nn, optim
from distprop.comm import Communicator, SoloCommunicator, run_threads
from distprop.tensor import record
from distprop.timeline import TRACE, Clocks, Timeline, compare_clocks
from test_fingerprint import dataset
from test_rundir import train

MODES = {
    "plain": {},
    "deterministic": {"deterministic": True, "shards": 4},
    "accumulate": {"accumulate": 2},
    "clipped": {"clip_norm": 1.0, "checkpoint_every": 2},
}


def events(run_dir: Path) -> list[dict]:
    return json.loads((run_dir / TRACE).read_text())["traceEvents"]


def spans(run_dir: Path, rank: int) -> list[dict]:
    return [event for event in events(run_dir) if event["ph"] == "X" and event["pid"] == rank]


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_file_is_a_chrome_trace(ranks: int, options: dict, tmp_path: Path) -> None:
    """The Trace Event Format: what each kind of event must have, and spans of one thread that nest perfectly."""
    run_threads(ranks, lambda comm: train(comm, tmp_path, steps=7, profile=True, **options))
    tree = json.loads((tmp_path / TRACE).read_text(), parse_constant=pytest.fail)
    assert tree["displayTimeUnit"] == "ms"
    for event in tree["traceEvents"]:
        assert event["ph"] in ("M", "X")
        assert isinstance(event["pid"], int)
        assert isinstance(event["name"], str)
        if event["ph"] == "M":
            wanted = {
                "process_name": {"name": str},
                "process_sort_index": {"sort_index": int},
                "thread_name": {"name": str},
            }
            assert {key: type(value) for key, value in event["args"].items()} == wanted[event["name"]]
        else:
            assert isinstance(event["tid"], int)
            assert event["ts"] >= 0
            assert event["dur"] >= 0
    about = [(event["pid"], event["name"]) for event in tree["traceEvents"] if event["ph"] == "M"]
    names = ("process_name", "process_sort_index", "thread_name")
    assert about == [(rank, name) for rank in range(ranks) for name in names]
    for rank in range(ranks):
        of_rank = spans(tmp_path, rank)
        in_ns = [(round(e["ts"] * 1000), round(e["ts"] * 1000) + round(e["dur"] * 1000)) for e in of_rank]
        assert in_ns == sorted(in_ns, key=lambda span: (span[0], -span[1]))
        open_until: list[int] = []
        for began, ended in in_ns:
            while open_until and open_until[-1] <= began:
                open_until.pop()
            assert not open_until or ended <= open_until[-1]
            open_until.append(ended)
        assert [e["name"] for e in of_rank if e["cat"] == "step"] == [f"step {number}" for number in range(1, 8)]
        categories = {e["cat"] for e in of_rank}
        assert categories >= {"data", "forward", "backward", "reduction", "update", "layer", "step"}
        assert sum(e["cat"] == "reduction" for e in of_rank) == 7


def parents(of_rank: list[dict]) -> list[tuple[str, str | None]]:
    """(category and name, category of the nearest phase around it) of every layer."""
    found, outer = [], []
    for event in of_rank:
        while outer and outer[-1]["ts"] + outer[-1]["dur"] <= event["ts"]:
            outer.pop()
        if event["cat"] == "layer":
            found.append((event["name"], next((o["cat"] for o in reversed(outer) if o["cat"] != "layer"), None)))
        outer.append(event)
    return found


def test_every_layer_has_its_forward_and_its_backward(tmp_path: Path) -> None:
    train(SoloCommunicator(), tmp_path, steps=1, profile=1)
    found = parents(spans(tmp_path, 0))
    assert [name for name, phase in found if phase == "forward"] == ["Sequential", "0 Linear", "1 Tanh", "2 Linear"]
    assert [name for name, phase in found if phase == "backward"] == ["loss", "2 Linear", "1 Tanh", "0 Linear"]


class Slow(nn.Module):
    """Takes so long forward and backward, by the clock of the test."""

    def __init__(self, forward: int, backward: int) -> None:
        self.nanoseconds = forward, backward
        self.now = 0

    def forward(self, x: dp.Tensor) -> dp.Tensor:
        self.now += self.nanoseconds[0]

        def vjp(grad, out):
            self.now += self.nanoseconds[1]
            return [grad]

        return record(x.data.copy(), (x,), vjp)


def test_a_layer_is_as_long_as_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [Slow(30_000, 50_000), Slow(20_000, 40_000)]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: sum(layer.now for layer in layers))
    model = nn.Sequential(nn.Linear(4, 5), layers[0], nn.Sequential(nn.Linear(5, 5), layers[1]))
    trainer = dp.Trainer(
        model, F.cross_entropy, optim.SGD(model.parameters(), lr=0.1), comm=SoloCommunicator(), batch_size=8,
        progress=False, run_dir=tmp_path, profile=2,
    )  # fmt: skip
    trainer.fit(dataset(), steps=2)
    slow = [event["dur"] for event in spans(tmp_path, 0) if event["name"] in ("1 Slow", "2.1 Slow")]
    assert slow == [30, 20, 40, 50] * 2


def test_a_profile_changes_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    def weights(**options) -> tuple[bytes, list[str]]:
        dp.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Linear(6, 3))
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        trainer = dp.Trainer(
            model, F.cross_entropy, optimizer, comm=SoloCommunicator(), batch_size=8, progress=False, **options
        )
        trainer.fit(dataset(), steps=5)
        assert not any("forward" in vars(module) for module in model.modules())
        return b"".join(p.data.tobytes() for p in model.parameters()), sorted(vars(model[0]))

    assert weights() == weights(run_dir=tmp_path / "a", profile=3) == weights(run_dir=tmp_path / "b", profile=True)
    assert len([e for e in spans(tmp_path / "a", 0) if e["cat"] == "step"]) == 3


def test_an_error_within_the_profile_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 3))  # the data have 4 columns
    trainer = dp.Trainer(
        model, F.cross_entropy, optim.SGD(model.parameters(), lr=0.1), comm=SoloCommunicator(), batch_size=8,
        progress=False, run_dir=tmp_path, profile=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="last axis"):
        trainer.fit(dataset(), steps=2)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not (tmp_path / TRACE).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": True}, "profile is a number of steps and needs a run_dir; got profile=True"),
        ({"profile": -1, "run_dir": "x"}, "profile must be 0 or more, got -1"),
    ],
)
def test_a_profile_needs_a_folder_and_a_number(options: dict, message: str) -> None:
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=message):
        dp.Trainer(model, F.cross_entropy, optim.SGD(model.parameters(), lr=0.1), batch_size=8, **options)


# --- clocks


class Clock:
    """A clock that is ahead, and runs faster by the factor `1 + drift`."""

    def __init__(self, ahead_ns: int, drift: float = 0.0) -> None:
        self.ahead_ns, self.drift, self.began = ahead_ns, drift, time.perf_counter_ns()
        self.read: list[int] = []  # when, by a clock that is right

    def at(self, true_ns: int) -> int:
        return round(true_ns + self.ahead_ns + self.drift * (true_ns - self.began))

    def __call__(self) -> int:
        self.read.append(time.perf_counter_ns())
        return self.at(self.read[-1])


@pytest.mark.parametrize("drift", [0.0, 1e-3])
def test_clocks_that_are_apart_are_aligned_within_the_bounds_that_are_claimed(drift: float) -> None:
    seconds = 10**9
    clocks = [Clock(rank * 5 * seconds, rank * drift) for rank in range(4)]

    def body(comm: Communicator) -> Clocks:
        first = compare_clocks(comm, clocks[comm.rank], identity=b"")
        time.sleep(0.05)
        return first.then(compare_clocks(comm, clocks[comm.rank], identity=b""))

    found = run_threads(4, body)
    assert found == [found[0]] * 4
    half = len(clocks[0].read) // 2
    parts = [[clock.read[:half] for clock in clocks], [clock.read[half:] for clock in clocks]]
    longest = max(max(map(max, part)) - min(map(min, part)) for part in parts)  # of the two comparisons
    first, last = found[0].readings  # rank 0's clock is right
    for rank, clock in enumerate(clocks):
        for true in (first, (first + last) // 2, last):
            error = abs(found[0].aligned(rank, [clock.at(true)])[0] - true)
            # the drift within a comparison itself is not seen, however long the machine takes for one
            assert error <= 1.01 * (found[0].uncertainty[rank] + drift * rank * longest) + 1000
    assert found[0].aligned(0, [7]) == [7]
    exchanges = half // 2  # the narrowest is no wider than their mean
    assert max(found[0].uncertainty) <= 1.01 * longest / exchanges


def test_ranks_with_the_same_clock_are_not_estimated() -> None:
    for clocks in run_threads(3, compare_clocks):
        assert list(clocks.uncertainty) == [0, 0, 0]
        assert list(clocks.ahead[0]) == [0, 0, 0]


def test_reductions_of_all_ranks_overlap(tmp_path: Path) -> None:
    """Nobody can leave one before the last has come: so it must look in the file."""
    run_threads(3, lambda comm: train(comm, tmp_path, steps=6, profile=True))
    by_rank = [[e for e in spans(tmp_path, rank) if e["cat"] == "reduction"] for rank in range(3)]
    for together in zip(*by_rank, strict=True):
        assert max(e["ts"] for e in together) <= min(e["ts"] + e["dur"] for e in together)


# --- the sums


def test_phases_add_up_and_begin_anew() -> None:
    timeline = Timeline()
    timeline.add("backward", 0, 5_000_000_000)
    timeline.add("reduction", 1_000_000_000, 4_000_000_000, inside="backward")
    seconds = timeline.take()
    assert (seconds["backward"], seconds["reduction"], seconds["update"]) == (2, 3, 0)
    assert set(timeline.take().values()) == {0}


def test_waiting_for_items_counts_as_data() -> None:
    def slow():
        for number in range(3):
            time.sleep(0.01)
            yield number

    timeline = Timeline()
    assert list(timeline.waiting(slow())) == [0, 1, 2]
    assert timeline.take()["data"] >= 0.03


def test_the_seconds_of_all_ranks_are_by_rank() -> None:
    def body(comm: Communicator) -> dict:
        timeline = Timeline()
        timeline.add("update", 0, comm.rank * 10**9)
        return timeline.take_all(comm)

    assert [found["update"] for found in run_threads(3, body)] == [[0.0, 1.0, 2.0]] * 3
