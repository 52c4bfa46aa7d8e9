"""Deterministic runs as functions of a communicator, so that threads and MPI run the same ones."""

import hashlib
from collections.abc import Callable

import numpy as np

import distprop as dp
from distprop import functional as F
from distprop import nn, optim


class WithStatistics(nn.Module):
    """A linear layer behind a running mean, as batch norm has one; the mean is part of what must be the same."""

    def __init__(self) -> None:
        self.linear = nn.Linear(16, 24)
        self.register_buffer("running_mean", np.zeros(16, np.float32))
        self.register_buffer("batches", np.array(0))

    def forward(self, x):
        if self.training and len(x):
            self.running_mean[...] = 0.9 * self.running_mean + 0.1 * x.mean(axis=0)
            self.batches += 1
        return self.linear(x - self.running_mean)


def convolutional() -> nn.Module:
    return nn.Sequential(
        Images(), nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(16, 5),
    )  # fmt: skip


class Images(nn.Module):
    def forward(self, x):
        return x.reshape(-1, 1, 4, 4)


def recurrent() -> nn.Module:
    return nn.Sequential(Sequences(), Last(nn.LSTM(4, 8, 2, batch_first=True, dropout=0.2)), nn.Linear(8, 5))


class Sequences(nn.Module):
    def forward(self, x):
        return x.reshape(-1, 4, 4)


class Last(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        self.rnn = rnn

    def forward(self, x):
        return self.rnn(x)[0][:, -1]


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 16, dropout=0.1, batch_first=True)
    return nn.Sequential(Sequences(), layer, nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 5))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 5))


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 5), nn.Dropout(0.1))


def with_statistics() -> nn.Module:
    return nn.Sequential(WithStatistics(), nn.GELU(), nn.Linear(24, 5))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "dropout": with_dropout,
    "statistics": with_statistics,
    "convolutional": convolutional,
    "recurrent": recurrent,
    "transformer": transformer,
}

OPTIMIZERS: dict[str, Callable] = {
    "SGD": lambda model, lr: optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-3),
    "Adam": lambda model, lr: optim.Adam(model.parameters(), lr),
    "AdamW": lambda model, lr: optim.AdamW(optim.decay_groups(model, 0.01), lr),
    "RMSprop": lambda model, lr: optim.RMSprop(model.parameters(), lr, momentum=0.9, centered=True),
    "Adagrad": lambda model, lr: optim.Adagrad(model.parameters(), lr),
    "LARS": lambda model, lr: optim.LARS(optim.decay_groups(model, 0.01, adapt=False), lr),
    "LAMB": lambda model, lr: optim.LAMB(optim.decay_groups(model, 0.01, adapt=False), lr),
}

SETTINGS: dict[str, dict] = {
    "even": {},
    "uneven shards": {"batch_size": 27, "shards": 5},
    "accumulate": {"accumulate": 3},
    "clipped": {"clip_norm": 0.1},
    "fewer rows than shards": {"batch_size": 6, "shards": 8},
}


def fingerprint(comm: dp.comm.Communicator, model_name: str, setting: str, optimizer_name: str = "SGD") -> str:
    """Everything a run leaves behind, as one hash: parameters, buffers, optimizer state, metrics of every step."""
    rng = np.random.default_rng(0)
    dataset = dp.data.ArrayDataset(rng.normal(size=(90, 16)).astype(np.float32), rng.integers(0, 5, 90))
    dp.manual_seed(1)
    model = MODELS[model_name]()
    optimizer = OPTIMIZERS[optimizer_name](model, optim.schedule.cosine(0.05, 12))
    steps = []
    trainer = dp.Trainer(
        model,
        F.cross_entropy,
        optimizer,
        comm=comm,
        deterministic=True,
        progress=False,
        callbacks=[lambda result: steps.append((result.step, result.loss, result.metrics))],
        **{"batch_size": 32, "shards": 8, **SETTINGS[setting]},
    )
    trainer.fit(dataset, epochs=4)
    digest = hashlib.sha256()
    for name, array in model.state_dict().items():
        digest.update(name.encode() + array.tobytes())
    for name, array in optimizer.state_dict()["arrays"].items():
        digest.update(name.encode() + array.tobytes())
    digest.update(repr(steps).encode())
    digest.update(repr(sorted(trainer.evaluate(dataset).items())).encode())
    return digest.hexdigest()
