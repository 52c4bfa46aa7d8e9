"""What health says on several ranks: the sums of what each rank saw, without a message of their own."""

import math

import numpy as np

import distprop as dp
from distprop import data, nn, optim
from distprop import functional as F
from distprop.comm import Communicator, SoloCommunicator
from distprop.data.loader import share
from distprop.health import noise_estimates
from distprop.train import Trainer
from scenario import Suite

suite = Suite()
STEPS, ROWS = 4, 20


def dataset() -> data.ArrayDataset:
    rng = np.random.default_rng(0)
    return data.ArrayDataset(rng.normal(size=(ROWS, 6)).astype(np.float32), rng.integers(0, 3, ROWS))


def network() -> nn.Sequential:
    dp.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 300), nn.ReLU(), nn.Linear(300, 5), nn.Sigmoid(), nn.Linear(5, 3))


def trained(comm: Communicator, **options: object) -> Trainer:
    model = network()
    trainer = Trainer(
        model, F.cross_entropy, optim.SGD(model.parameters(), lr=0.5), comm=comm, batch_size=ROWS, progress=False,
        **{"health": 1, **options},
    )  # fmt: skip
    trainer.fit(dataset(), steps=STEPS)
    return trainer


def looks(trainer: Trainer) -> list[dict[str, object]]:
    """The lines of all looks without the times, which a clock says."""
    return [{k: v for k, v in look.line().items() if k != "seconds"} for look in trainer._diagnosis.history.looks]


@suite.scenario()
def the_number_of_ranks_changes_no_norm_no_unit_and_no_class(comm: Communicator) -> None:
    found, expected = looks(trained(comm)), looks(trained(SoloCommunicator()))
    for one, other in zip(found, expected, strict=True):
        assert one["units"]["1"] == other["units"]["1"]
        assert one["favourite"] == other["favourite"]
        for name, numbers in other["health"].items():
            for key, value in numbers.items():
                assert math.isclose(one["health"][name][key], value, rel_tol=2e-4), (name, key)


@suite.scenario()
def in_deterministic_mode_every_number_is_the_same_to_the_last_bit(comm: Communicator) -> None:
    found = looks(trained(comm, deterministic=True))
    assert found == looks(trained(SoloCommunicator(), deterministic=True))
    assert found[0]["units"]["1"]["dead"] >= 0
    assert trained(comm, deterministic=True)._diagnosis.history.looks[0].noise is not None  # of the shards


@suite.scenario()
def looking_changes_no_bit_of_the_training(comm: Communicator) -> None:
    for deterministic in (False, True):
        with_looks = trained(comm, deterministic=deterministic).model.state_dict()
        without = trained(comm, deterministic=deterministic, health=False).model.state_dict()
        for name, array in with_looks.items():
            assert array.tobytes() == without[name].tobytes(), name


@suite.scenario(min_size=2)
def the_noise_is_that_of_the_ranks_own_gradients(comm: Communicator) -> None:
    look = trained(comm)._diagnosis.history.looks[0]
    ((x, y),) = data.Loader(dataset(), batch_size=ROWS, comm=SoloCommunicator(), seed=0)

    def gradient(rows: slice) -> np.ndarray:
        model = network()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        return np.concatenate([parameter.grad.reshape(-1).astype(np.float64) for parameter in model.parameters()])

    shares = [share(ROWS, rank, comm.size) for rank in range(comm.size)]
    weighed = sum((rows.stop - rows.start) * (gradient(rows) ** 2).sum() for rows in shares)
    whole = (gradient(slice(0, ROWS)) ** 2).sum()
    variance, square = noise_estimates(weighed / ROWS, ROWS / comm.size, whole, ROWS)
    assert look.noise is not None
    assert math.isclose(look.noise[0], variance, rel_tol=1e-3)
    assert math.isclose(look.noise[1], square, rel_tol=1e-3, abs_tol=1e-3 * whole)
    assert len(look.compute_seconds) == comm.size
    assert all(0 < seconds < 20 for seconds in look.compute_seconds)


@suite.scenario(min_size=2)
def equal_shares_have_no_noise(comm: Communicator) -> None:
    """Every rank has the same rows, so its gradient is the mean of all."""
    model = network()
    row = np.ones((8 * comm.size, 6), np.float32)
    same = data.ArrayDataset(row, np.zeros(len(row), np.int64))
    trainer = Trainer(
        model, F.cross_entropy, optim.SGD(model.parameters(), lr=0.1), comm=comm, batch_size=len(row), progress=False
    )
    trainer.fit(same, steps=1)
    (look,) = trainer._diagnosis.history.looks
    variance, square = look.noise
    norms = sum(of_one.grad_norm**2 for of_one in look.parameters.values())
    assert math.isclose(square, norms, rel_tol=1e-4)
    assert abs(variance) < 1e-4 * norms * len(row)
