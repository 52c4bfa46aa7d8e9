"""The split does not matter: N ranks make the parameters that one process makes, to 1e-12 in float64.

The one process is plain autograd over the whole batches, without `DataParallel`; every case runs through the `Trainer`
and through the open loop.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np

from distprop import functional as F
from distprop import manual_seed, nn, optim
from distprop.comm import Communicator
from distprop.data import ArrayDataset, Loader
from distprop.data.loader import share
from distprop.parallel import DataParallel
from distprop.tensor import Operand, Parameter, Tensor, as_tensor
from distprop.train import Trainer
from scenario import Suite

STEPS = 20
SEED = 3


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 9), nn.Dropout(0.3), nn.Tanh(), nn.Linear(9, 9), nn.Dropout(0.5), nn.Linear(9, 3))


class PartlyUnused(nn.Module):
    """Parameters before and after the used ones that no gradient ever reaches."""

    def __init__(self) -> None:
        self.before = nn.Linear(5, 3)
        self.used = perceptron()
        self.after = Parameter(np.full(4, 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class UsedTwice(nn.Module):
    """One weight in two layers, and another twice in one operation."""

    def __init__(self) -> None:
        self.weight = Parameter(np.random.default_rng(1).standard_normal((5, 5)) / 3)
        self.square = Parameter(np.linspace(0.5, 1, 5))
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(F.linear(x, self.weight).tanh(), self.weight)
        return self.last(hidden * (self.square * self.square))


class Experts(nn.Module):
    """Each row goes through one of two layers, so which parameters a rank has a gradient for depends on its rows."""

    def __init__(self) -> None:
        self.first, self.second = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = as_tensor(x)
        goes_first = x.data[:, :1] > 0
        output = Tensor(np.zeros((len(x), 3)))
        if goes_first.any() or not len(x):
            output = output + self.first(x) * goes_first.astype(float)
        if not goes_first.all():
            output = output + self.second(x) * (~goes_first).astype(float)
        return output


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(16, 3)
    )


class Encoder(nn.Module):
    """Embedded numbers, attention of each sequence to itself, and the mean over the steps."""

    def __init__(self) -> None:
        self.embedding = nn.Embedding(7, 6)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.2, batch_first=True)
        self.last = nn.Linear(6, 3)

    def forward(self, numbers: Operand) -> Tensor:
        return self.last(self.layer(self.embedding(numbers), is_causal=True).mean(dim=1))


def partly_frozen() -> nn.Module:
    model = perceptron()
    model[0].requires_grad_(False)
    return model


def vectors(random: np.random.Generator, rows: int) -> np.ndarray:
    return random.standard_normal((rows, 5))


def images(random: np.random.Generator, rows: int) -> np.ndarray:
    return random.standard_normal((rows, 2, 6, 6))


def sequences(random: np.random.Generator, rows: int) -> np.ndarray:
    return random.integers(0, 7, (rows, 4))


@dataclass
class Case:
    """A model, and how its data are cut. `batch_size` is global, the last batch of an epoch is smaller."""

    model: Callable[[], nn.Module] = perceptron
    rows: int = 23
    batch_size: int = 7
    accumulate: int = 1
    ignore: tuple[str, ...] = ()
    inputs: Callable[[np.random.Generator, int], np.ndarray] = vectors

    def build(self, seed: int) -> nn.Module:
        """The model in float64."""
        manual_seed(seed)
        return self.model().double()

    def data(self) -> ArrayDataset:
        """Regression with 3 targets."""
        random = np.random.default_rng(self.rows)
        return ArrayDataset(self.inputs(random, self.rows), random.standard_normal((self.rows, 3)))


NO_GRADIENT = ("no gradient reached",)
CASES = {
    "one_whole_batch": Case(batch_size=23),
    "uneven_shards": Case(),
    "a_rank_without_examples": Case(rows=8, batch_size=4),
    "one_example_a_batch": Case(rows=5, batch_size=1),
    "two_examples_a_batch": Case(rows=9, batch_size=2),
    "a_parameter_without_gradient": Case(PartlyUnused, ignore=NO_GRADIENT),
    "a_parameter_used_twice": Case(UsedTwice),
    "gradients_on_some_ranks_only": Case(Experts, ignore=NO_GRADIENT),
    "a_frozen_layer": Case(partly_frozen),
    "accumulation": Case(batch_size=11, accumulate=3),
    "accumulation_of_more_pieces_than_rows": Case(batch_size=4, accumulate=6),
    "accumulation_with_experts": Case(Experts, accumulate=2, ignore=NO_GRADIENT),
    "dropout": Case(with_dropout),
    "convolution": Case(convolutional, inputs=images),
    "attention": Case(Encoder, inputs=sequences),
}


def train_plainly(case: Case, model: nn.Module) -> None:
    """One process, whole batches, no `DataParallel`."""
    optimizer = make_optimizer(model)
    loader = Loader(case.data(), batch_size=case.batch_size, seed=SEED)
    for _ in range(-(-STEPS // len(loader))):
        for x, y in loader:
            if optimizer.steps < STEPS:
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()


def train_in_a_loop(case: Case, model: nn.Module, comm: Communicator) -> None:
    """The open loop; with accumulation, each rank cuts its share into pieces of its own."""
    parallel = DataParallel(model, comm, verify_every=7)
    optimizer = make_optimizer(model)
    loader = Loader(case.data(), batch_size=case.batch_size, comm=comm, seed=SEED)
    for _ in range(-(-STEPS // len(loader))):
        for x, y in loader:
            if optimizer.steps < STEPS:
                optimizer.zero_grad()
                for number in range(case.accumulate):
                    piece = share(len(y), number, case.accumulate)
                    last = number == case.accumulate - 1
                    with nullcontext() if last else parallel.no_sync():
                        (F.mse_loss(parallel(x[piece]), y[piece]) / case.accumulate).backward()
                optimizer.step()


def train_with_the_trainer(case: Case, model: nn.Module, comm: Communicator) -> None:
    trainer = Trainer(
        model,
        F.mse_loss,
        make_optimizer(model),
        comm=comm,
        batch_size=case.batch_size,
        seed=SEED,
        accumulate=case.accumulate,
        progress=False,
    )
    trainer.fit(case.data(), steps=STEPS)
    assert trainer.step == STEPS


def make_optimizer(model: nn.Module) -> optim.Optimizer:
    return optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def agrees_with_one_process(
    comm: Communicator, case: Case, train: Callable[[Case, nn.Module, Communicator], None]
) -> None:
    """Each rank starts from weights of its own; those of rank 0 are the ones that count."""
    expected, start = case.build(seed=0), case.build(seed=0)
    train_plainly(case, expected)
    model = case.build(seed=comm.rank)
    train(case, model, comm)
    for (name, parameter), other, first in zip(
        model.named_parameters(), expected.parameters(), start.parameters(), strict=True
    ):
        np.testing.assert_allclose(parameter.data, other.data, rtol=1e-12, atol=1e-12, err_msg=name)
        assert parameter.requires_grad != np.array_equal(parameter.data, first.data), f"{name} is to move if trained"
        copies = comm.allgather(parameter.data.tobytes())
        assert copies.count(copies[0]) == comm.size, f"{name} is to have the same bits on all ranks"


suite = Suite()
for name, case in CASES.items():
    for train in (train_in_a_loop, train_with_the_trainer):
        suite.add(f"{name}-{train.__name__}", partial(agrees_with_one_process, case=case, train=train), 1, case.ignore)
suite.add(
    "dropout_and_accumulation-train_with_the_trainer",  # which tells the pieces where in the batch they begin
    partial(agrees_with_one_process, case=Case(with_dropout, accumulate=3), train=train_with_the_trainer),
)
