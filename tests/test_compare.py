"""benchmarks/compare.py compares what is the same: both libraries train alike, and its table says what was measured."""

import itertools
import json
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compare
import measure
import networks
import passes
import programs
import table

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def clean_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing the example changes sys.path."""
    monkeypatch.setattr(sys, "path", sys.path.copy())


def first_losses(training: Any, name: str) -> list[float]:
    stream = networks.batches(name, rank=0)
    return [training.step(*training.convert(*next(stream))) for _ in range(3)]


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_both_libraries_train_the_same_network_from_the_same_start(name: str, torch: Any) -> None:
    from train_distprop import DistpropTraining
    from train_torch import TorchTraining

    ours, theirs = DistpropTraining(name), TorchTraining(name)
    assert sum(p.data.size for p in ours.model.parameters()) == sum(p.numel() for p in theirs.model.parameters())
    losses = first_losses(ours, name)
    assert len(set(losses)) == 3
    assert losses == pytest.approx(first_losses(theirs, name), rel=table.SAME_LOSS)
    options = {"channels_last": networks.NETWORKS[name].images, "fused": True}
    assert losses == pytest.approx(first_losses(TorchTraining(name, **options), name), rel=table.SAME_LOSS)


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_the_floor_is_all_matrix_products_of_a_step(name: str, torch: Any) -> None:
    """Those that PyTorch makes, attention without a kernel of its own: copies and the three lengths of each."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils._python_dispatch import TorchDispatchMode

    from train_torch import TorchTraining

    made: Counter[tuple[int, ...]] = Counter()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            result = operation(*arguments, **(options or {}))
            kind = operation.overloadpacket.__name__
            if kind in ("mm", "addmm", "bmm"):
                x, w = arguments[-2:]
                made[x.shape[0] if kind == "bmm" else 1, *sorted((*x.shape[-2:], w.shape[-1]))] += 1
            elif kind in ("convolution", "convolution_backward"):
                y, w = (result, arguments[1]) if kind == "convolution" else (arguments[0], arguments[2])
                count = 1 if kind == "convolution" else sum(arguments[-1][:2])  # of dx and dw those that are wanted
                made[1, *sorted((y[:, 0].numel(), w[0].numel(), len(w)))] += count
            return result

    training = TorchTraining(name)
    with sdpa_kernel(SDPBackend.MATH), Products():
        training.step(*training.convert(*next(networks.batches(name, rank=0))))
    listed: Counter[tuple[int, ...]] = Counter()
    for product in networks.NETWORKS[name].products:
        listed[product.copies, *sorted((product.rows, product.inputs, product.outputs))] += 2 + product.dx
    assert listed == made


def test_it_measures_on_one_and_two_ranks(torch: Any) -> None:
    command = [sys.executable, str(BENCHMARKS / "compare.py"), "--quick", "--networks", "mlp512", "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert answer.returncode == 0, answer.stderr
    results = json.loads(answer.stdout)
    figures = results["networks"]["mlp512"]
    for run in ("torch1", "distprop1", "torch2", "distprop2"):
        assert min(figures[run]["steps_in_turns"]) > 0
        assert figures[run]["first_step_seconds"] > min(figures[run]["steps_in_turns"])  # one may have been held up
        assert figures[run]["peak_bytes"] > 10e6
    shown = table.show(results)
    assert "MLP 784-512-512-10" in shown
    assert "1 thread" in shown
    assert "throughput of 2 ranks over PyTorch DDP" in shown


def test_a_profile_names_the_layers_and_what_was_wrong_with_the_command() -> None:
    command = [sys.executable, str(BENCHMARKS / "step_profile.py")]
    answer = subprocess.run(
        [*command, "mlp512", "3"], env=os.environ | {"OPENBLAS_NUM_THREADS": "2"}, capture_output=True, text=True,
        timeout=60, check=True,
    )  # fmt: skip
    assert re.match(r"openblas .*, 1 thread\n3 steps on 1 rank", answer.stdout)
    assert "0 Linear" in answer.stdout
    functions = [line.split() for line in answer.stdout.partition("\nfunction ")[2].splitlines()[1:]]
    assert {name for name, *_ in functions} >= {"linear", "relu", "cross_entropy"}
    assert all(float(forward) > 0 and float(backward) > 0 for _, forward, backward in functions)
    for wrong in ([], ["mlp"], ["mlp512", "many"]):
        answer = subprocess.run([*command, *wrong], capture_output=True, text=True, timeout=60, check=False)
        assert (answer.returncode, answer.stderr[:38]) == (1, "usage: step_profile.py NETWORK [STEPS]")


def test_passes_of_numpy_are_timed(capsys) -> None:
    passes.main(turns=9)
    lines = capsys.readouterr().out.splitlines()
    times = {line[:68].rstrip(): float(line[68:].removesuffix("ms")) for line in lines}
    assert len(times) == len(lines)
    assert times["exp"] > 0
    one, many = (times[f"products of 100 x 48 with {columns} columns, multiplications"] for columns in (8, 64))
    assert one > many


def figures(seconds: float, **more: Any) -> dict[str, Any]:
    turns = {"steps_in_turns": [seconds, 3 * seconds, seconds], "products_in_turns": [1e-3, 3e-3, 1e-3]}
    run = {**turns, "losses": [2.0, 1.0], "peak_bytes": 100e6, "first_step_seconds": 1.0}
    return {**run, "blas": "BLAS", "torch": "2", "variant": {"fused": True}, **more}


@pytest.fixture
def results() -> dict[str, Any]:
    runs = {
        "torch1": figures(4e-3),
        "distprop1": figures(2e-3),
        "torch2": figures(8e-3, peak_bytes=400e6, first_step_seconds=4.0),
        "distprop2": figures(4e-3),
    }
    reduction = {"bytes": 23_000_000, "seconds": 1e-3, "library_seconds": 4e-3, "repeats": 3}
    mnist = {"torch": {"seconds": 10.0, "reached": True}, "distprop": {"seconds": 5.0, "reached": True}}
    return {"networks": {"mlp512": runs}, "allreduce": [reduction], "mnist": mnist, "conditions": {"command": "a"}}


def test_targets_say_what_was_wanted_what_was_measured_and_whether_it_is_met(results: dict[str, Any]) -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.show(results).splitlines()]
    answers = {row[0]: row[2:5] for row in rows if len(row) == 6}
    alone = {row[0]: row[5] for row in rows if len(row) == 6}
    assert answers["throughput of 2 ranks over PyTorch DDP"] == [">= 3.5", "2.00", "missed"]
    assert answers["throughput of 1 process over PyTorch"] == [">= 2.0", "2.00", "met"]
    assert answers["samples/s of 2 ranks over 1"] == [">= 1.9", "1.00", "missed"]
    assert answers["step over products alone"] == ["<= 1.25", "2.00", "missed"]
    assert answers["reduction, library's time over ours"] == [">= 3.0", "4.00", "met"]
    assert answers["peak memory of a rank over PyTorch's"] == ["<= 0.5", "0.25", "met"]
    assert answers["command to first step over torchrun's"] == ["<= 0.4", "0.25", "met"]
    assert answers["time to 98 % on MNIST over DDP's"] == ["<= 0.4", "0.50", "missed"]
    assert alone["throughput of 1 process over PyTorch"] == "4.00"  # of 2 ms a step 1 is products
    assert alone["throughput of 2 ranks over PyTorch DDP"] == "8.00"
    assert alone["samples/s of 2 ranks over 1"] == "2.00"
    assert alone["step over products alone"] == ""


def test_a_network_that_trained_otherwise_is_named(results: dict[str, Any]) -> None:
    assert table.disagreements(results) == []
    results["networks"]["mlp512"]["distprop2"]["losses"] = [2.0, 1.001]
    (line,) = table.disagreements(results)
    assert line.startswith("MLP 784-512-512-10 on 2 ranks: losses of the first steps differ by 1.0e-03")
    assert "DIFFERENT" in table.show(results)


@pytest.mark.parametrize("losses", [[2.0, float("nan")], [float("nan"), 1.0]])
def test_a_loss_that_is_not_a_number_is_no_agreement(losses: list[float], results: dict[str, Any]) -> None:
    results["networks"]["mlp512"]["distprop1"]["losses"] = losses
    assert len(table.disagreements(results)) == 1
    assert "DIFFERENT" in table.show(results)


def test_an_accuracy_that_was_not_reached_meets_no_target(results: dict[str, Any]) -> None:
    results["mnist"]["distprop"] |= {"seconds": 1.0, "reached": False}
    assert "inf | missed" in table.show(results)


FAKE = """
import json, os, socket, sys
fate = sys.argv[1]
if fate == "dies at the start":
    sys.exit("ValueError: no such network")
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(os.environ["COMPARE_TURNS"])
    channel = connection.makefile("rw")
    print(json.dumps({"losses": [1]}), file=channel, flush=True)
    for line in channel:
        if fate == "dies in its turn":
            sys.exit("RuntimeError: out of luck")
        print(0.5, file=channel, flush=True)
        if fate == "dies between turns":
            sys.exit("RuntimeError: out of luck")
"""


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(programs, "command_of", lambda library, ranks, job: [sys.executable, "-c", FAKE, job["fate"]])
    return lambda fate: programs.Program("torch", 1, {"fate": fate})


def test_a_program_waits_for_its_turns_and_ends_when_it_is_left(program: Any) -> None:
    with program("lives") as running:
        assert running.first == {"losses": [1]}
        assert [running.turn("steps", 3), running.turn("products", 1)] == [0.5, 0.5]
        process = running._process
        assert process.poll() is None
    assert process.returncode == 0


@pytest.mark.parametrize("fate", ["dies at the start", "dies in its turn", "dies between turns"])
def test_a_program_that_dies_says_why(fate: str, program: Any) -> None:
    def run() -> None:
        with program(fate) as running:
            running.turn("steps", 1)
            running._process.wait(10)
            running.turn("steps", 1)

    with pytest.raises(programs.ProgramError, match=r"ended with status 1:\n(.|\n)*Error: ") as failure:
        run()
    assert failure.value.last_line in ("ValueError: no such network", "RuntimeError: out of luck")


def test_a_compiled_program_may_fail_and_another_one_not(program: Any) -> None:
    two = {
        "torch1": program("lives"),
        "compiled0": program("dies in its turn"),
        "compiled1": program("dies at the start"),
    }
    figures = compare.in_turns(two, steps=1, rounds=2, may_fail=("compiled0", "compiled1"))
    assert figures["torch1"]["steps_in_turns"] == figures["torch1"]["products_in_turns"] == [0.5, 0.5]
    assert figures["compiled0"] == {"error": "RuntimeError: out of luck"}
    assert figures["compiled1"] == {"error": "ValueError: no such network"}
    with pytest.raises(programs.ProgramError):
        compare.in_turns({"torch1": program("dies in its turn")}, steps=1, rounds=1)


CHOICES = ("channels_last", "fused", "bucket_view")


@pytest.mark.parametrize("best", list(itertools.product([False, True], repeat=3)), ids=str)
def test_pytorchs_fastest_options_are_what_is_compared_with(
    best: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_turns(alive: dict[str, programs.Program], *_: Any, **__: Any) -> dict[str, Any]:
        """A step takes longer for each option that is not as in `best`."""
        variants = {key: json.loads(program._command[-1]).get("variant", {}) for key, program in alive.items()}
        wrong = {
            key: sum(v.get(c, False) != b for c, b in zip(CHOICES, best, strict=True)) for key, v in variants.items()
        }
        return {key: {"steps_in_turns": [1.0 + wrong[key]], "of": variant} for key, variant in variants.items()}

    monkeypatch.setattr(compare, "in_turns", in_turns)
    found = compare.compare_network("cnn", steps=1, rounds=3, quick=False, no_compile=False)
    alone = {choice: True for choice, chosen in zip(CHOICES[:2], best[:2], strict=True) if chosen}
    assert found["torch1"]["variant"] == found["torch1"]["of"] == alone
    assert found["torch2"]["variant"] == found["torch2"]["of"] == alone | ({"bucket_view": True} if best[2] else {})
    assert found["compiled"]["of"] == {**alone, "compile": True}


@pytest.mark.parametrize(
    ("compiled", "cell"),
    [
        (None, "not measured"),
        ({"error": "RuntimeError: no compiler"}, "RuntimeError: no compiler"),
        (figures(2e-3, compile_seconds=33.4), "2.00 (33 s)"),
    ],
)
def test_a_compiled_step_stands_beside_the_time_to_compile_it(
    compiled: dict[str, Any] | None, cell: str, results: dict[str, Any]
) -> None:
    results["networks"]["mlp512"] |= {} if compiled is None else {"compiled": compiled}
    header, row, *_ = (line.split("|") for line in table.show(results).splitlines() if line.startswith("| "))
    assert dict(zip(map(str.strip, header), map(str.strip, row), strict=True))["compiled (compile s)"] == cell


def test_the_conditions_name_processor_and_software(results: dict[str, Any]) -> None:
    results["conditions"] = found = compare.conditions()
    assert list(found) == ["date", "command", "processor", "python", "numpy", "mpi", "OPENBLAS_CORETYPE"]
    cpu = [line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    name, _, cores = found["processor"].rpartition(", ")
    assert name == (cpu[0] if cpu else platform.processor())
    assert cores == f"{len(os.sched_getaffinity(0))} cores in use"
    shown = table.show(results)
    assert all(re.search(rf"^{key}: +{re.escape(value)}$", shown, re.MULTILINE) for key, value in found.items())


def test_the_time_to_the_first_step_is_the_median_of_three_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = iter([1.0, 9.0, 2.0])

    class Started(programs.Program):
        def __enter__(self) -> programs.Program:
            assert (self._command[1:3], self._ranks) == (["-m", "distprop"], 2)
            self.first = {"first_step_seconds": next(starts)}
            return self

    monkeypatch.setattr(compare, "Program", Started)
    assert compare.median_start("distprop", {"network": "mlp512"}) == 2.0
    assert list(starts) == []


class Learning:
    """Training of rank 0 of 1 that recognises so many of 100 images after each step, and remembers what it was told."""

    rank, size = 0, 1

    def __init__(self, right: list[int]) -> None:
        self.right, self.rates, self.seen = right, [], []

    def step(self, x: np.ndarray, y: np.ndarray) -> float:
        self.seen.append(x)
        return 0.0

    def convert(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return x, y

    def gather(self, value: float) -> list[float]:
        return [value]

    def count_right(self, x: np.ndarray, y: np.ndarray) -> int:
        return self.right[len(self.seen) - 1]


@pytest.mark.parametrize(
    ("right", "steps", "reached"), [([97] * 16, 16, False), ([97] * 5 + [98] * 11, 6, True), ([98] * 16, 2, True)]
)
def test_training_on_mnist_ends_at_98_percent(
    right: list[int], steps: int, reached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four epochs of four steps, looked at after every second one."""
    monkeypatch.setenv("COMPARE_BEGAN", "0")
    training, images = Learning(right), np.arange(4 * 64)
    data = [images, images, np.zeros(100), np.zeros(100)]
    found = measure.train_mnist(training, data, training.rates.append, training.count_right, epochs=4, seed=0)
    assert (found["steps"], found["reached"], found["accuracy"]) == (steps, reached, right[steps - 1] / 100)
    assert training.rates == pytest.approx([0.1 * (1 - step / 16) for step in range(steps)])
    assert sorted(np.concatenate(training.seen[:4])) == images.tolist() or steps < 4
    assert {len(batch) for batch in training.seen} == {64}


def test_the_time_to_98_percent_is_a_median_over_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands = []

    def run(command: list[str]) -> dict[str, Any]:
        job = json.loads(command[-1])
        commands.append((Path(command[-2]).name, job))
        late = 10 * ("torch" in command[-2])
        return {"seconds": late + [3.0, 1.0, 8.0][job["seed"]], "accuracy": 0.98, "reached": late + job["seed"] != 12}

    monkeypatch.setattr(compare, "run_for_json", run)
    monkeypatch.setenv("DISTPROP_DATA", str(tmp_path))
    (tmp_path / "mnist").mkdir()
    assert compare.compare_mnist() == {
        "torch": {"seconds": 13.0, "accuracy": 0.98, "reached": False},
        "distprop": {"seconds": 3.0, "accuracy": 0.98, "reached": True},
    }
    jobs = [{"network": "mlp512", "epochs": 4, "seed": seed} for seed in range(3)]
    assert commands == [(f"train_{library}.py", job) for job in jobs for library in ("torch", "distprop")]


@pytest.mark.parametrize("folder", ["", "missing"])
def test_without_mnist_the_table_says_why_its_time_is_not_there(
    folder: str, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTPROP_DATA", folder)
    results["mnist"] = compare.compare_mnist()
    shown = table.show(results)
    assert "time to 98 % on MNIST over DDP's" not in shown
    assert shown.endswith(f"MNIST is not measured: DISTPROP_DATA={folder} is no folder with mnist/ in it")


@pytest.mark.parametrize("text", [None, "MLP: 3 ms", "[]", "{}"])
def test_what_is_no_result_is_not_merged(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    if text is not None:
        file.write_text(text)
    command = [sys.executable, str(BENCHMARKS / "compare.py"), "--merge", str(file)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 1
    assert re.match(r"\S+/a.json is no output of compare.py --json: \w+\(.*\)$", answer.stderr)


def test_results_of_several_runs_make_one_table(results: dict[str, Any], tmp_path: Path) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    files[0].write_text(json.dumps(results))
    other = {"networks": {"cnn": results["networks"]["mlp512"]}, "conditions": {"command": "b"}}
    files[1].write_text(json.dumps(other))
    command = [sys.executable, str(BENCHMARKS / "compare.py"), "--merge", *map(str, files)]
    answer = subprocess.run(command, env={**os.environ}, capture_output=True, text=True, timeout=60, check=True)
    assert "MLP 784-512-512-10" in answer.stdout
    assert "CNN" in answer.stdout
    assert "a; b" in answer.stdout
