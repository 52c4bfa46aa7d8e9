import json
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import distprop as dp
import train_suite
from distprop import functional as F
from distprop import nn, optim
from distprop.comm import CollectiveError, SoloCommunicator, mpi, run_threads
from distprop.data import ArrayDataset
from distprop.data.augment import Augmented, RandomShift
from distprop.random import manual_seed
from distprop.update import NonFiniteLossError
from scenario import run
from train_suite import classes, make_trainer


@pytest.mark.parametrize(("scenario", "size"), train_suite.suite.in_threads((1, 2, 3, 5)))
def test_trainer(scenario, size):
    run(scenario, size)


def test_without_a_communicator_it_is_the_world():
    assert isinstance(make_trainer(None).comm, SoloCommunicator)


def test_only_rank_0_speaks(capsys):
    run_threads(3, lambda comm: make_trainer(comm, progress=True).fit(classes(10), epochs=2, validation=classes(3)))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("epoch 1  loss ")
    assert second.startswith("epoch 2  loss ")
    assert "validation loss" in first
    assert first.endswith(" samples/s")


def test_nothing_is_shown_without_progress(capsys):
    make_trainer(SoloCommunicator(), progress=False).fit(classes(10), epochs=1)
    assert capsys.readouterr() == ("", "")


def test_metrics_up_to_an_error_are_on_the_disk(tmp_path):
    data = classes(12)
    data.x[:, 0] = np.nan
    trainer = make_trainer(SoloCommunicator(), run_dir=tmp_path)
    trainer.fit(classes(12), steps=2)
    with pytest.raises(NonFiniteLossError):
        trainer.fit(data, epochs=1)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [next(key for key in ("epoch_loss", "loss", "health", "verdict") if key in line) for line in lines] == [
        *("loss", "health", "loss", "health"),
        "epoch_loss",
        *("health", "verdict"),  # of the step that failed
    ]


class Broken:
    """A dataset that one rank cannot read."""

    def __init__(self, rank):
        self.whole, self.rank = classes(12), rank

    def __len__(self):
        return len(self.whole)

    def __getitem__(self, indices):
        if self.rank == 1:
            raise OSError("the disk of rank 1 is gone")
        return self.whole[indices]


@pytest.mark.parametrize("what", ["fit", "evaluate"])
def test_a_rank_that_cannot_read_its_data_stops_the_others(what):
    stopped = []

    def train(comm):
        try:
            trainer = make_trainer(comm)
            trainer.fit(Broken(comm.rank), epochs=1) if what == "fit" else trainer.evaluate(Broken(comm.rank))
        except CollectiveError as error:
            stopped.append((comm.rank, "the disk of rank 1 is gone" in str(error)))
            raise

    with pytest.raises(OSError, match="the disk of rank 1 is gone"):
        run_threads(3, train, timeout_seconds=20)
    assert sorted(stopped) == [(0, True), (2, True)]


# The same on real ranks: a failure of one ends the job within seconds, and its reason is on standard error.

FAILURES = {
    "a dataset": (
        "OSError: the disk of rank 1 is gone",
        """
        class Broken:
            def __len__(self):
                return 12

            def __getitem__(self, indices):
                if comm.rank == 1:
                    raise OSError("the disk of rank 1 is gone")
                return np.ones((len(indices), 4), np.float32), np.zeros(len(indices), int)

        trainer.fit(Broken(), epochs=1)
        """,
    ),
    "a loss": (
        "NonFiniteLossError: step 3 (epoch 1): the loss is not finite on rank 1 of 2; nothing was updated",
        """
        x = np.ones((12, 4), np.float32)
        x[dp.data.loader.order(0, 0, 12)[10]] = np.nan  # the third of the last batch of four
        trainer.fit(dp.data.ArrayDataset(x, np.zeros(12, int)), epochs=1)
        """,
    ),
    "a callback": (
        "KeyError: 'in a callback'",
        """
        def callback(result):
            if comm.rank == 1:
                raise KeyError("in a callback")

        trainer.callbacks.append(callback)
        trainer.fit(dp.data.ArrayDataset(np.ones((12, 4), np.float32), np.zeros(12, int)), epochs=1)
        """,
    ),
    "a parameter": (
        "DivergenceError: parameter bias of shape (3,) differs between ranks: rank 0 against rank 1",
        """
        model.bias.data[0] += comm.rank
        trainer.fit(dp.data.ArrayDataset(np.ones((12, 4), np.float32), np.zeros(12, int)), epochs=50)
        """,
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_on_mpi_ranks_a_failure_ends_the_job_with_its_traceback(failure, tmp_path):
    try:
        mpi.library()
    except mpi.MPIMissingError as error:
        pytest.skip(str(error))
    message, body = FAILURES[failure]
    head = """
        import numpy as np
        import distprop as dp
        from distprop import functional as F

        comm = dp.world()
        assert comm.size == 2
        model = dp.nn.Linear(4, 3)
        trainer = dp.Trainer(model, F.cross_entropy, dp.optim.SGD(model.parameters(), lr=0.1), batch_size=4)
        """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(head) + textwrap.dedent(body) + "\nprint('the end')\n")
    began = time.monotonic()
    job = subprocess.run(
        [sys.executable, "-m", "distprop", "run", "-n", "2", str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert job.returncode != 0
    assert time.monotonic() - began < 20
    assert "Traceback (most recent call last)" in job.stderr
    assert message in job.stderr
    assert "the end" not in job.stdout


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, other = dp.nn.Linear(2, 1), dp.nn.Linear(2, 1)
    optimizer = dp.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="2 of the optimizer's 2 parameters are not the model's"):
        dp.Trainer(model, dp.functional.mse_loss, optimizer, batch_size=1)


def test_a_dataset_without_targets_is_refused() -> None:
    trainer, inputs = make_trainer(SoloCommunicator()), ArrayDataset(np.zeros((4, 4), np.float32))
    for call in (lambda: trainer.fit(inputs, epochs=1), lambda: trainer.evaluate(inputs)):
        with pytest.raises(ValueError, match="examples of inputs and a target, got one array"):
            call()


def test_numbers_of_numpy_are_whole_numbers(tmp_path: Path) -> None:
    """Also for `run.json`, for which they are none."""
    model = dp.nn.Linear(2, 1)
    trainer = dp.Trainer(
        model, F.mse_loss, optim.SGD(model.parameters(), lr=0.1), batch_size=np.int64(2), run_dir=tmp_path
    )
    data = ArrayDataset(np.zeros((4, 2), np.float32), np.zeros((4, 1), np.float32))
    assert len(trainer.fit(data, epochs=np.int64(2), steps=np.int64(3))) == 2
    (session,) = json.loads((tmp_path / "run.json").read_text())["sessions"]
    assert (session["batch_size"], session["epochs"], session["steps"]) == (2, 2, 3)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"model": dp.DataParallel(dp.nn.Linear(2, 1))}, "makes a DataParallel of its own; give it the module"),
        ({"model": len}, "needs a Module as its model, got builtin_function_or_method"),
        ({"loss": "mse_loss"}, r"the loss is a function of \(output, target\), such as .*; got 'mse_loss'"),
        ({"optimizer": "sgd"}, "needs an Optimizer, such as .*; got 'sgd'"),
        ({"batch_size": 1.5}, "batch_size is a whole number, got 1.5"),
        ({"accumulate": "2"}, "accumulate is a whole number, got '2'"),
        ({"checkpoint_every": 1.5, "run_dir": "x"}, "checkpoint_every is a whole number, got 1.5"),
        ({"prefetch": "a"}, "prefetch is a whole number, got 'a'"),
        ({"profile": "x", "run_dir": "x"}, "profile is a whole number, got 'x'"),
        ({"clip_norm": "a"}, "Trainer: clip_norm must be a number, got 'a'"),
        ({"callbacks": [print, "log"]}, "a callback is a function of a StepResult; got 'log'"),
    ],
)
def test_what_is_no_part_of_a_trainer_is_refused(what: dict[str, object], message: str) -> None:
    model = dp.nn.Linear(2, 1)
    parts = {"loss": F.mse_loss, "optimizer": optim.SGD(model.parameters(), lr=0.1), "batch_size": 1}
    with pytest.raises(TypeError, match=message):
        dp.Trainer(**({"model": model} | parts | what))


def test_an_empty_run_dir_is_not_the_current_folder() -> None:
    model = dp.nn.Linear(2, 1)
    with pytest.raises(ValueError, match="run_dir is empty"):
        dp.Trainer(model, F.mse_loss, optim.SGD(model.parameters(), lr=0.1), batch_size=1, run_dir="")


EXAMPLES = ArrayDataset(np.zeros((3, 2), np.float32), np.zeros((3, 1), np.float32))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (EXAMPLES.arrays, r"got a tuple; wrap arrays in data\.ArrayDataset\(x, y\)"),
        ([*EXAMPLES.arrays], "got a list; wrap arrays"),
        ({"x": EXAMPLES.x}, "got a dict; wrap arrays"),
        (EXAMPLES.x, "got a ndarray; wrap arrays"),
        (zip(*EXAMPLES.arrays, strict=True), "got a zip; wrap arrays"),
        (dp.data.Loader(EXAMPLES, batch_size=1), "got a Loader; pass its `dataset`"),
    ],
)
def test_what_is_no_dataset_is_refused_with_the_remedy_before_anything_is_trained(what, message):
    model = nn.Linear(2, 1)
    before = model.weight.data.copy()
    trainer = dp.Trainer(model, F.mse_loss, optim.SGD(model.parameters(), lr=0.1), batch_size=1, progress=False)
    for give in (
        lambda: dp.data.Loader(what, batch_size=1),
        lambda: trainer.fit(what, epochs=1),
        lambda: trainer.fit(EXAMPLES, epochs=1, validation=what),
        lambda: trainer.evaluate(what),
    ):
        with pytest.raises(TypeError, match=f"expected a dataset, {message}"):
            give()
    np.testing.assert_array_equal(model.weight.data, before)


def test_batches_loaded_ahead_train_the_same_and_leave_no_thread():
    rng = np.random.default_rng(0)
    images = ArrayDataset(rng.normal(size=(13, 1, 4, 4)).astype(np.float32), rng.integers(0, 2, 13))

    def trained(prefetch):
        manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        options = {"batch_size": 5, "seed": 3, "prefetch": prefetch, "progress": False}
        trainer = dp.Trainer(model, F.cross_entropy, optim.SGD(model.parameters(), lr=0.1), **options)
        trainer.fit(Augmented(images, [RandomShift(1)], seed=3), steps=7)
        return [parameter.data.copy() for parameter in model.parameters()]

    for one, other in zip(trained(0), trained(2), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("distprop-ahead")]


def test_the_trainer_hands_prefetch_to_its_loader(monkeypatch):
    asked = []
    monkeypatch.setattr("distprop.data.loader.ahead", lambda batches, count: asked.append(count) or batches)
    make_trainer(SoloCommunicator(), prefetch=2).fit(classes(10), epochs=1)
    assert asked == [2]


def test_a_number_of_batches_to_load_ahead_is_0_or_more():
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="prefetch must be 0 or more, got -1"):
        dp.Trainer(model, F.mse_loss, optim.SGD(model.parameters(), lr=0.1), batch_size=1, prefetch=-1)


def test_gradients_that_no_optimizer_updates_do_not_add_up_under_clipping(rng):
    x = rng.normal(size=(8, 4))
    data = ArrayDataset(x, 3 * x[:, :2])

    def make():
        manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()

    model, expected = make(), make()
    trained = optim.SGD(model[2].parameters(), lr=0.01)
    dp.Trainer(model, F.mse_loss, trained, batch_size=8, clip_norm=1.0, progress=False).fit(data, steps=10)
    optimizer = optim.SGD(expected[2].parameters(), lr=0.01)
    for _ in range(10):
        expected.zero_grad()
        F.mse_loss(expected(x), 3 * x[:, :2]).backward()
        optim.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
    np.testing.assert_allclose(model[2].weight.data, expected[2].weight.data, rtol=1e-12)


def test_labels_that_are_left_out_without_a_count_of_the_others_are_warned_of_once():
    model, labels = nn.Linear(2, 3), np.array([0, -100, 1, 2])
    examples = ArrayDataset(np.zeros((4, 2), np.float32), labels)
    trainer = dp.Trainer(model, F.cross_entropy, optim.SGD(model.parameters(), lr=0.1), batch_size=2, progress=False)
    with pytest.warns(UserWarning, match=r"labels below 0; .*examples=lambda y: \(y != -100\)\.sum\(\)") as caught:
        trainer.fit(examples, epochs=3)
    assert len(caught) == 1


def test_a_loss_that_is_no_tensor_is_refused():
    model = nn.Linear(2, 1)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    trainer = dp.Trainer(model, lambda output, y: 1.0, optimizer, batch_size=2, progress=False)
    with pytest.raises(TypeError, match="the loss must be a tensor, made of the model's output; got a float"):
        trainer.fit(EXAMPLES, steps=1)
