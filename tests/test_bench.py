"""The benchmarks run, and print what they promise. What they measure is for people to judge, on a quiet machine."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from distprop import functional
from distprop.bench import scaling
from distprop.bench.allreduce import bench_allreduce
from distprop.bench.ops import OperationTimes, cases, show, summary
from distprop.cli import main
from distprop.comm import ThreadCommunicator, run_threads
from distprop.data import ArrayDataset
from distprop.tensor import Tensor


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


def run_allreduce(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distprop", "bench", "allreduce", "-n", "2", "--repeats", "3", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_allreduce_prints_both_for_every_size() -> None:
    answer = run_allreduce("--sizes", "0.001,2.7")
    assert answer.returncode == 0, answer.stderr
    assert re.search(r"2 ranks, \w+Communicator beside the Allreduce of \w+.*sums checked", answer.stdout)
    for size in ("0.001", "2.700"):
        assert re.search(rf"^ +{size}( +\d+\.\d+){{5}} +3$", answer.stdout, re.MULTILINE), answer.stdout


def test_allreduce_prints_json() -> None:
    answer = run_allreduce("--sizes", "0.01", "--json")
    (row,) = json.loads(answer.stdout)
    assert row["bytes"] == 10_000
    assert row["seconds"] > 0
    assert row["library_seconds"] > 0


def test_allreduce_finds_a_wrong_sum() -> None:
    class Forgetful(ThreadCommunicator):
        def allreduce(self, array: Any) -> Any:
            super().allreduce(array)
            array[array.size // 2] -= 1
            return array

    def body(comm: ThreadCommunicator) -> Any:
        wrong = Forgetful(comm._meeting, comm.rank)
        return list(bench_allreduce(wrong, comm, [0.001], repeats=1))

    with pytest.raises(ArithmeticError, match="number 125 of 250"):
        run_threads(2, body)


@pytest.mark.parametrize("sizes", ["1,x", "0", "1,1e9"])
@pytest.mark.parametrize("ranks", [[], ["-n", "2"]])
def test_sizes_that_cannot_be_summed_are_refused_before_ranks_are_started(sizes: str, ranks: list[str]) -> None:
    answer = CliRunner().invoke(main, ["bench", "allreduce", *ranks, "--sizes", sizes])
    assert answer.exit_code == 2
    assert "Error: --sizes" in answer.output


def test_an_allreduce_without_peers_is_refused() -> None:
    assert CliRunner().invoke(main, ["bench", "allreduce"]).exit_code == 2


def test_scaling_prints_a_table_and_a_verdict_for_each_part() -> None:
    command = [sys.executable, "-m", "distprop", "bench", "scaling", "--quick"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert answer.returncode in (0, 1), answer.stderr  # 1: the machine is too busy or too slow for 10 µs a layer
    for part, verdict in {
        "model": r"time grows with parameters to the power",
        "batch": r"time grows with rows to the power",
        "depth": r"time grows with layers to the power .*; at most -?\d+\.\d µs of overhead a layer; wanted under 10",
        "ranks": r"the same parameters on every number of ranks.*: met",
        "dataset": r"private memory grew by -?\d+ MB while the file grew by 50 MB",
    }.items():
        assert re.search(rf"^{part}: {verdict}", answer.stdout, re.MULTILINE), answer.stdout


def test_scaling_takes_parts_and_refuses_others() -> None:
    answer = CliRunner().invoke(main, ["bench", "scaling", "--quick", "--json", "batch"])
    assert answer.exit_code == 0, answer.output
    assert set(json.loads(answer.output)) == {"batch"}
    answer = CliRunner().invoke(main, ["bench", "scaling", "width"])
    assert answer.exit_code == 2
    assert "no part width; there are model, batch, depth, ranks, dataset" in answer.output


def test_growth_that_is_not_linear_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scaling.slope([(x, 3 * x**1.5) for x in (1, 2, 4, 8)]) == pytest.approx(1.5)
    monkeypatch.setattr(scaling, "_step_seconds", lambda widths, rows, seconds_allowed: 1e-9 * rows**1.5)
    part = scaling.batch_size()
    assert not part.met
    assert "to the power 1.50" in scaling.show(part)
    assert scaling.show(part).endswith("MISSED")


def test_scaling_goes_as_far_as_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = []

    def depth_seconds(kinds: Any, count: int, steps: int) -> tuple[float, float]:
        layers.append(count)
        return 1e-6 * count, 0.0

    monkeypatch.setattr(scaling, "_step_seconds", lambda widths, rows, seconds_allowed: 1.0)
    monkeypatch.setattr(scaling, "_depth_seconds", depth_seconds)
    assert [row[0] for row in scaling.model_size().rows] == [
        "10,000",
        "99,856",
        "1,000,000",
        "9,998,244",
        "100,000,000",
    ]
    assert [int(row[0]) for row in scaling.batch_size().rows] == [16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    scaling.depth()
    assert layers == [100, 300, 1000] * 2


def test_a_result_that_depends_on_the_number_of_ranks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(size: int, batch: int, steps: int) -> dict[str, Any]:
        return {"seconds": 1e-3, "result": [1.0, 1.0 + 1e-9 * (size == 4)]}

    monkeypatch.setattr(scaling, "_run_ranks", run)
    part = scaling.ranks()
    assert not part.met
    assert [float(row[-1]) for row in part.rows] == [0, 0, pytest.approx(1e-9, rel=0.1), 0]


def test_memory_that_grows_with_the_dataset_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "_dataset_step", lambda path, size, steps: (1e-3, size / 10))
    assert not scaling.dataset_size(quick=True).met
    monkeypatch.setattr(scaling, "_dataset_step", lambda path, size, steps: (1e-3, 1e6))
    assert scaling.dataset_size(quick=True).met


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="private memory is read from Linux' /proc")
def test_what_a_dataset_keeps_of_each_row_is_private_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Keeping(ArrayDataset):
        def __init__(self, *arrays: Any) -> None:
            super().__init__(*arrays)
            self.kept = np.ones(len(arrays[0]))  # 8 bytes a row

    rows, found = 5_000_000, []  # arrays of more than 32 MiB go back to the kernel when they are freed
    for kind in (ArrayDataset, Keeping):
        monkeypatch.setattr(scaling, "ArrayDataset", kind)
        few, many = (scaling._dataset_step(tmp_path / "x", 4 * 784 * n, steps=1)[1] for n in (1000, rows))
        found.append((many - few) / rows)
    assert found == pytest.approx([8, 16], abs=1)  # bytes a row: the epoch's order, and what is kept


def test_ops_times_operations_beside_a_copy() -> None:
    answer = CliRunner().invoke(main, ["bench", "ops", "max_pool2d 3x3 stride 2", "lstm", "--repeats", "1"])
    assert answer.exit_code == 0, answer.output
    for name in ("max_pool2d 3x3 stride 2", "lstm"):
        assert re.search(rf"^{name} +\d+\.\d( +\d+\.\d{{3}}){{3}}", answer.output, re.MULTILINE)
    assert re.search(r"^2 operations", answer.output, re.MULTILINE)


def test_the_columns_of_an_operation_stay_apart_however_long_it_was_held_up() -> None:
    times = OperationTimes("f", 4.0, 30.0, 30.0, 30.0, 6e-3, 6e-3)
    assert show(times).split() == ["f", "4.0", *["30000.000"] * 3, *["6.000"] * 2, "5000.00", "over", "2"]


def test_ops_of_no_name_are_refused_with_those_that_there_are() -> None:
    answer = CliRunner().invoke(main, ["bench", "ops", "relu", "nosuch"])
    assert answer.exit_code == 2
    assert re.search("no operation has 'nosuch' in its name; there are relu, leaky_relu, .*layer_norm", answer.output)


def test_ops_times_pytorch_on_one_thread_beside_ours(torch: Any) -> None:
    torch.set_num_threads(2)
    answer = CliRunner().invoke(main, ["bench", "ops", "max_pool2d 3x3 stride 2", "x.log()", "--repeats", "1"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert threads == 1
    for name in ("max_pool2d 3x3 stride 2", "x.log()"):
        pattern = rf"^{re.escape(name)} +\d+\.\d((?: +\d+\.\d{{3}}){{5}}) +(\d+\.\d\d)"
        line = re.search(pattern, answer.output, re.MULTILINE)
        assert line, answer.output
        forward, backward, _, torch_forward, torch_backward = map(float, line[1].split())
        ratio = (forward + backward) / (torch_forward + torch_backward)
        assert float(line[2]) == pytest.approx(ratio, rel=0.01, abs=0.01)  # of times with three digits


# How the table writes a tensor's methods and operators, but for those that are views.
ARITHMETIC = {"add": "x + y", "sub": "x - y", "mul": "x * y", "truediv": "x / y", "matmul": "x @ y", "pow": "x ** 2"}
METHODS = {
    **{f"__{name}__": row for name, row in ARITHMETIC.items()},
    "to": "x.to(float64)",
    **{"__neg__": "minus x", "__abs__": "x.abs()", "__getitem__": "x[rows]"},
    **{name: f"x.{name}()" for name in ("exp", "log", "sqrt", "abs", "tanh", "sigmoid", "relu", "sum")},
    **{name: f"x.{name}(1)" for name in ("mean", "var", "max", "min")},
}
VIEWS = {"detach", "reshape", "flatten", "transpose", "permute"}


def test_the_table_of_operations_has_every_operation() -> None:
    names = [case.name for case in cases()]
    short = {"scaled_dot_product_attention": "attention"}
    first_words = {name.split()[0] for name in names}
    assert [name for name in functional.__all__ if short.get(name, name) not in first_words] == []
    assert [row for row in METHODS.values() if row not in names] == []
    assert len(set(names)) == len(names)


def test_every_method_that_makes_a_tensor_has_its_place_in_the_table() -> None:
    same = {f"__{form}{name}__" for name in ARITHMETIC for form in "ri"}  # 1 + x, x += 1
    made = {name for name, f in vars(Tensor).items() if getattr(f, "__annotations__", {}).get("return") == "Tensor"}
    assert {name for name in made if not re.match("_[a-z]", name)} - same == {*METHODS, *VIEWS}


def test_the_closing_line_names_what_comes_near_twice_the_time_and_what_takes_more() -> None:
    table = [OperationTimes(f"f{ours}", 4.0, ours, ours, 1.0, 1.0, 1.0) for ours in (0.5, 1.7, 2.5)]
    assert summary(table).splitlines()[1:] == [
        "more than 2 times: f2.5 (2.50)",
        "near it, more than 1.6 times: f1.7 (1.70)",
    ]
    without = OperationTimes("f", 4.0, 1.0, 1.0, 1.0, None, None)
    assert summary([without]) == "1 operations; PyTorch is not installed"


def test_health_times_training_with_looks_beside_training_without() -> None:
    answer = CliRunner().invoke(main, ["bench", "health", "--batch", "2", "--steps", "200"])
    assert answer.exit_code == 0, answer.output
    for network in ("mlp", "convolutional"):
        assert f"{network}, batch 2 a rank, 1 rank, a look every 50 steps" in answer.output
    assert len(re.findall(r"^looks add -?\d+\.\d\d% to training", answer.output, re.MULTILINE)) == 2
