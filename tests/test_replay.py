"""Blame and replay: a step made again has the numbers it had, to the bit, and leaves the run's folder as it was."""

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import distprop as dp
from distprop import functional as F
from distprop import nn, numbers, optim
from distprop.capture import Capture
from distprop.cli import main
from distprop.comm import Communicator, SoloCommunicator, play, run_threads, world
from distprop.config import Config, Model, Optim, Train
from distprop.fingerprint import compare, read
from distprop.job import train_from_config
from distprop.metrics import METRICS
from distprop.random import Stream, generator
from distprop.replay import Replayed, ReplayError, plan, replay
from distprop.replicas import DivergenceError
from distprop.rundir import RUN
from distprop.tensor import record

ROWS, FEATURES = 20, 6
RANKS = 3


@dataclass
class Noisy:
    """A dataset with augmentation: other inputs in each epoch."""

    epoch: int = 0

    def __len__(self) -> int:
        return ROWS

    def at_epoch(self, epoch: int) -> "Noisy":
        return Noisy(epoch)

    def __getitem__(self, indices: np.ndarray) -> tuple[np.ndarray, ...]:
        rows = [generator(3, Stream.AUGMENT, self.epoch, int(i)).normal(size=FEATURES) for i in indices]
        return np.array(rows, np.float32).reshape(-1, FEATURES), indices % 3


class Seen(list):
    """What the ranks of a real run saw, by hooks of its own: (rank, step, what, array)."""

    def watch(self, trainer: dp.Trainer) -> None:
        parallel, rank, loss = trainer.parallel, trainer.comm.rank, trainer.loss
        prepare, dropout = parallel._prepare, trainer.model[3].forward

        def before_reduction() -> None:
            scale = parallel.expected_examples * trainer.accumulate
            self.append((rank, trainer.step + 1, "gradient", (parallel._buffer.grad.copy(), scale)))
            prepare()

        def masked(x):
            output = dropout(x)
            if trainer.model.training:
                self.append((rank, trainer.step + 1, "mask", output.data.copy()))
            return output

        def noting(output, target):
            if trainer.model.training:
                self.append((rank, trainer.step + 1, "target", np.array(target)))
            return loss(output, target)

        noting.__name__ = loss.__name__  # run.json has it
        parallel._prepare, trainer.model[3].forward, trainer.loss = before_reduction, masked, noting

    def of(self, rank: int, step: int, what: str) -> list:
        return [value for *where, value in self if where == [rank, step, what]]


def train(
    run_dir: Path,
    comm: Communicator | None = None,
    seen: Seen | None = None,
    steps: int = 10,
    norm: type[nn.Module] = nn.BatchNorm1d,
    **options,
) -> None:
    dp.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 8), norm(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"batch_size": 8, "checkpoint_every": 3, "progress": False, **options}
    trainer = dp.Trainer(model, F.cross_entropy, optimizer, comm=comm or world(), run_dir=run_dir, **options)
    if seen is not None:
        seen.watch(trainer)
    trainer.fit(Noisy(), steps=steps)


class Again:
    """A program that is a function."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function

    def surroundings(self) -> contextlib.nullcontext:
        return contextlib.nullcontext()

    def __call__(self) -> None:
        self.function()


def again(run_dir: Path, step: int, rank: int, function: Callable[[], object]) -> Replayed:
    return replay(plan(run_dir, step, rank, program=Again(function)))


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and "replay" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def command(*arguments: object):
    return CliRunner().invoke(main, ["replay", *map(str, arguments)])


MODES = {
    "plain": {"batch_size": 7},  # no power of two, by which numbers can be divided without rounding
    "deterministic": {"deterministic": True, "shards": 4},
    "accumulate": {"accumulate": 2},
    "deterministic and accumulate": {"deterministic": True, "shards": 4, "accumulate": 2},
    "a rank without rows": {"batch_size": 2},
    "ranks without shards": {"deterministic": True, "shards": 2},
    "clipped": {"clip_norm": 0.1},
    "synchronised": {"norm": nn.SyncBatchNorm},
}


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_a_step_has_the_numbers_it_had(options: dict, tmp_path: Path) -> None:
    """Steps right after a checkpoint and two later, whole batches (7, 8) and the rest of an epoch (9)."""
    seen = Seen()

    def run(comm: Communicator) -> None:
        with play(comm):  # SyncBatchNorm asks for the world
            train(tmp_path, comm, seen, **options)

    run_threads(RANKS, run)
    before = contents(tmp_path)
    for step in (7, 9):
        totals = {}
        for rank in range(RANKS):
            made = again(tmp_path, step, rank, lambda: train(tmp_path, **options))
            assert "losses" in made.summary
            assert "away" not in made.summary
            with np.load(made.path, allow_pickle=False) as saved:
                assert saved.files == list(made.arrays)
                arrays = {name: saved[name] for name in saved.files}
            targets = seen.of(rank, step, "target")
            np.testing.assert_array_equal(arrays["target"], np.concatenate([*targets, arrays["target"][:0]]))
            np.testing.assert_array_equal(arrays["target"], arrays["indices"] % 3)
            epoch = (step - 1) // (-(-ROWS // options.get("batch_size", 8)))
            np.testing.assert_array_equal(arrays["input"], Noisy(epoch)[arrays["indices"]][0])
            masks = [arrays[name] for name in arrays if name.partition("@")[0] == "output/3"]
            for mask, of_run in zip(masks, seen.of(rank, step, "mask"), strict=True):
                np.testing.assert_array_equal(mask, of_run)
            raw = seen.of(rank, step, "gradient")
            rows = sum(len(target) for other in range(RANKS) for target in seen.of(other, step, "target"))
            names = ["4.bias", "4.weight", "1.bias", "1.weight", "0.bias", "0.weight"]
            if raw:
                factor = np.float32(raw[0][1] / rows)
                local = sum((grad for grad, _ in raw[1:]), raw[0][0]) * factor
                mine = np.concatenate([arrays[f"grad/{name}"].ravel() for name in names])
                np.testing.assert_array_equal(mine, local)
            for name in names:
                totals[name] = totals.get(name, 0) + arrays[f"grad/{name}"].astype(np.float64)
        whole = np.concatenate([totals[name].ravel() for name in names])
        everything = [grad * (scale / rows) for r in range(RANKS) for grad, scale in seen.of(r, step, "gradient")]
        np.testing.assert_allclose(whole, np.sum(everything, 0), atol=1e-6)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("options", [{}, {"deterministic": True}], ids=["plain", "deterministic"])
def test_the_numbers_are_those_of_backpropagation(options: dict, tmp_path: Path) -> None:
    """Every activation follows from the one before, and every gradient from the one after."""
    run_threads(2, lambda comm: train(tmp_path, comm, norm=nn.LayerNorm, shards=2, **options))
    a = again(tmp_path, 8, 1, lambda: train(tmp_path, norm=nn.LayerNorm, shards=2, **options)).arrays
    w, b, x = a["parameter/4.weight"], a["parameter/4.bias"], a["output/3"]
    np.testing.assert_allclose(a["output/4"], x @ w.T + b, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(a["output"], a["output/4"])
    np.testing.assert_array_equal(a["output/2"], np.maximum(a["output/1"], 0))
    p = np.exp(a["output"]) / np.exp(a["output"]).sum(1, keepdims=True)
    hot = np.eye(3)[a["target"]]
    np.testing.assert_allclose(a["loss"], -np.log((p * hot).sum(1)).mean(), rtol=1e-5)
    np.testing.assert_allclose(a["output_grad/4"], (p - hot) / 8, atol=1e-6)  # a part of the mean over 8 examples
    np.testing.assert_allclose(a["grad/4.weight"], a["output_grad/4"].T @ x, atol=1e-6)
    np.testing.assert_allclose(a["output_grad/3"], a["output_grad/4"] @ w, atol=1e-6)
    np.testing.assert_allclose(a["output_grad/1"], a["output_grad/2"] * (a["output/1"] > 0), atol=1e-6)
    assert list(a)[:3] == ["indices", "input", "target"]
    backward = [name for name in a if name.startswith(("output_grad/", "grad/"))]
    assert backward[:4] == ["output_grad/4", "grad/4.bias", "grad/4.weight", "output_grad/3"]


def test_the_initial_state_serves_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    options = {"checkpoint_every": None, "deterministic": True}
    run_threads(2, lambda comm: train(tmp_path, comm, steps=4, **options))
    made = again(tmp_path, 3, 0, lambda: train(tmp_path, **options))
    assert "from the initial parameters, on 2 ranks in this process: steps 1 to 3 were made again" in made.summary
    assert "parameters (3 steps): those of fingerprints.jsonl, to the bit" in made.summary
    assert "losses (3 steps): those of metrics.jsonl, to the bit" in made.summary
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(("step", "first"), [(2, 1), (7, 1), (8, 8), (9, 9)])  # three checkpoints are kept
def test_a_step_of_a_later_call_of_fit_is_made_again_from_the_checkpoint_before_it(
    step: int, first: int, tmp_path: Path
) -> None:
    def program(comm: Communicator | None = None) -> None:
        model = nn.Linear(FEATURES, 3)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        trainer = dp.Trainer(
            model, F.cross_entropy, optimizer, comm=comm, batch_size=8, run_dir=tmp_path, checkpoint_every=2,
            progress=False, deterministic=True,
        )  # fmt: skip
        trainer.fit(Noisy(), steps=3)
        x, y = Noisy()[np.arange(12)]
        trainer.fit(dp.data.ArrayDataset(-x, y), steps=4)
        trainer.fit(Noisy(), steps=2)

    run_threads(2, program)
    wanted = plan(tmp_path, step, 0, program=Again(program))
    assert wanted.remarks == []
    made = replay(wanted)
    assert f"parameters ({step - first + 1} step" in made.summary
    assert "those of fingerprints.jsonl, to the bit" in made.summary
    assert (made.arrays["indices"].max() < 12) == (3 < step <= 7)


@pytest.mark.parametrize("steps", [6, 7], ids=["at the end of an epoch", "within one"])
def test_a_run_that_is_resumed_in_the_default_mode_has_the_bits_of_one_that_is_not(steps: int, tmp_path: Path) -> None:
    run_threads(RANKS, lambda comm: train(tmp_path / "whole", comm, fingerprint=True, batch_size=7))
    for last in (steps, 10):
        options = {"fingerprint": True, "batch_size": 7, "resume": True, "steps": last}
        run_threads(RANKS, lambda comm, options=options: train(tmp_path / "resumed", comm, **options))
    assert compare(read(tmp_path / "whole"), read(tmp_path / "resumed")) is None


def test_a_resumed_run_is_replayed_on_the_ranks_that_made_the_step(tmp_path: Path) -> None:
    options = {"deterministic": True, "resume": True}
    run_threads(2, lambda comm: train(tmp_path, comm, steps=6, **options))
    run_threads(3, lambda comm: train(tmp_path, comm, **options))
    assert "rank 1 of 2" in again(tmp_path, 6, 1, lambda: train(tmp_path, **options)).summary
    assert "rank 1 of 3" in again(tmp_path, 7, 1, lambda: train(tmp_path, **options)).summary


class Spoilt(nn.ReLU):
    """Goes wrong on one rank in one training step: `how` takes its output."""

    def __init__(self, how: Callable[[dp.Tensor], dp.Tensor], trainer: list[dp.Trainer], rank: int, step: int) -> None:
        self.how, self.trainer, self.rank, self.step = how, trainer, rank, step

    def forward(self, x: dp.Tensor) -> dp.Tensor:
        output = super().forward(x)
        here = self.trainer[0].comm.rank, self.trainer[0].step + 1
        return self.how(output) if here == (self.rank, self.step) else output


def nan_forward(output: dp.Tensor) -> dp.Tensor:
    return output + np.where(np.arange(8) == 5, np.nan, 0).astype(np.float32)


def nan_backward(output: dp.Tensor) -> dp.Tensor:
    return record(output.data.copy(), (output,), lambda grad, out: [grad * np.float32("nan")])


def spoilt_run(run_dir: Path, comm: Communicator | None, how: Callable[[dp.Tensor], dp.Tensor]) -> None:
    dp.manual_seed(0)
    trainers: list[dp.Trainer] = []
    model = nn.Sequential(nn.Linear(FEATURES, 8), Spoilt(how, trainers, 1, 5), nn.Linear(8, 3))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    options = {"batch_size": 8, "checkpoint_every": 3, "progress": False, "deterministic": True, "shards": 2}
    trainers.append(dp.Trainer(model, F.cross_entropy, optimizer, comm=comm, run_dir=run_dir, **options))
    trainers[0].fit(Noisy(), steps=10)


@pytest.mark.parametrize(
    ("how", "first", "error"),
    [(nan_forward, "output/1 Spoilt: 4 of 32 numbers, the first at (0, 5) is nan", "NonFiniteLossError"),
     (nan_backward, "output_grad/0 Linear", "NonFiniteGradientError")],
    ids=["forward", "backward"],
)  # fmt: skip
def test_the_layer_in_which_nan_comes_up_is_named(how, first: str, error: str, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError) as raised:
        run_threads(2, lambda comm: spoilt_run(tmp_path, comm, how))
    assert f"To see that step's numbers: distprop replay {tmp_path} --step 5 --rank 1" in raised.value.__notes__
    made = again(tmp_path, 5, 1, lambda: spoilt_run(tmp_path, None, how))
    assert f"the step ended with {error}: " in made.summary
    assert numbers.first_not_finite(made.arrays, made.kinds).startswith(f"the first that is not finite is {first}")
    sane = again(tmp_path, 5, 0, lambda: spoilt_run(tmp_path, None, how))
    assert numbers.first_not_finite(sane.arrays) is None
    assert error in sane.summary
    with pytest.raises(ReplayError, match=r"--step 6: .* made the steps 1 to 5"):
        plan(tmp_path, 6, 0, program=Again(print))


def test_a_step_that_raises_shows_what_there_was(tmp_path: Path) -> None:
    def boom(output: dp.Tensor) -> dp.Tensor:
        raise KeyError("boom")

    with pytest.raises(KeyError):
        run_threads(2, lambda comm: spoilt_run(tmp_path, comm, boom))
    made = again(tmp_path, 5, 1, lambda: spoilt_run(tmp_path, None, boom))
    assert "the step ended with KeyError: 'boom'" in made.summary
    assert [name for name in made.arrays if name.startswith(("output", "grad"))] == ["output/0"]


@dataclass
class Output:
    """What a network may return, as `DataParallel` allows."""

    scores: dp.Tensor
    states: tuple[dp.Tensor, ...] = ()


def test_what_a_module_returns_in_a_dataclass_is_seen() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            self.linear = nn.Linear(2, 3)

        def forward(self, x: np.ndarray) -> Output:
            return Output(self.linear(x), (self.linear(x) * 2,))

    model, x = Network(), np.ones((4, 2), np.float32)
    capture = Capture(model)
    with capture.watching():
        output = dp.DataParallel(model)(x)
        (output.scores.sum() + output.states[0].sum()).backward()
    found = capture.arrays(np.arange(4), (x, np.zeros(4)))
    assert {"output.scores", "output.states[0]", "output_grad.states[0]"} <= set(found)
    np.testing.assert_array_equal(found["output_grad.states[0]"], np.full((4, 3), 4.0))  # weighed with its examples


def test_two_runs_that_differ_do_so_first_in_the_layer_that_is_to_blame(tmp_path: Path) -> None:
    """Nothing but the gradient of one layer's weight is different, in step 5."""

    def run(run_dir: Path, comm: Communicator | None, extra: float) -> None:
        model_of: list[nn.Module] = []

        def more(output: dp.Tensor) -> dp.Tensor:
            added = model_of[0].weight.sum() * extra
            return output + (added - added.data)  # adds 0

        dp.manual_seed(0)
        trainers: list[dp.Trainer] = []
        model = nn.Sequential(nn.Linear(FEATURES, 8), Spoilt(more, trainers, 1, 5), nn.Linear(8, 3))
        model_of.append(model[2])
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        options = {"batch_size": 8, "progress": False, "deterministic": True, "shards": 2}
        trainers.append(dp.Trainer(model, F.cross_entropy, optimizer, comm=comm, run_dir=run_dir, **options))
        trainers[0].fit(Noisy(), steps=8)

    folders = {"a": 0.0, "b": 0.5}
    for name, extra in folders.items():
        run_threads(2, lambda comm, name=name, extra=extra: run(tmp_path / name, comm, extra))
    found = CliRunner().invoke(main, ["fingerprint", str(tmp_path / "a"), str(tmp_path / "b")])
    assert found.stderr.startswith("the first difference is at step 5, layer 2.weight, all ranks\n")
    assert f"distprop replay {tmp_path / 'a'} --step 5 --rank 0 --compare {tmp_path / 'b'}/replay/" in found.stderr
    a, b = (
        again(tmp_path / name, 5, 1, lambda name=name, extra=extra: run(tmp_path / name, None, extra)).arrays
        for name, extra in folders.items()
    )
    assert numbers.difference(a, a) is None
    assert numbers.difference(a, b).startswith("the first difference is in grad/2.weight; 19 of 20 arrays are equal\n")


def test_a_parameter_that_one_rank_changed_is_explained_only_by_a_program_that_does_it(tmp_path: Path) -> None:
    def run(comm: Communicator | None, fault: bool = True) -> None:
        def step_and_change() -> None:
            step()
            if fault and optimizer.steps == 5 and trainer.comm.rank == 1:
                model[0].bias.data[2] += 1

        dp.manual_seed(0)
        model = nn.Sequential(nn.Linear(FEATURES, 3))
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        step, optimizer.step = optimizer.step, step_and_change
        options = {"batch_size": 8, "progress": False, "deterministic": True}
        trainer = dp.Trainer(model, F.cross_entropy, optimizer, comm=comm, run_dir=tmp_path, **options)
        trainer.fit(Noisy(), steps=10)

    with pytest.raises(DivergenceError) as raised:
        run_threads(3, run)
    assert str(raised.value).endswith(f"To see that step's numbers: distprop replay {tmp_path} --step 5 --rank 1")
    repeated = [again(tmp_path, 6, rank, lambda: run(None)) for rank in (0, 1)]
    assert all("parameters (6 steps): those of fingerprints.jsonl, to the bit" in made.summary for made in repeated)
    first = numbers.difference(repeated[0].arrays, repeated[1].arrays).partition("\n")[2]
    assert "parameter/0.bias" in first
    assert "parameter/0.weight" not in first
    made = again(tmp_path, 5, 1, lambda: run(None, fault=False))
    assert "after step 5 rank 1 of the run had another 0.bias; here it has what the other ranks had" in made.summary


# --- what cannot be repeated


def test_a_program_without_a_seed_is_refused_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    def run(comm: Communicator | None = None) -> None:
        model = nn.Linear(FEATURES, 3)
        model.weight.data = np.random.default_rng().normal(size=(3, FEATURES)).astype(np.float32)
        trainer = dp.Trainer(
            model, F.cross_entropy, optim.SGD(model.parameters(), lr=0.1), comm=comm, batch_size=8, progress=False,
            run_dir=tmp_path, checkpoint_every=2,
        )  # fmt: skip
        trainer.fit(Noisy(), steps=5)

    run_threads(2, run)
    before = contents(tmp_path)
    with pytest.raises(ReplayError, match=r"no checkpoint before step 2, and the program begins with other parameters"):
        again(tmp_path, 2, 0, run)
    assert not (tmp_path / "replay").exists()
    assert contents(tmp_path) == before
    assert "to the bit" in again(tmp_path, 3, 0, run).summary


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 4}, "batch_size was 8, is 4"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"norm": nn.LayerNorm}, "Unexpected|the state does not fit"),
        ({"clip_norm": 2.0}, r"is not the one of .* any more: clip_norm was None, is 2\.0"),
        ({"steps": 5}, "rank 0 did not come to step 8 of .*: the program ended"),
    ],
)
def test_another_program_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    train(tmp_path, SoloCommunicator())
    with pytest.raises(ReplayError, match=message):
        again(tmp_path, 8, 0, lambda: train(tmp_path, **change))


def test_a_program_that_trains_elsewhere_or_twice_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "a", SoloCommunicator())
    with pytest.raises(ReplayError, match=r"trains in .*/b now; .* in several folders"):
        again(tmp_path / "a", 8, 0, lambda: train(tmp_path / "b"))
    assert not (tmp_path / "b").exists()
    with pytest.raises(ReplayError, match="a second Trainer"):
        again(tmp_path / "a", 8, 0, lambda: [train(tmp_path / "a", steps=0), train(tmp_path / "a")])


def test_a_model_that_all_ranks_share_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(FEATURES, 3)

    def run(comm: Communicator | None = None, model: nn.Module = model) -> None:
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        options = {"batch_size": 8, "progress": False, "run_dir": tmp_path}
        dp.Trainer(model, F.cross_entropy, optimizer, comm=comm, **options).fit(Noisy(), steps=2)

    run_threads(2, lambda comm: run(comm, nn.Linear(FEATURES, 3)))
    with pytest.raises(ReplayError, match="several of them have got the same model"):
        again(tmp_path, 1, 0, run)


def spoil(run_dir: Path, **values: object) -> None:
    tree = json.loads((run_dir / RUN).read_text())
    tree["sessions"][0] |= values
    (run_dir / RUN).write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (lambda run: (run / RUN).unlink(), (3, 0), "has no run.json"),
        (lambda run: (run / RUN).write_text('{"format": 99, "sessions": []}'), (3, 0), "has format 99"),
        (lambda run: None, (0, 0), "--step 0: the run in .* made the steps 1 to 10"),
        (lambda run: None, (11, 0), "--step 11: the run in .* made the steps 1 to 10"),
        (lambda run: (run / METRICS).write_text(""), (1, 0), "--step 1: the run in .* made no step"),
        (lambda run: None, (3, 2), "--rank 2: step 3 was made on 1 rank; give --rank 0"),
        (lambda run: None, (3, -1), "--rank -1"),
        (lambda run: spoil(run, program=None), (3, 0), "at a prompt or with python -c"),
        (lambda run: spoil(run, program={"script": str(run / "gone.py")}), (3, 0), "gone.py, .* --script PATH"),
        (lambda run: spoil(run, program={"script": "/x/distprop"}), (3, 0), "its config.toml is gone"),
        (lambda run: spoil(run, ranks="two"), (3, 0), "does not say what made step 3"),
    ],
)
def test_bad_input_is_refused_before_anything_is_done(prepare, options, message: str, tmp_path: Path) -> None:
    train(tmp_path, SoloCommunicator())
    prepare(tmp_path)
    before = contents(tmp_path)
    answer = command(tmp_path, "--step", options[0], "--rank", options[1])
    assert answer.exit_code == 2
    with pytest.raises(ReplayError, match=message):
        plan(tmp_path, *options)
    assert contents(tmp_path) == before
    assert not (tmp_path / "replay").exists()


def test_another_script_is_refused_for_a_run_of_distprop_train(tmp_path: Path) -> None:
    train(tmp_path, SoloCommunicator())
    spoil(tmp_path, program={"script": "/x/distprop"})
    (tmp_path / "config.toml").touch()
    answer = command(tmp_path, "--step", 3, "--rank", 0, "--script", __file__)
    assert answer.exit_code == 2
    assert "is one of distprop train, and --script is for runs of scripts; leave it out" in answer.stderr


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "there is no folder" in command(tmp_path / "nowhere", "--step", 1, "--rank", 0).stderr


# --- the command


@pytest.fixture
def configured(tmp_path: Path) -> Path:
    config = Config(
        model=Model(hidden=[16], dropout=0.2),
        optim=Optim(lr=0.1),
        train=Train(epochs=1, batch_size=128, checkpoint_every=4, fingerprint=True),
    )
    run_threads(2, lambda comm: train_from_config(config, tmp_path / "run", comm=comm))
    return tmp_path / "run"


def test_the_command_shows_a_table_and_compares(configured: Path, tmp_path: Path) -> None:
    before = contents(configured)
    shown = command(configured, "--step", 6, "--rank", 1, "-i")
    assert shown.exit_code == 0, shown.output
    assert "step 6, rank 1 of 2: 64 of 128 examples" in shown.stdout
    assert "from the checkpoint of step 4, on 2 ranks in this process: steps 5 to 6 were made again" in shown.stdout
    assert "parameters (2 steps): those of fingerprints.jsonl, to the bit" in shown.stdout
    lines = {line.split("  ")[0]: line.split() for line in shown.stdout.splitlines()}
    file = configured / "replay" / "step-6-rank-1.npz"
    arrays = numbers.load(file)
    assert lines["output/1 Linear"][2] == "(64,16)"
    assert lines["output/1 Linear"][3] == f"{np.linalg.norm(arrays['output/1'].astype(float)):.4g}"
    assert lines["grad/1.weight"][-2:] == ["0", "0"]
    assert "not finite" not in shown.stdout
    assert f'numpy.load("{file}")["output"]' in shown.stdout
    same = command(configured, "--step", 6, "--rank", 1, "--compare", file)
    assert (same.exit_code, f"all {len(arrays)} arrays are those of" in same.stdout) == (0, True)
    arrays["output_grad/1"][3, 4] += 1
    np.savez(tmp_path / "other.npz", **arrays)
    other = command(configured, "--step", 6, "--rank", 1, "--compare", tmp_path / "other.npz")
    assert other.exit_code == 1
    assert "the first difference is in output_grad/1; " in other.stdout
    assert contents(configured) == before


def test_a_file_that_is_no_npz_is_refused_first(configured: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("nothing")
    np.savez(tmp_path / "pickle.npz", x=np.array([{}], dtype=object))
    np.savez(tmp_path / "cut.npz", x=np.zeros(300))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:700])
    for name in ("one.npy", "text.npz", "pickle.npz", "missing.npz", "cut.npz"):
        answer = command(configured, "--step", 6, "--rank", 1, "--compare", tmp_path / name)
        assert (answer.exit_code, "is not an .npz file" in answer.stderr) == (2, True), name
        assert "Errno" not in answer.stderr
    assert not (configured / "replay").exists()


SCRIPT = """
import os
import sys
import time
import numpy as np
import distprop as dp
from distprop import nn, functional as F, optim

class Layer(nn.Linear):
    def forward(self, x):
        output = super().forward(x)
        bad = self.training and dp.world().rank == 1 and trainer.step + 1 == 6
        while bad and not os.path.exists(f"{sys.argv[1]}/checkpoints/step-000000004"):
            time.sleep(0.01)  # it is written while training goes on
        return output * np.float32("inf") if bad else output

np.random.seed(4)  # the old generator, one for the whole process
x, y = np.random.normal(size=(60, 5)).astype(np.float32), np.random.randint(0, 3, 60)
comm = dp.world()
x += comm.allgather(bytes([comm.rank]))[-1][0]  # a collective of the script's own
model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.5), Layer(7, 3))
optimizer = optim.SGD(model.parameters(), lr=0.1)
trainer = dp.Trainer(
    model, F.cross_entropy, optimizer, batch_size=16, run_dir=sys.argv[1], checkpoint_every=4, progress=False,
    fingerprint=True,
)
trainer.fit(dp.data.ArrayDataset(x, y), epochs=9)
"""


def test_a_job_of_several_processes_is_repeated_in_one_without_mpi(tmp_path: Path) -> None:
    """A script that fails on rank 1 under a real launcher; relative names, and a generator for the whole process."""
    (tmp_path / "job.py").write_text(SCRIPT)
    distprop = [sys.executable, "-m", "distprop"]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120}
    failed = subprocess.run([*distprop, "run", "-n", "2", "job.py", "runs/a"], **options)
    assert failed.returncode != 0
    assert "distprop replay runs/a --step 6 --rank 1" in failed.stderr
    before = contents(tmp_path)
    code = "import sys; from distprop.cli import main\n"
    code += "try: main(prog_name='distprop')\nfinally: print('mpi4py' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code, "replay", "runs/a", "--step", "6", "--rank", "1"], **options)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.endswith("False\n")
    assert "the first that is not finite is output/3 Layer: 24 of 24 numbers" in answer.stdout
    assert "from the checkpoint of step 4, on 2 ranks in this process: step 5 was made again" in answer.stdout
    assert "other bits" not in answer.stdout
    assert "away" not in answer.stdout
    assert "the step ended with NonFiniteLossError: step 6" in answer.stdout
    (tmp_path / "job.py").write_text(SCRIPT + "\n")
    (tmp_path / "job.py").rename(tmp_path / "moved.py")
    where = ["replay", "runs/a", "--step", "4", "--rank", "0"]
    gone = subprocess.run([*distprop, *where], **options)
    assert (gone.returncode, "job.py, which made the run in" in gone.stderr) == (2, True)
    moved = subprocess.run([*distprop, *where, "--script", "moved.py"], **options)
    assert (moved.returncode, "moved.py has changed since the run" in moved.stderr) == (0, True)
    assert "losses (4 steps): those of metrics.jsonl, to the bit" in moved.stdout
    assert "parameters (4 steps): those of fingerprints.jsonl, to the bit" in moved.stdout
    after = contents(tmp_path)
    assert {name: after[name] for name in before if name != "job.py"} == {n: before[n] for n in before if n != "job.py"}
    assert after.keys() - before.keys() == {"moved.py"}
