"""What an update promises in which each rank of a node updates its slice of parameters that they share."""

import numpy as np
import pytest

from distprop import functional as F
from distprop import manual_seed, nn, optim
from distprop.comm import Communicator
from distprop.data import ArrayDataset
from distprop.data.loader import share
from distprop.parallel import DataParallel
from distprop.train import Trainer
from scenario import Suite

suite = Suite()
STEPS = 4
OPTIMIZERS = {
    "SGD": lambda model: optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda model: optim.AdamW(optim.decay_groups(model, 0.1), lr=0.01, amsgrad=True),
    "RMSprop": lambda model: optim.RMSprop(model.parameters(), lr=0.01, momentum=0.9, centered=True),
    "Adagrad": lambda model: optim.Adagrad(model.parameters(), lr=0.01, initial_accumulator_value=0.1),
    "LARS": lambda model: optim.LARS(model.parameters(), lr=1.0),
    "LAMB": lambda model: optim.LAMB(model.parameters(), lr=0.01),
}


class Training:
    """A network whose parameters are of very different sizes, and an optimizer."""

    def __init__(self, comm: Communicator, optimizer: str, sharded: bool) -> None:
        manual_seed(comm.rank)  # rank 0's values count
        self.model = nn.Sequential(nn.Linear(5, 700), nn.LayerNorm(700), nn.ReLU(), nn.Linear(700, 3))
        self.optimizer = OPTIMIZERS[optimizer](self.model)
        self.parallel = DataParallel(self.model, comm, sharded_update=sharded)
        self.comm, self.data = comm, np.random.default_rng(comm.rank)

    def train(self, steps: int = STEPS) -> "Training":
        for _ in range(steps):
            x = self.data.standard_normal((4, 5)).astype(np.float32)
            loss = F.mse_loss(self.parallel(x), x[:, :3])
            self.optimizer.zero_grad()
            loss.backward()
            optim.clip_grad_norm_(self.model.parameters(), 0.5)
            self.optimizer.step()
        return self

    def arrays(self) -> dict[str, np.ndarray]:
        return {**self.model.state_dict(), **self.optimizer.state_dict()["arrays"]}


def assert_same(one: Training, other: Training) -> None:
    expected, found = one.arrays(), other.arrays()
    assert list(expected) == list(found)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@suite.scenario()
def it_gives_the_bits_of_an_update_by_every_rank(comm: Communicator) -> None:
    for name in OPTIMIZERS:
        whole, sharded = (Training(comm, name, sharded).train() for sharded in (False, True))
        assert_same(whole, sharded)
        sharded.parallel.verify()


@suite.scenario()
def a_rank_writes_its_slice_and_sees_those_of_the_others(comm: Communicator) -> None:
    """What one rank of the node writes, all of its ranks read; and no number is updated by two ranks or by none."""
    training = Training(comm, "SGD", sharded=True).train(1)
    buffer = training.model[0].weight.buffer
    own = [
        tuple(map(int, message.split())) for message in comm.allgather(f"{buffer.own.start} {buffer.own.stop}".encode())
    ]
    if comm.node is None:
        assert own[comm.rank] == (0, buffer.data.size)
        return
    node = comm.node
    first = comm.rank - node.rank
    assert own[first][0] == 0
    assert own[first + node.size - 1][1] == buffer.data.size
    assert all(own[r][1] == own[r + 1][0] for r in range(first, first + node.size - 1))
    node.barrier()
    if node.rank == node.size - 1:
        buffer.data[0] = 42
    node.barrier()
    assert buffer.data[0] == 42


@suite.scenario()
def a_state_that_is_loaded_is_gone_on_with(comm: Communicator) -> None:
    """From a sharded update to one by every rank and back."""
    before = Training(comm, "AdamW", sharded=True).train()
    state, weights = before.optimizer.state_dict(), before.model.state_dict()
    state["arrays"] = {name: array.copy() for name, array in state["arrays"].items()}
    weights = {name: array.copy() for name, array in weights.items()}
    after = []
    for sharded in (False, True):
        training = Training(comm, "AdamW", sharded)
        training.model.load_state_dict(weights)
        training.optimizer.load_state_dict(state)
        after.append(training)
    whole, sharded = (training.train() for training in after)
    assert_same(whole, sharded)


@suite.scenario()
def parameters_may_be_frozen_for_a_while(comm: Communicator) -> None:
    trained = []
    for sharded in (False, True):
        training = Training(comm, "AdamW", sharded).train()
        training.model[0].weight.requires_grad = False
        training.train(2)
        training.model[0].weight.requires_grad = True
        trained.append(training.train(2))
    assert_same(*trained)


@suite.scenario()
def an_average_of_the_weights_is_the_same(comm: Communicator) -> None:
    results = []
    for sharded in (False, True):
        training = Training(comm, "SGD", sharded)
        average = optim.ExponentialMovingAverage(training.model.parameters(), decay=0.9)
        for _ in range(STEPS):
            training.train(1)
            average.update()
        state = {name: array.copy() for name, array in average.state_dict()["arrays"].items()}
        average.load_state_dict({"updates": 3, "arrays": {name: array * 2 for name, array in state.items()}})
        average.update()
        with average.averaged():
            swapped = {name: array.copy() for name, array in training.model.state_dict().items()}
            comm.barrier()
        results.append((training, state, swapped))
    assert_same(results[0][0], results[1][0])
    for part in (1, 2):
        for name, array in results[0][part].items():
            np.testing.assert_array_equal(results[1][part][name], array)


@suite.scenario()
def a_model_that_changes_its_dtype_is_shared_again(comm: Communicator) -> None:
    trained = []
    for sharded in (False, True):
        training = Training(comm, "AdamW", sharded).train(1)
        training.model.double()
        training.model.float()
        trained.append(training.train(2))
        assert (training.model[0].weight.buffer.sharers is not None) == (sharded and comm.node is not None)
    assert_same(*trained)


@suite.scenario()
def it_goes_with_deterministic_shards(comm: Communicator) -> None:
    results = []
    for sharded in (False, True):
        manual_seed(0)
        model = nn.Linear(40, 30)
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        parallel = DataParallel(model, comm, shards=4, sharded_update=sharded)
        x = np.random.default_rng(1).standard_normal((4, 40)).astype(np.float32)
        for _ in range(3):
            optimizer.zero_grad()
            mine = share(4, comm.rank, comm.size)
            for row in x[mine]:
                F.mse_loss(parallel(row[None]), row[None, :30]).backward()
                parallel.end_shard()
            parallel.reduce_shards()
            optimizer.step()
        results.append(model.state_dict())
    for name, array in results[0].items():
        np.testing.assert_array_equal(results[1][name], array)


@suite.scenario()
def the_trainer_does_it_too(comm: Communicator) -> None:
    results = []
    for sharded in (False, True):
        manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 200), nn.Tanh(), nn.Linear(200, 6))
        optimizer = optim.Adam(model.parameters(), lr=0.01)
        options = {"comm": comm, "batch_size": 8, "health": 1, "clip_norm": 1.0, "progress": False}
        trainer = Trainer(model, F.mse_loss, optimizer, sharded_update=sharded, **options)
        assert (model[0].weight.buffer.sharers is not None) == (sharded and comm.node is not None)
        x = np.random.default_rng(2).standard_normal((21, 6)).astype(np.float32)
        looked = []
        trainer.callbacks = [lambda result, looked=looked: looked.append(result.loss)]
        trainer.fit(ArrayDataset(x, x), epochs=2, validation=ArrayDataset(x, x))
        results.append((trainer.evaluate(ArrayDataset(x, x)), looked, model.state_dict()))
    (loss, losses, whole), (sharded_loss, sharded_losses, sharded) = results
    assert (loss, losses) == (sharded_loss, sharded_losses)
    assert len(losses) == 6
    for name, array in whole.items():
        np.testing.assert_array_equal(sharded[name], array)


@suite.scenario()
def without_shared_memory_every_rank_updates_all(comm: Communicator) -> None:
    if comm.node is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm.node, "allocate_common", lambda length, dtype: None)
        training = Training(comm, "SGD", sharded=True).train()
    assert training.model[0].weight.buffer.own == slice(0, training.model[0].weight.buffer.data.size)
    assert_same(Training(comm, "SGD", sharded=False).train(), training)
    training = Training(comm, "SGD", sharded=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm.node, "allocate_common", lambda length, dtype: None)
        with pytest.raises(MemoryError, match="no 30,812 bytes of shared memory"):
            training.train()
