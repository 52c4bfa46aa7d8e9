"""The benchmarks run, and print what they promise. What they measure is for people to judge, on a quiet machine."""

import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from distprop import functional
from distprop.bench.ops import OperationTimes, cases, summary
from distprop.cli import main


def test_step_prints_every_phase_beside_the_hand_written_loop() -> None:
    answer = CliRunner().invoke(main, ["bench", "step", "--sizes", "20,16,5", "--batch", "8", "--steps", "20"])
    assert answer.exit_code == 0, answer.output
    assert re.search(r"20-16-5, batch 8 a rank, 1 rank, float32\nBLAS: \w+.* kernels, \d+ thread", answer.output)
    for phase in ("forward", "backward", "reduce", "update", "total", "by hand"):
        assert re.search(rf"{phase} +\d+\.\d{{3}} ms", answer.output)
    assert re.search(r"\d\.\d\d times the hand-written NumPy loop; [\d,]+ samples/s", answer.output)


def test_determinism_prints_both_modes() -> None:
    arguments = ["--sizes", "20,16,5", "--batch-size", "32", "--shards", "4", "--steps", "10"]
    answer = CliRunner().invoke(main, ["bench", "determinism", *arguments])
    assert answer.exit_code == 0, answer.output
    assert re.search(r"default +\d+\.\d{3} ms\n +deterministic +\d+\.\d{3} ms", answer.output)
    assert re.search(r"cost [+-]\d+\.\d%", answer.output)


@pytest.mark.parametrize("sizes", ["20", "20,x", "", "20,0"])
def test_impossible_sizes_are_refused(sizes: str) -> None:
    answer = CliRunner().invoke(main, ["bench", "step", "--sizes", sizes])
    assert answer.exit_code == 2
    assert "two or more positive whole numbers" in answer.output


def test_ranks_are_started() -> None:
    command = [sys.executable, "-m", "distprop", "bench", "step", "--sizes", "20,16,5", "--steps", "10", "-n", "2"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "2 ranks, float32" in answer.stdout


def test_ops_times_operations_beside_a_copy() -> None:
    answer = CliRunner().invoke(main, ["bench", "ops", "max_pool2d 3x3 stride 2", "lstm", "--repeats", "1"])
    assert answer.exit_code == 0, answer.output
    for name in ("max_pool2d 3x3 stride 2", "lstm"):
        assert re.search(rf"^{name} +\d+\.\d( +\d+\.\d{{3}}){{3}}", answer.output, re.MULTILINE)
    assert re.search(r"^2 operations", answer.output, re.MULTILINE)


def test_the_table_of_operations_has_every_operation() -> None:
    names = [case.name for case in cases()]
    short = {"scaled_dot_product_attention": "attention"}
    assert [name for name in functional.__all__ if not any(short.get(name, name) in row for row in names)] == []
    assert len(set(names)) == len(names)


def test_the_closing_line_names_what_comes_near_twice_the_time_and_what_takes_more() -> None:
    table = [OperationTimes(f"f{ours}", 4.0, ours, ours, 1.0, 1.0, 1.0) for ours in (0.5, 1.7, 2.5)]
    assert summary(table).splitlines()[1:] == [
        "more than 2 times: f2.5 (2.50)",
        "near it, more than 1.6 times: f1.7 (1.70)",
    ]
    without = OperationTimes("f", 4.0, 1.0, 1.0, 1.0, None, None)
    assert summary([without]) == "1 operations; PyTorch is not installed"
