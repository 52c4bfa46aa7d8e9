"""Synchronised batch norm: any split of the batch, a rank without examples included, makes what one process makes.

The one process is `BatchNorm` over the whole batches, without `DataParallel`.
"""

from collections.abc import Callable

import numpy as np

from distprop import functional as F
from distprop import manual_seed, nn, optim
from distprop.comm import Communicator, SoloCommunicator
from distprop.data import ArrayDataset
from distprop.data.loader import share
from distprop.nn import SyncBatchNorm
from distprop.parallel import DataParallel
from distprop.tensor import Tensor, as_tensor
from distprop.train import Trainer
from scenario import Suite

STEPS = 6
suite = Suite()


class Network(nn.Module):
    """Batch norm over rows and over images, in the middle of the network and right behind its input."""

    def __init__(self, comm: Communicator | None) -> None:
        def norm(*arguments, **options) -> nn.Module:
            if comm is None:
                return (nn.BatchNorm2d if arguments[0] == 3 else nn.BatchNorm1d)(*arguments, **options)
            return SyncBatchNorm(*arguments, **options, comm=comm)

        self.first = norm(6)
        self.second = nn.Linear(6, 12)
        self.third = norm(3, momentum=None)
        self.fourth = nn.Linear(12, 5)
        self.fifth = norm(5, affine=False)
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(as_tensor(x)))
        x = self.third(x.reshape(len(x), 3, 2, 2)).tanh().flatten(1)
        return self.last(self.fifth(self.fourth(x)).tanh())


def make(comm: Communicator | None, seed: int) -> nn.Module:
    manual_seed(seed)
    return Network(comm).double()


def batch(rows: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns with means far from 0 and different spreads."""
    rng = np.random.default_rng((rows, step))
    x = rng.normal(size=(rows, 6)) * [1, 2, 3, 0.1, 1, 1] + [0, 5, -20, 1, 0, 100]
    return x, rng.normal(size=(rows, 2))


def make_optimizer(model: nn.Module) -> optim.Optimizer:
    return optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def even(comm: Communicator, rows: int) -> slice:
    return share(rows, comm.rank, comm.size)


def all_but_the_first(comm: Communicator, rows: int) -> slice:
    """Rank 0 has nothing, unless alone; the others have the more, the higher their number."""
    if comm.size == 1:
        return slice(0, rows)
    bounds = [0, 0, *(rows * r * (r + 1) // (comm.size * (comm.size - 1)) for r in range(1, comm.size))]
    return slice(bounds[comm.rank], bounds[comm.rank + 1])


def in_turn(comm: Communicator, rows: int) -> slice:
    """Everything on the last rank."""
    return slice(0, rows) if comm.rank == comm.size - 1 else slice(0, 0)


def assert_same_model(model: nn.Module, expected: nn.Module, comm: Communicator) -> None:
    for (name, found), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        np.testing.assert_allclose(found, other, rtol=1e-12, atol=1e-12, err_msg=name)
        copies = comm.allgather(np.ascontiguousarray(found).tobytes())
        assert copies.count(copies[0]) == comm.size, f"{name} is to have the same bits on all ranks"


def agrees_with_one_process(comm: Communicator, rows: int, split: Callable[[Communicator, int], slice]) -> None:
    expected, model = make(None, seed=0), make(comm, seed=comm.rank)
    optimizer = make_optimizer(expected)
    for step in range(STEPS):
        x, y = batch(rows, step)
        optimizer.zero_grad()
        F.mse_loss(expected(x), y).backward()
        optimizer.step()
    parallel = DataParallel(model, comm, verify_every=2)
    optimizer = make_optimizer(model)
    for step in range(STEPS):
        x, y = batch(rows, step)
        mine = split(comm, rows)
        optimizer.zero_grad()
        F.mse_loss(parallel(x[mine]), y[mine]).backward()
        optimizer.step()
    assert_same_model(model, expected, comm)
    assert int(model.first.num_batches_tracked) == STEPS
    model.eval()
    expected.eval()
    x, _ = batch(4, 99)
    np.testing.assert_allclose(model(x[: comm.rank + 1]).data, expected(x[: comm.rank + 1]).data, rtol=1e-10)


for split in (even, all_but_the_first, in_turn):
    for rows in (2, 7, 16):
        suite.add(
            f"{split.__name__}-{rows}_rows",
            lambda comm, rows=rows, split=split: agrees_with_one_process(comm, rows, split),
        )


def train(network: nn.Module, comm: Communicator) -> nn.Module:
    optimizer = make_optimizer(network)
    trainer = Trainer(network, F.mse_loss, optimizer, comm=comm, batch_size=5, progress=False)
    trainer.fit(ArrayDataset(*batch(13, 0)), steps=7)
    return network


@suite.scenario()
def the_trainer_makes_what_one_process_makes(comm: Communicator) -> None:
    expected = train(make(None, 0), SoloCommunicator())
    assert_same_model(train(make(comm, comm.rank), comm), expected, comm)


@suite.scenario()
def a_loss_with_a_weight_of_its_own_need_not_come_from_data_parallel(comm: Communicator) -> None:
    """The pass through the model is not seen by `DataParallel`; the rank without examples must join all the same."""
    x, y = batch(9, 0)
    expected, model = make(None, 0), make(comm, 0)
    parallel = DataParallel(model, comm)
    F.mse_loss(expected(x), y).backward()
    mine = in_turn(comm, len(x))
    parallel.backward(F.mse_loss(model(x[mine]), y[mine]), examples=len(x[mine]))
    for (name, ours), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        np.testing.assert_allclose(ours.grad, other.grad, rtol=1e-11, atol=1e-12, err_msg=name)


@suite.scenario(min_size=2)
def whatever_a_rank_without_weight_computes_is_left_out(comm: Communicator) -> None:
    """Rank 0 has rows in the statistics, but counts for nothing, and its loss is infinite."""
    x, y = batch(8, comm.rank)
    model = make(comm, 0)
    parallel = DataParallel(model, comm)
    loss = F.mse_loss(parallel(x), y)
    parallel.backward(loss * np.inf if comm.rank == 0 else loss, examples=0 if comm.rank == 0 else 8)
    for name, parameter in model.named_parameters():
        assert np.isfinite(parameter.grad).all(), name
        assert parameter.grad.any() or "first" in name or name in ("second.bias", "fourth.bias"), name


@suite.scenario()
def a_batch_without_examples_anywhere_changes_nothing(comm: Communicator) -> None:
    model = make(comm, 0)
    before = {name: value.copy() for name, value in model.state_dict().items()}
    parallel = DataParallel(model, comm)
    x, y = batch(0, 0)
    F.mse_loss(parallel(x), y).backward()
    for name, value in model.state_dict().items():
        if "num_batches" not in name:
            np.testing.assert_array_equal(value, before[name], err_msg=name)
    for parameter in model.parameters():
        np.testing.assert_array_equal(parameter.grad, np.zeros(parameter.shape))


@suite.scenario()
def one_value_a_channel_on_all_ranks_together_says_nothing_of_a_variance(comm: Communicator) -> None:
    layer = SyncBatchNorm(3, comm=comm)
    x = np.full((1 if comm.rank == comm.size - 1 else 0, 3), 7, np.float32)
    np.testing.assert_array_equal(layer(x).data, np.zeros(x.shape))
    np.testing.assert_array_equal(layer.running_mean, np.zeros(3))
    np.testing.assert_array_equal(layer.running_var, np.ones(3))


@suite.scenario()
def evaluation_needs_no_other_rank(comm: Communicator) -> None:
    model = make(comm, 0).eval()
    if comm.rank == 0:
        assert model(batch(5, 0)[0]).shape == (5, 2)


@suite.scenario()
def frozen_statistics_need_no_other_rank_in_the_backward_pass(comm: Communicator) -> None:
    """Batch norm in `eval()` is often trained on; a rank without examples has nothing to join then."""
    x, y = batch(7, 0)
    model, expected = make(comm, 0).eval(), make(None, 0).eval()
    mine = all_but_the_first(comm, len(x))
    F.mse_loss(DataParallel(model, comm)(x[mine]), y[mine]).backward()
    F.mse_loss(expected(x), y).backward()
    for (name, ours), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        np.testing.assert_allclose(ours.grad, other.grad, rtol=1e-11, atol=1e-12, err_msg=name)


@suite.scenario()
def float32_is_as_exact_as_its_format(comm: Communicator) -> None:
    """A mean 1,000 standard deviations away from 0; sums of squares would have no correct digit left."""
    x = (np.random.default_rng(0).normal(size=(200, 4)) + 1000).astype(np.float32)
    layer = SyncBatchNorm(4, comm=comm, momentum=1.0)
    found = layer(x[even(comm, 200)]).data
    exact = x.astype(np.float64)
    expected = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + layer.eps)
    np.testing.assert_allclose(found, expected[even(comm, 200)], atol=2e-4)  # 1,000 roundings of 6e-8, and some
    np.testing.assert_allclose(layer.running_var, exact.var(0, ddof=1), rtol=1e-6)
    np.testing.assert_allclose(layer.running_mean, exact.mean(0), rtol=1e-7)
