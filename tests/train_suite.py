"""What `Trainer` promises, on any number of ranks."""

import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from distprop import functional as F
from distprop import manual_seed, nn, optim
from distprop.comm import CollectiveError, Communicator
from distprop.data import ArrayDataset
from distprop.data.loader import order, share
from distprop.evaluation import EVALUATION_ROWS
from distprop.metrics import StepResult
from distprop.parallel import NonFiniteGradientError
from distprop.replicas import DivergenceError
from distprop.tensor import Tensor
from distprop.train import Trainer
from distprop.update import NonFiniteLossError
from scenario import Suite

suite = Suite()


def make_model(outputs: int = 3) -> nn.Sequential:
    manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


def classes(length: int, seed: int = 0) -> ArrayDataset:
    """4 inputs, 3 classes."""
    random = np.random.default_rng(seed)
    return ArrayDataset(random.standard_normal((length, 4)), random.integers(0, 3, length))


def make_trainer(comm: Communicator, model: nn.Module | None = None, **options) -> Trainer:
    model = model if model is not None else make_model()
    options = {"batch_size": 4, "progress": False, "loss": F.cross_entropy, "lr": 0.3} | options
    optimizer = optim.SGD(model.parameters(), lr=options.pop("lr"))
    return Trainer(model, options.pop("loss"), optimizer, comm=comm, **options)


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in model.state_dict().items()}


def assert_equal_on_all_ranks(comm: Communicator, value: object) -> None:
    values = [json.loads(message) for message in comm.allgather(json.dumps(value).encode())]
    assert values == [values[0]] * comm.size


def numbers(result: StepResult) -> list[object]:
    """All but the time, which is each rank's own."""
    return [result.step, result.epoch, result.loss, result.metrics, result.examples, result.lr]


@contextmanager
def folder_of_rank_0(comm: Communicator) -> Iterator[Path]:
    """A temporary folder that all ranks know."""
    mine = tempfile.mkdtemp() if comm.rank == 0 else ""
    folder = Path(comm.allgather(mine.encode())[0].decode())
    try:
        yield folder
    finally:
        comm.barrier()
        if comm.rank == 0:
            shutil.rmtree(folder)


# --- a loss that is a mean over something else than rows

WEIGHTS = np.array([0.5, 2.0, 0.25])


def some_ignored(length: int) -> ArrayDataset:
    """The labels of the first half are -100, those of whole batches among them."""
    data = classes(length)
    return ArrayDataset(data.x, np.where(np.arange(length) < length // 2, -100, data.y))


def trained_by_hand(data: ArrayDataset, loss, steps: int, rows: int = 8) -> nn.Module:
    """In one process, each global batch at once."""
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.3)
    indices = np.concatenate([order(0, epoch, len(data), True) for epoch in range(steps)])
    for step in range(steps):
        x, y = data[indices[step * rows : (step + 1) * rows]]
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return model


@suite.scenario()
def the_mean_may_be_over_other_things_than_rows(comm: Communicator) -> None:
    cases = (
        (some_ignored(32), F.cross_entropy, lambda y: (y != -100).sum()),
        (classes(32), lambda o, y: F.cross_entropy(o, y, weight=WEIGHTS), lambda y: WEIGHTS[y].sum()),
    )
    for data, loss, examples in cases:
        expected = trained_by_hand(data, loss, steps=4)
        for options in ({}, {"accumulate": 2}, {"deterministic": True, "shards": 4}):
            trainer = make_trainer(comm, batch_size=8, loss=loss, examples=examples, **options)
            (result,) = trainer.fit(data, epochs=1)
            for name, value in expected.state_dict().items():
                np.testing.assert_allclose(trainer.model.state_dict()[name], value, rtol=1e-12, err_msg=name)
            output, y = trainer.model(data.x).data, data.y
            found = trainer.evaluate(data)
            assert found["loss"] == pytest.approx(loss(Tensor(output), y).item(), rel=1e-12)
            assert found["accuracy"] == (output.argmax(1) == y)[y >= 0].mean()
            assert_equal_on_all_ranks(comm, [result.loss, result.metrics, found])


@suite.scenario()
def a_batch_without_a_label_changes_nothing(comm: Communicator) -> None:
    data = ArrayDataset(classes(8).x, np.full(8, -100))
    trainer = make_trainer(comm, batch_size=4, examples=lambda y: (y != -100).sum())
    before = bits(trainer.model)
    (result,) = trainer.fit(data, epochs=1)
    assert np.isnan(result.loss)
    assert np.isnan(trainer.evaluate(data)["loss"])
    assert bits(trainer.model) == before


# --- evaluate


@suite.scenario()
def evaluation_of_what_is_not_finite_is_not_finite(comm: Communicator) -> None:
    """Also if one block gives ∞ and another −∞."""
    data = ArrayDataset(
        np.where(np.arange(2 * EVALUATION_ROWS) < EVALUATION_ROWS, np.inf, -np.inf)[:, None], np.zeros((1024, 1))
    )
    trainer = make_trainer(comm, model=nn.Sequential(nn.Linear(1, 1, bias=False)).double(), loss=lambda o, y: o.mean())
    with np.errstate(all="ignore"):
        found = trainer.evaluate(data)
    assert not np.isfinite(found["loss"])


@suite.scenario()
def evaluation_is_exact_for_any_split(comm: Communicator) -> None:
    """Sets smaller than the world, not divisible by it, and of several pieces a rank."""
    model = make_model()
    trainer = make_trainer(comm, model)
    for length in (1, 2, 7, 64, 2 * EVALUATION_ROWS + 5):
        dataset = classes(length, seed=length)
        output = model(dataset.x)
        found = trainer.evaluate(dataset)
        assert list(found) == ["loss", "accuracy"]
        np.testing.assert_allclose(found["loss"], F.cross_entropy(output, dataset.y).item(), rtol=1e-12)
        assert found["accuracy"] == (output.data.argmax(1) == dataset.y).sum() / length
        assert_equal_on_all_ranks(comm, found)


@suite.scenario(min_size=2)
def evaluation_of_another_set_on_one_rank_is_refused(comm: Communicator) -> None:
    trainer = make_trainer(comm)
    with pytest.raises(
        CollectiveError, match=r"rank 0: evaluation of 5 examples; ranks? 1.*: evaluation of 7 examples"
    ):
        trainer.evaluate(classes(7 if comm.rank else 5))


@suite.scenario()
def evaluation_has_no_accuracy_where_there_are_no_classes(comm: Communicator) -> None:
    trainer = make_trainer(comm, loss=F.mse_loss)
    found = trainer.evaluate(ArrayDataset(np.ones((2, 4)), np.ones((2, 3))))
    assert list(found) == ["loss"]
    counts = ArrayDataset(np.ones((2, 4)), np.arange(2))  # whole numbers, one for each row, like labels
    trainer.loss, trainer.model.forward = F.mse_loss, lambda x: nn.Sequential.forward(trainer.model, x)[:, 0]
    assert list(trainer.evaluate(counts)) == ["loss"]


class EachPosition(nn.Module):
    """Scores (batch, classes, positions)."""

    def __init__(self) -> None:
        self.inner = make_model(outputs=6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).reshape(-1, 3, 2)


@suite.scenario()
def the_accuracy_of_sequences_is_over_their_positions(comm: Communicator) -> None:
    model = EachPosition()
    dataset = ArrayDataset(classes(5).x, np.arange(10).reshape(5, 2) % 3)
    trainer, expected = make_trainer(comm, model, batch_size=5), (model(dataset.x).data.argmax(1) == dataset.y).mean()
    assert trainer.evaluate(dataset)["accuracy"] == pytest.approx(expected, rel=1e-12)
    (result,) = trainer.fit(dataset, steps=1)
    assert result.metrics["accuracy"] == pytest.approx(expected, rel=1e-12)


@suite.scenario()
def evaluation_restores_each_modules_mode(comm: Communicator) -> None:
    manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9), nn.Dropout(0.9)).double()
    trainer = make_trainer(comm, model)
    model[2].eval()
    without_dropout = F.cross_entropy(model[0](classes(9).x), classes(9).y).item()
    assert trainer.evaluate(classes(9))["loss"] == pytest.approx(without_dropout, rel=1e-12)
    assert [module.training for module in model.modules()] == [True, True, True, False]

    def broken(output: Tensor, target: np.ndarray) -> Tensor:
        raise KeyError("in the loss")

    trainer.loss = broken
    with pytest.raises(KeyError, match="in the loss"):
        trainer.evaluate(classes(comm.size))
    assert [module.training for module in model.modules()] == [True, True, True, False]


@suite.scenario()
def evaluation_keeps_no_graph_and_changes_no_gradient(comm: Communicator) -> None:
    seen = []

    def loss(output: Tensor, target: np.ndarray) -> Tensor:
        seen.append(output.requires_grad)
        return F.cross_entropy(output, target)

    model = make_model()
    trainer = make_trainer(comm, model, loss=loss)
    before = bits(model)
    trainer.evaluate(classes(comm.size))
    assert seen == [False]
    assert bits(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


@suite.scenario()
def an_empty_set_is_refused_before_any_training(comm: Communicator) -> None:
    trainer = make_trainer(comm)
    with pytest.raises(ValueError, match="empty dataset"):
        trainer.evaluate(classes(0))
    with pytest.raises(ValueError, match="empty validation set"):
        trainer.fit(classes(8), epochs=1, validation=classes(0))
    assert trainer.step == 0


# --- fit


@suite.scenario()
def fit_ends_with_the_epochs_or_the_steps_whichever_come_first(comm: Communicator) -> None:
    for epochs, steps, expected_steps, expected_epochs in (
        (2, None, 6, [0, 1]),
        (None, 4, 4, [0, 1]),
        (None, 3, 3, [0]),
        (2, 5, 5, [0, 1]),
        (1, 5, 3, [0]),
        (0, None, 0, []),
        (None, 0, 0, []),
    ):
        trainer = make_trainer(comm)
        results = trainer.fit(classes(10), epochs=epochs, steps=steps)
        assert trainer.step == expected_steps
        assert [result.epoch for result in results] == expected_epochs
        assert_equal_on_all_ranks(comm, [[r.epoch, r.loss, r.metrics, r.validation] for r in results])


@suite.scenario()
def a_second_fit_goes_on_where_the_first_stopped(comm: Communicator) -> None:
    def train(calls: list[dict[str, int]]) -> tuple[dict[str, bytes], list[object]]:
        seen: list[StepResult] = []
        model = make_model()
        trainer = make_trainer(comm, model, callbacks=[seen.append])
        for call in calls:
            trainer.fit(classes(10), **call)
        return bits(model), [numbers(result) for result in seen]

    assert train([{"steps": 2}, {"steps": 5}]) == train([{"steps": 7}])
    assert train([{"epochs": 1}, {"epochs": 2}]) == train([{"epochs": 3}])
    assert train([{"steps": 4}, {"epochs": 1}]) == train([{"epochs": 2}])  # the rest of the second epoch


@suite.scenario()
def every_step_tells_the_mean_over_the_global_batch(comm: Communicator) -> None:
    """The loss and accuracy before the update, whatever the split; the last batch of an epoch is smaller."""
    dataset = classes(10)
    model = make_model()
    expected: list[tuple[float, float, int]] = []
    alone = make_model()
    optimizer = optim.SGD(alone.parameters(), lr=0.3)
    for epoch in range(2):
        indices = order(5, epoch, 10)
        for batch in (indices[:4], indices[4:8], indices[8:]):
            output = alone(dataset.x[batch])
            loss = F.cross_entropy(output, dataset.y[batch])
            expected.append((loss.item(), (output.data.argmax(1) == dataset.y[batch]).mean(), len(batch)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for accumulate in (1, 3):
        seen: list[StepResult] = []
        model = make_model()
        trainer = make_trainer(comm, model, seed=5, accumulate=accumulate, callbacks=[seen.append])
        results = trainer.fit(dataset, epochs=2)
        assert [result.step for result in seen] == [1, 2, 3, 4, 5, 6]
        assert [result.epoch for result in seen] == [0, 0, 0, 1, 1, 1]
        assert [result.examples for result in seen] == [4, 4, 2, 4, 4, 2]
        np.testing.assert_allclose([result.loss for result in seen], [e[0] for e in expected], rtol=1e-12)
        np.testing.assert_allclose([result.metrics["accuracy"] for result in seen], [e[1] for e in expected])
        assert all(result.seconds > 0 and result.lr == 0.3 for result in seen)
        assert_equal_on_all_ranks(comm, [numbers(result) for result in seen])
        for result, part in zip(results, (expected[:3], expected[3:]), strict=True):
            assert result.loss == pytest.approx(sum(e[0] * e[2] for e in part) / 10, rel=1e-12)
            assert result.metrics["accuracy"] == pytest.approx(sum(e[1] * e[2] for e in part) / 10, rel=1e-12)


@suite.scenario()
def the_learning_rate_shown_is_the_one_of_the_step(comm: Communicator) -> None:
    seen: list[StepResult] = []
    make_trainer(comm, lr=lambda step: 0.1 * 0.5**step, callbacks=[seen.append]).fit(classes(10), steps=3)
    np.testing.assert_allclose([result.lr for result in seen], [0.1, 0.05, 0.025], rtol=1e-12)


@suite.scenario()
def a_callback_that_returns_true_stops_all_ranks_at_that_step(comm: Communicator) -> None:
    """Also one that returns it on one rank only, such as a limit on the time."""
    for chosen in range(comm.size):
        calls: list[int] = []

        def stop(result: StepResult, chosen: int = chosen) -> bool:
            return result.step == 5 and comm.rank == chosen

        model = make_model()
        trainer = make_trainer(comm, model, callbacks=[stop, lambda result, calls=calls: calls.append(result.step)])
        results = trainer.fit(classes(10), epochs=9, validation=classes(3))
        assert trainer.step == 5
        assert calls == [1, 2, 3, 4, 5]
        assert [result.epoch for result in results] == [0, 1]
        assert results[-1].validation == trainer.evaluate(classes(3))
    trainer.callbacks.clear()
    trainer.fit(classes(10), epochs=1)
    assert trainer.step == 6  # the last batch of that epoch


@suite.scenario()
def a_callback_that_returns_something_else_than_true_does_not_stop(comm: Communicator) -> None:
    """Such as the number of characters that it has written. NumPy's comparisons do."""
    trainer = make_trainer(comm, callbacks=[lambda result: io.StringIO().write("."), lambda result: 1.0])
    trainer.fit(classes(10), epochs=1)
    assert trainer.step == 3
    trainer.callbacks.append(lambda result: np.float64(result.loss) > 0)
    trainer.fit(classes(10), epochs=1)
    assert trainer.step == 4


@suite.scenario()
def validation_is_evaluated_after_every_epoch(comm: Communicator) -> None:
    model = make_model()
    trainer = make_trainer(comm, model)
    first, second = trainer.fit(classes(10), epochs=2, validation=classes(5, seed=1))
    assert first.validation["loss"] != second.validation["loss"]
    assert second.validation == trainer.evaluate(classes(5, seed=1))
    assert all(module.training for module in model.modules())


@suite.scenario()
def the_gradient_norm_is_clipped_over_all_parameters_and_ranks(comm: Communicator) -> None:
    model = make_model()
    before = {name: array.copy() for name, array in model.state_dict().items()}
    make_trainer(comm, model, lr=1.0, clip_norm=0.01).fit(classes(10), steps=1)
    moved = np.concatenate([(array - before[name]).ravel() for name, array in model.state_dict().items()])
    assert np.linalg.norm(moved) == pytest.approx(0.01, rel=1e-3)
    unclipped, loosely = make_model(), make_model()
    make_trainer(comm, unclipped).fit(classes(10), steps=3)
    make_trainer(comm, loosely, clip_norm=1e6).fit(classes(10), steps=3)
    assert bits(unclipped) == bits(loosely)


@suite.scenario()
def the_seed_names_the_order(comm: Communicator) -> None:
    def train(seed: int) -> dict[str, bytes]:
        model = make_model()
        make_trainer(comm, model, seed=seed).fit(classes(10), steps=2)
        return bits(model)

    assert train(1) == train(1)
    assert train(1) != train(2)


# --- a loss that is not finite


@suite.scenario()
def a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_update(comm: Communicator) -> None:
    """The bad row lies in the share of each rank in turn, in the fifth batch, which is in the second epoch."""
    batch = 2 * comm.size + 1
    for value in (np.nan, np.inf):
        for bad_rank in range(comm.size):
            for accumulate in (1, 2):
                rows = order(0, 1, 3 * batch)[batch : 2 * batch]
                x, y = np.ones((3 * batch, 4)), np.zeros((3 * batch, 3))
                good = y.copy()
                seen: list[StepResult] = []
                model = make_model()
                trainer = make_trainer(
                    comm, model, loss=F.mse_loss, batch_size=batch, accumulate=accumulate, callbacks=[seen.append]
                )
                trainer.fit(ArrayDataset(x, good), steps=4)
                before = bits(model)
                y[rows[share(batch, bad_rank, comm.size)][0]] = value
                message = rf"step 5 \(epoch 2\): the loss is not finite on rank {bad_rank} of {comm.size}; nothing was"
                with np.errstate(all="ignore"), pytest.raises(NonFiniteLossError, match=message):
                    trainer.fit(ArrayDataset(x, y), epochs=5)
                assert bits(model) == before
                assert (trainer.step, trainer.optimizer.steps, len(seen)) == (4, 4, 4)
                trainer.fit(ArrayDataset(x, good), steps=1)  # and nothing bad is left in the gradients
                clean = make_model()
                make_trainer(comm, clean, loss=F.mse_loss, batch_size=batch, accumulate=accumulate).fit(
                    ArrayDataset(x, good), steps=5
                )
                assert bits(model) == bits(clean)


def root_at_zero(output: Tensor, target: np.ndarray) -> Tensor:
    """A loss that is finite; where a target is negative its derivative is 0 times infinity."""
    loss = F.mse_loss(output, np.abs(target))
    return loss + ((output * 0) ** 0.5).sum() if (target < 0).any() else loss


@suite.scenario()
def a_gradient_that_is_not_finite_on_one_rank_stops_all_before_the_update(comm: Communicator) -> None:
    """The loss is finite everywhere. The bad row is in the share of each rank in turn, in the second batch."""
    batch = 2 * comm.size
    for deterministic in (False, True):
        for bad_rank in range(comm.size):
            x, y = np.ones((2 * batch, 4)), np.ones((2 * batch, 3))
            y[order(0, 0, 2 * batch)[batch + share(batch, bad_rank, comm.size).start]] = -1
            model = make_model()
            options = {"deterministic": deterministic, "shards": comm.size, "batch_size": batch}
            trainer = make_trainer(comm, model, loss=root_at_zero, **options)
            trainer.fit(ArrayDataset(x, np.abs(y)), steps=1)
            before = bits(model)
            message = rf"reduction 2: a gradient is not finite on rank {bad_rank}\b.*, parameter 0\.weight first"
            with np.errstate(all="ignore"), pytest.raises(NonFiniteGradientError, match=message) as caught:
                trainer.fit(ArrayDataset(x, y), steps=1)
            assert caught.value.culprits == (bad_rank,)
            assert bits(model) == before
            assert trainer.step == 1
            trainer.fit(ArrayDataset(x, np.abs(y)), steps=1)  # and nothing bad is left in the gradients
            assert all(np.isfinite(array).all() for array in model.state_dict().values())


@suite.scenario()
def large_gradients_whose_squares_are_infinite_are_finite(comm: Communicator) -> None:
    model = make_model()
    trainer = make_trainer(comm, model, loss=lambda output, target: output.sum() * 1e200, lr=1e-200)
    trainer.fit(classes(4), steps=1)
    assert trainer.step == 1


@suite.scenario()
def training_goes_on_after_a_step_that_was_interrupted(comm: Communicator) -> None:
    """In a notebook, by the stop button; nothing of the half step is left, in statistics neither."""

    def train(fails_at: int, **options) -> dict[str, bytes]:
        model = nn.Sequential(make_model(), nn.BatchNorm1d(3).double())
        calls = 0

        def loss(output: Tensor, target: np.ndarray) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise KeyboardInterrupt
            return F.cross_entropy(output, target)

        trainer = make_trainer(comm, model, loss=loss, batch_size=4 * comm.size, **options)
        if fails_at:
            with pytest.raises(KeyboardInterrupt):
                trainer.fit(classes(40), steps=3)
        trainer.fit(classes(40), steps=3 - trainer.step)
        return bits(model)

    for options in ({"deterministic": True, "shards": 2 * comm.size}, {"accumulate": 2}):
        expected = train(0, **options)
        for fails_at in (3, 4):  # one of this rank's two passes in the second step
            assert train(fails_at, **options) == expected


@suite.scenario(min_size=2)
def gradients_that_only_overflow_as_they_are_added_are_refused(comm: Communicator) -> None:
    for options in ({}, {"deterministic": True, "shards": comm.size}):
        model = make_model()
        before = bits(model)
        trainer = make_trainer(
            comm, model, loss=lambda output, target: output[:, 0].sum() * 1e308, batch_size=comm.size, **options
        )
        message = "reduction 1: the sum of all gradients is not finite, though they are"
        with np.errstate(over="ignore"), pytest.raises(NonFiniteGradientError, match=message) as caught:
            trainer.fit(classes(comm.size), steps=1)
        assert caught.value.culprits == ()
        assert bits(model) == before


@suite.scenario(min_size=2)
def no_checkpoint_is_written_of_parameters_that_differ(comm: Communicator) -> None:
    with folder_of_rank_0(comm) as folder:
        model = make_model()

        def change(result: StepResult) -> None:
            if result.step == 6 and comm.rank == comm.size - 1:
                model[2].bias.data[1] += 1e-9

        trainer = make_trainer(comm, model, run_dir=folder, checkpoint_every=2, callbacks=[change])
        with pytest.raises(DivergenceError, match=r"parameter 2\.bias"):
            trainer.fit(classes(40), steps=10)
        trainer._checkpoints.wait()
        if comm.rank == 0:
            assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
                "step-000000002",
                "step-000000004",
            ]


@suite.scenario(min_size=2)
def parameters_that_differ_are_found_at_the_end_of_fit_at_the_latest(comm: Communicator) -> None:
    model = make_model()
    trainer = make_trainer(comm, model)
    trainer.fit(classes(12), steps=2)
    if comm.rank == comm.size - 1:
        model[2].bias.data[1] += 1e-9
    with pytest.raises(DivergenceError, match=r"parameter 2\.bias"):
        trainer.fit(classes(12), steps=1)


@suite.scenario(min_size=2)
def several_ranks_whose_loss_is_not_finite_are_counted(comm: Communicator) -> None:
    model = make_model()
    trainer = make_trainer(comm, model, loss=F.mse_loss, batch_size=3 * comm.size)
    before = bits(model)
    with pytest.raises(NonFiniteLossError, match=rf"not finite on {comm.size} ranks of {comm.size}"):
        trainer.fit(ArrayDataset(np.ones((3 * comm.size, 4)), np.full((3 * comm.size, 3), np.nan)), steps=1)
    assert bits(model) == before


@suite.scenario()
def a_rank_whose_shards_are_all_not_finite_is_one_rank(comm: Communicator) -> None:
    bad_rank, rows = comm.size - 1, order(0, 0, 16)
    y = np.zeros((16, 3))
    y[rows[share(16, bad_rank, comm.size)]] = np.nan
    trainer = make_trainer(comm, make_model(), loss=F.mse_loss, batch_size=16, deterministic=True, shards=16)
    with pytest.raises(NonFiniteLossError, match=f"not finite on rank {bad_rank} of {comm.size}") as caught:
        trainer.fit(ArrayDataset(np.ones((16, 4)), y), steps=1)
    assert caught.value.culprits == (bad_rank,)


# --- arguments


@suite.scenario(min_size=2)
def ranks_that_were_told_different_things_are_refused(comm: Communicator) -> None:
    odd = comm.rank == comm.size - 1
    for options, fit, examples, message in (
        ({"batch_size": 8 + odd}, {"epochs": 1}, 32, f"batch_size: 8 on rank 0, 9 on rank {comm.size - 1}"),
        ({}, {"epochs": 1 + odd}, 32, "epochs: 1 on rank 0, 2 on rank"),
        ({}, {"epochs": 1}, 32 - odd, "examples: 32 on rank 0, 31 on rank"),
        ({"lr": 0.1 + odd}, {"epochs": 1}, 32, "lr: 0.1 on rank 0, 1.1 on rank"),
    ):
        trainer = make_trainer(comm, **options)
        with pytest.raises(ValueError, match=f"the ranks differ in {message}"):
            trainer.fit(classes(examples), **fit)
        assert trainer.step == 0


@suite.scenario()
def arguments_out_of_range_are_refused(comm: Communicator) -> None:
    for options, message in (
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"shards": 0}, "shards must be at least 1, got 0"),
        ({"resume": True}, "need a run_dir"),
        ({"checkpoint_every": 5}, "need a run_dir"),
        ({"checkpoint_every": 0, "run_dir": "never-made"}, "checkpoint_every must be at least 1, got 0"),
        ({"clip_norm": 0}, "clip_norm must be more than 0, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(comm, **options)
    trainer = make_trainer(comm)
    for arguments, message in (
        ({}, "needs epochs or steps"),
        ({"epochs": -1}, "0 or more, got -1 and None"),
        ({"epochs": 1, "steps": -1}, "0 or more, got 1 and -1"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.fit(classes(8), **arguments)
    with pytest.raises(TypeError, match=r"whole numbers, got 1\.5 and None"):
        trainer.fit(classes(8), epochs=1.5)
    with pytest.raises(ValueError, match="the dataset is empty"):
        trainer.fit(classes(0), epochs=1)
    assert trainer.step == 0


@suite.scenario()
def a_loss_that_is_not_one_number_is_refused(comm: Communicator) -> None:
    def each(output: Tensor, target: np.ndarray) -> Tensor:
        return F.cross_entropy(output, target, reduction="none")

    trainer = make_trainer(comm, loss=each, batch_size=2 * comm.size)
    with pytest.raises(ValueError, match=r"one number, the mean over the examples; got shape \(2,\)"):
        trainer.fit(classes(2 * comm.size), epochs=1)


# --- metrics.jsonl


@suite.scenario()
def rank_0_writes_a_line_for_every_step_and_epoch(comm: Communicator) -> None:
    with folder_of_rank_0(comm) as folder:
        run_dir = folder / "runs" / "first"
        seen: list[StepResult] = []
        validation = ArrayDataset(np.full((2, 4), np.nan), np.zeros(2, int))
        trainer = make_trainer(comm, run_dir=str(run_dir), callbacks=[seen.append], health=False)
        results = trainer.fit(classes(10), epochs=2, validation=validation)
        trainer.fit(classes(10), steps=1)
        comm.barrier()
        assert sorted(path.name for path in run_dir.iterdir()) == ["metrics.jsonl", "run.json"]
        text = (run_dir / "metrics.jsonl").read_text()
        lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
        steps = [line for line in lines if "epoch_loss" not in line]
        epochs = [line for line in lines if "epoch_loss" in line]
        assert len(lines) == 7 + 3
        for line, result in zip(steps, seen, strict=True):
            assert line.pop("seconds") >= 0
            assert line == {
                "step": result.step,
                "epoch": result.epoch,
                "loss": result.loss,
                "accuracy": result.metrics["accuracy"],
                "lr": 0.3,
                "examples": result.examples,
            }
        for line in epochs:  # of every rank, by phase
            assert {"forward", "backward", "reduction", "update"} <= line["seconds"].keys()
            assert all(len(of_ranks) == comm.size for of_ranks in line.pop("seconds").values())
        assert lines[3] == {
            "epoch": 0,
            "step": 3,
            "epoch_loss": results[0].loss,
            "accuracy": results[0].metrics["accuracy"],
            "validation_loss": None,  # it was NaN, which JSON cannot say
            "validation_accuracy": results[0].validation["accuracy"],
        }
        assert [line["step"] for line in epochs] == [3, 6, 7]
