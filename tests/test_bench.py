"""The benchmarks run, and print what they promise. What they measure is for people to judge, on a quiet machine."""

import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

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
