"""Deterministic runs as functions of a communicator, so that threads and MPI run the same ones.

`CASES` are to have every layer and every optimizer of the package between them; `missing` finds what was forgotten.
"""

import hashlib
import importlib
import json
import pkgutil
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np

import distprop as dp
from distprop import functional as F
from distprop import nn, optim
from distprop.comm import Communicator

ROWS, WIDTH = 52, 17  # an odd width, so that the shards of a batch begin anywhere in a cache line
STEPS = 12
CHECKPOINT_EVERY = 5


class WithStatistics(nn.Module):
    """A linear layer behind a running mean, as batch norm has one; the mean is part of what must be the same."""

    def __init__(self) -> None:
        self.linear = nn.Linear(WIDTH, 24)
        self.register_buffer("running_mean", np.zeros(WIDTH, np.float32))
        self.register_buffer("batches", np.array(0))

    def forward(self, x):
        if self.training and len(x):
            self.running_mean[...] = 0.9 * self.running_mean + 0.1 * x.mean(axis=0)
            self.batches += 1
        return self.linear(x - self.running_mean)


class Images(nn.Module):
    def forward(self, x):
        return x if x.ndim == 4 else x[:, 1:].reshape(-1, 1, 4, 4)


class Sequences(nn.Module):
    def forward(self, x):
        return x[:, 1:].reshape(-1, 4, 4)


class Tokens(nn.Module):
    def forward(self, x):
        return np.minimum(abs(x) * 4, 9).astype(np.int64)


class Recurrent(nn.Module):
    """The outputs of one recurrent network are the inputs of the next; the last step's come out."""

    def __init__(self, *networks: nn.Module) -> None:
        self.networks = nn.ModuleList(networks)

    def forward(self, x):
        for network in self.networks:
            x = network(x)[0]
        return x[:, -1]


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 24), nn.Tanh(), nn.Linear(24, 5))


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 5), nn.Dropout(0.1))


def with_statistics() -> nn.Module:
    return nn.Sequential(WithStatistics(), nn.GELU(), nn.Linear(24, 5))


def activations() -> nn.Module:
    kinds = [nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softmax, nn.LogSoftmax, nn.Identity]
    inner = [layer for kind in kinds for layer in (kind(), nn.Linear(9, 9))]
    return nn.Sequential(nn.Linear(WIDTH, 9), *inner, nn.Linear(9, 5))


def convolutional() -> nn.Module:
    return nn.Sequential(
        Images(), nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(16, 5),
    )  # fmt: skip


def other_convolutions() -> nn.Module:
    return nn.Sequential(
        Sequences(), nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6), nn.Flatten(), nn.Linear(24, WIDTH), Images(),
        nn.ConvTranspose2d(1, 3, 3), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


def recurrent() -> nn.Module:
    networks = Recurrent(
        nn.LSTM(4, 8, 2, batch_first=True, dropout=0.2), nn.GRU(8, 8, batch_first=True), nn.RNN(8, 8, batch_first=True)
    )
    return nn.Sequential(Sequences(), networks, nn.Linear(8, 5))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 16, dropout=0.1, batch_first=True)
    return nn.Sequential(Sequences(), layer, nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 5))


def embedded() -> nn.Module:
    return nn.Sequential(Tokens(), nn.Embedding(10, 6), nn.RMSNorm(6), nn.Flatten(), nn.Linear(6 * WIDTH, 5))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "dropout": with_dropout,
    "statistics": with_statistics,
    "activations": activations,
    "convolutional": convolutional,
    "other convolutions": other_convolutions,
    "recurrent": recurrent,
    "transformer": transformer,
    "embedded": embedded,
}

OPTIMIZERS: dict[str, Callable[[nn.Module, optim.Schedule], optim.Optimizer]] = {
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
    "augmented": {"augmented": True},
}

CASES: list[tuple[str, str, str]] = [  # model, setting, optimizer
    *((model, "even", "SGD") for model in MODELS),
    *(("dropout", setting, "SGD") for setting in ("uneven shards", "accumulate", "clipped", "fewer rows than shards")),
    *(
        (model, setting, "SGD")
        for model in ("statistics", "convolutional")
        for setting in ("uneven shards", "accumulate")
    ),
    *((model, "fewer rows than shards", "SGD") for model in ("convolutional", "recurrent", "transformer")),
    ("convolutional", "augmented", "SGD"),
    *(("dropout", "clipped", optimizer) for optimizer in OPTIMIZERS if optimizer != "SGD"),
]


class Interruption(Exception):  # noqa: N818 - it is no error
    """Ends a run where a failure might."""


def fingerprint(
    comm: Communicator, model_name: str = "dropout", setting: str = "even", optimizer_name: str = "SGD"
) -> str:
    """Everything that a run has in memory at its end and leaves behind on the disk, as one hash, on every rank."""
    with folder_of_rank_0(comm) as folder:
        in_memory = train(comm, folder, model_name, setting, optimizer_name)
        return in_memory + hash_of_files(comm, folder)


def train(
    comm: Communicator,
    folder: Path,
    model_name: str = "dropout",
    setting: str = "even",
    optimizer_name: str = "SGD",
    interrupt_at: int | None = None,
    resume: bool = False,
) -> str:
    """The hash of parameters, buffers, optimizer state, an average of the weights and all results.

    Raises:
        Interruption: on all ranks, after the step `interrupt_at`.
    """
    options = {"batch_size": 32, "shards": 8, **SETTINGS[setting]}
    data = dataset(options.pop("augmented", False))
    dp.manual_seed(1)
    model = MODELS[model_name]()
    plateau = optim.ReduceOnPlateau(0.05, factor=0.7, patience=0)
    optimizer = OPTIMIZERS[optimizer_name](model, plateau)
    average = optim.ExponentialMovingAverage(model.parameters(), 0.8)
    results: list[object] = []

    def callback(result: dp.StepResult) -> None:
        average.update()
        plateau.observe(result.loss)
        results.append((result.step, result.epoch, result.loss, result.metrics, result.examples, result.lr))
        if result.step == interrupt_at:
            raise Interruption

    trainer = dp.Trainer(
        model, F.cross_entropy, optimizer, comm=comm, deterministic=True, progress=False, callbacks=[callback],
        run_dir=folder, checkpoint_every=CHECKPOINT_EVERY, resume=resume, **options,
    )  # fmt: skip
    try:
        results += trainer.fit(data, steps=STEPS, validation=data)
    finally:
        trainer._checkpoints.wait()
    digest = hashlib.sha256(repr(results).encode())
    for arrays in (model.state_dict(), optimizer.state_dict()["arrays"], average.state_dict()["arrays"]):
        for name, array in arrays.items():
            digest.update(name.encode() + array.tobytes())
    return digest.hexdigest()


def hash_of_files(comm: Communicator, folder: Path) -> str:
    """Every file of a run by name, bit for bit, but for the times in its metrics and what says how it was run."""
    digest = hashlib.sha256()
    if comm.rank == 0:
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "run.json")
        assert sum(path.name == "manifest.json" for path in paths) >= 3
        for path in paths:
            content = path.read_bytes()
            if path.name == "metrics.jsonl":
                lines = [json.loads(line) for line in content.splitlines()]
                content = repr([{k: v for k, v in line.items() if k != "seconds"} for line in lines]).encode()
            digest.update(str(path.relative_to(folder)).encode() + content)
    return comm.allgather(digest.hexdigest().encode())[0].decode()


def dataset(augmented: bool = False) -> dp.data.Dataset:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, ROWS)
    if not augmented:
        return dp.data.ArrayDataset(rng.normal(size=(ROWS, WIDTH)).astype(np.float32), labels)
    images = dp.data.ArrayDataset(rng.normal(size=(ROWS, 1, 4, 4)).astype(np.float32), labels)
    crop, flip = dp.data.RandomCrop(4, padding=1), dp.data.RandomHorizontalFlip()
    return dp.data.Augmented(images, [crop, dp.data.RandomShift(1), flip, dp.data.RandomRotation(20)], seed=3)


@contextmanager
def folder_of_rank_0(comm: Communicator) -> Iterator[Path]:
    """A temporary folder that all ranks know; only rank 0 looks into it."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a checkpoint flushes files, 0.2 s a case on a disk
    name = tempfile.mkdtemp(dir=memory) if comm.rank == 0 else ""
    folder = Path(comm.allgather(name.encode())[0].decode())
    try:
        yield folder
        comm.barrier()
    finally:
        if comm.rank == 0:
            shutil.rmtree(folder)


def missing() -> set[str]:
    """The layers and optimizers of the package that no case has."""
    covered: set[type] = {nn.Module, optim.Optimizer, nn.SyncBatchNorm}  # bases, and one that this mode refuses
    for model_name, _, optimizer_name in CASES:
        model = MODELS[model_name]()
        covered |= {type(part) for part in model.modules()} | {
            type(OPTIMIZERS[optimizer_name](model, lambda step: 0.1))
        }
    exist = {*classes(nn, nn.Module), *classes(optim, optim.Optimizer)}
    return {kind.__name__ for kind in exist - covered}


def classes(package: ModuleType, base: type) -> Iterator[type]:
    """Every public class below `base` that a module of the package defines, exported or not."""
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        for name, kind in vars(importlib.import_module(found.name)).items():
            if isinstance(kind, type) and issubclass(kind, base) and not name.startswith("_"):
                yield kind
