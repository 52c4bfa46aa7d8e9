"""What `distprop trace` says, against a time line whose sums and critical path are known."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from distprop.cli import main
from distprop.timeline import TRACE, chrome_trace
from distprop.trace import read_trace, show, summarise

# (category, name or None for the category's, begin, end) in µs; in the first step rank 1 comes last to the reduction,
# in the second rank 0 does
RANK_0 = [
    *[
        ("step", "step 1", 0, 100),
        ("forward", None, 0, 30),
        ("layer", "Sequential", 0, 28),
        ("layer", "0 Linear", 5, 20),
    ],
    *[
        ("backward", None, 30, 90),
        ("layer", "0 Linear", 40, 50),
        ("reduction", None, 60, 90),
        ("update", None, 90, 100),
    ],
    *[("step", "step 2", 100, 200), ("forward", None, 100, 150), ("backward", None, 150, 190)],
    *[("reduction", None, 180, 190), ("update", None, 190, 200)],
]
RANK_1 = [
    *[("data", None, 0, 10), ("step", "step 1", 10, 100), ("forward", None, 10, 50), ("backward", None, 50, 90)],
    *[("reduction", None, 80, 90), ("update", None, 90, 95)],
    *[("step", "step 2", 100, 200), ("forward", None, 100, 120), ("backward", None, 120, 190)],
    *[("reduction", None, 130, 190), ("update", None, 190, 200)],
]


def write_trace(folder: Path, *ranks: list, **changes) -> None:
    spans = [[(name or category, category, 1000 * a, 1000 * b) for category, name, a, b in rank] for rank in ranks]
    tree = chrome_trace([f"host{rank}" for rank in range(len(ranks))], spans)
    tree["otherData"] |= {"clock_uncertainty_us": [0.0, 2.5][: len(ranks)], **changes}
    (folder / TRACE).write_text(json.dumps(tree))


def test_where_the_time_went_is_told_for_each_rank(tmp_path: Path) -> None:
    write_trace(tmp_path, RANK_0, RANK_1)
    summary = summarise(read_trace(tmp_path))
    assert (summary.steps, round(summary.total * 1e6)) == (2, 200)
    phases = {name: [round(value * 1e6, 3) for value in values] for name, values in summary.phases.items()}
    assert phases == {
        **{"data": [0, 10], "forward": [80, 60], "backward": [60, 40], "reduction": [40, 70], "update": [20, 15]},
        **{"evaluation": [0, 0], "checkpoint": [0, 0], "other": [0, 5]},
    }
    assert [round(value * 1e6, 3) for value in summary.waiting] == [20, 50]
    layers = {name: [round(value * 1e6, 3) for value in times] for name, times in summary.layers.items()}
    assert layers == {"Sequential": [6.5, 0], "0 Linear": [7.5, 5]}  # the mean of both ranks, without what is inside


def test_layers_one_after_the_other_are_not_one_in_the_other(tmp_path: Path) -> None:
    layers = [("layer", "a", 0.1, 0.3), ("layer", "b", 0.3, 0.4)]  # as a sum of floats 0.1 + 0.2 is more than 0.3
    write_trace(tmp_path, [("step", "step 1", 0, 1), ("backward", None, 0, 1), *layers])
    found = summarise(read_trace(tmp_path)).layers
    assert {name: [round(value * 1e9) for value in times] for name, times in found.items()} == {
        "a": [0, 200],
        "b": [0, 100],
    }


def test_the_critical_path_follows_the_rank_that_comes_last(tmp_path: Path) -> None:
    write_trace(tmp_path, RANK_0, RANK_1)
    summary = summarise(read_trace(tmp_path))
    path = {place: round(seconds * 1e6, 3) for place, seconds in summary.path.items() if seconds}
    assert path == {
        **{(1, "data"): 10, (1, "forward"): 40, (1, "backward"): 30, (None, "reduction"): 20},
        **{(0, "update"): 20, (0, "forward"): 50, (0, "backward"): 30},
    }
    assert sum(path.values()) == 200  # all of the time, once
    assert summary.arrived_last == [1, 1]


def test_the_summary_is_printed(tmp_path: Path) -> None:
    write_trace(tmp_path, RANK_0, RANK_1)
    answer = CliRunner().invoke(main, ["trace", str(tmp_path)])
    assert (answer.exit_code, answer.stdout) == (0, show(read_trace(tmp_path)) + "\n")
    for part in (
        *("2 steps on 2 ranks", "clocks aligned to ±2 µs", "rank 0    rank 1", "of it waiting", "0 Linear"),
        *("critical path", "forward 0.000 s (45%)", "arrived last at a reduction", "rank 0 1, rank 1 1"),
    ):
        assert part in answer.stdout, part


def test_a_profile_of_nothing_is_no_error(tmp_path: Path) -> None:
    write_trace(tmp_path, [])
    assert "no critical path" in show(read_trace(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no trace.json. Train with distprop train --profile, or Trainer(profile=True, run_dir=...)"),
        ('{"otherData": {"format": 2}}', "has format 2; this version of distprop reads format 1: upgrade it"),
        ('{"traceEv', "is not what a profile writes"),
        ("[]", "is not what a profile writes"),
        ('{"otherData": {"format": 1, "hosts": ["a"]}, "traceEvents": [{"ph": "X"}]}', "is not what a profile writes"),
    ],
)
def test_what_cannot_be_read_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / TRACE).write_text(content)
    answer = CliRunner().invoke(main, ["trace", str(tmp_path)])
    assert answer.exit_code == 2
    assert message in answer.stderr
    assert answer.stderr.count("\n") == 1
    answer = CliRunner().invoke(main, ["trace", str(tmp_path / "nowhere")])
    assert (answer.exit_code, answer.stderr) == (2, f"Error: there is no folder {tmp_path / 'nowhere'}\n")


def test_train_with_a_profile_on_two_ranks(tmp_path: Path) -> None:
    """From the command to the summary: a process for each rank, with everything in it that a step consists of."""
    (tmp_path / "small.toml").write_text("[model]\nhidden = [16]\n[train]\nepochs = 1\nbatch_size = 256\n")
    command = [sys.executable, "-m", "distprop", "train", "-n", "2", "--profile", "small.toml"]
    answer = subprocess.run(
        command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.returncode == 0, answer.stderr
    run_dir = tmp_path / "runs" / "small"
    events = json.loads((run_dir / TRACE).read_text())["traceEvents"]
    for rank in range(2):
        of_rank = [event for event in events if event["ph"] == "X" and event["pid"] == rank]
        assert {e["cat"] for e in of_rank} >= {"data", "forward", "backward", "reduction", "update", "layer", "step"}
        layers = {event["name"] for event in of_rank if event["cat"] == "layer"}
        assert layers >= {"0 Flatten", "1 Linear", "2 ReLU", "3 Linear", "loss"}
    said = CliRunner().invoke(main, ["trace", str(run_dir)]).stdout
    assert "6 steps on 2 ranks" in said
    assert "critical path" in said
