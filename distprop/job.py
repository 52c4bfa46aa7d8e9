"""From a configuration to a trained model: what `distprop train CONFIG.toml` does on every rank."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from distprop import functional as F
from distprop import nn, optim
from distprop.comm import Communicator, world
from distprop.comm.base import allgather_json
from distprop.config import Config, ConfigError, Data, Model, Optim, load_config, save_config
from distprop.data import ArrayDataset, load_digits, load_mnist
from distprop.metrics import EpochResult
from distprop.optim import schedule
from distprop.random import manual_seed
from distprop.stopping import resume_forced
from distprop.train import Trainer

T = TypeVar("T")

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}


def train_from_config(
    config: Config,
    default_run_dir: Path,
    resume: bool = False,
    comm: Communicator | None = None,
    profile: bool = False,
) -> list[EpochResult]:
    """Load the data, build the model and train it; the resolved configuration is saved beside the metrics.

    With `resume`, and in a job that was restarted, the run in `train.run_dir`, or in `default_run_dir`, goes on from
    its newest checkpoint.

    Raises:
        ConfigError: on all ranks; the configuration does not fit the data, or `run_dir` holds another run.
    """
    comm = comm if comm is not None else world()
    resume = resume or resume_forced()
    task = _together(comm, lambda: prepare(config))
    run_dir = _prepare_run_dir(config, default_run_dir, resume, comm)
    trainer = task.trainer(
        comm=comm,
        run_dir=run_dir,
        checkpoint_every=config.train.checkpoint_every,
        fingerprint=config.train.fingerprint,
        resume=resume,
        profile=profile,
    )
    results = trainer.fit(task.train_set, epochs=config.train.epochs, validation=task.test_set)
    if comm.rank == 0:
        reached = results[-1].validation if results else {}
        accuracy = f"; {reached['accuracy']:.2%} of the validation set are right" if "accuracy" in reached else ""
        print(f"results in {run_dir}{accuracy}")
    return results


@dataclass(frozen=True)
class Task:
    """What a configuration describes: the examples, and a model with its optimizer before the first step."""

    config: Config
    train_set: ArrayDataset
    test_set: ArrayDataset | None
    model: nn.Sequential
    optimizer: optim.Optimizer

    def trainer(self, **options: Any) -> Trainer:
        """The trainer; `options` are those that say where it runs and what it leaves behind."""
        train = self.config.train
        return Trainer(
            self.model,
            getattr(F, train.loss),
            self.optimizer,
            batch_size=train.batch_size,
            seed=train.seed,
            deterministic=train.deterministic,
            shards=train.shards,
            wire=train.wire,
            sharded_update=train.sharded_update,
            accumulate=train.accumulate,
            prefetch=train.prefetch,
            clip_norm=train.clip_norm,
            health=train.health,
            **options,
        )


def prepare(config: Config) -> Task:
    """Load the data and build the model.

    Raises:
        ConfigError: the configuration does not fit the data.
    """
    train_set, test_set = load_data(config.data)
    if test_set is not None and test_set.x.shape[1:] != train_set.x.shape[1:]:
        raise ConfigError(
            f"data.test: its examples are of shape {test_set.x.shape[1:]}, those of data.train {train_set.x.shape[1:]}"
        )
    manual_seed(config.train.seed)
    regression = config.train.loss != "cross_entropy"
    if regression and train_set.y.dtype.kind != "f":
        raise ConfigError(f"train.loss: {config.train.loss} needs floating-point targets, not {train_set.y.dtype}")
    if not regression and train_set.y.dtype.kind not in "iu":
        raise ConfigError(f"train.loss: cross_entropy needs integer labels, not {train_set.y.dtype}")
    outputs = int(np.prod(train_set.y.shape[1:])) if regression else int(train_set.y.max()) + 1
    model = build_model(config.model, train_set.x[:1].size, outputs)
    steps_per_epoch = -(-len(train_set) // config.train.batch_size)
    optimizer = build_optimizer(config.optim, model, config.train.epochs * steps_per_epoch)
    return Task(config, train_set, test_set, model, optimizer)


def load_data(data: Data) -> tuple[ArrayDataset, ArrayDataset | None]:
    """The training set and the validation set, if there is one."""
    if data.name == "digits":
        return load_digits()
    if data.name == "mnist":
        return load_mnist(data.root)
    if data.train is None:
        raise ConfigError("data.train: name a .npz file with arrays x and y")
    return _load_npz(Path(data.train)), _load_npz(Path(data.test)) if data.test else None


def build_model(model: Model, inputs: int, outputs: int) -> nn.Sequential:
    """The fully connected network that the configuration describes."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in model.hidden:
        layers += [nn.Linear(inputs, width), _ACTIVATIONS[model.activation]()]
        if model.dropout:
            layers.append(nn.Dropout(model.dropout))
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def build_optimizer(config: Optim, model: nn.Module, steps: int) -> optim.Optimizer:
    """The optimizer with its schedule over `steps`."""
    lr: optim.Schedule | float = config.lr
    if config.schedule == "cosine":
        lr = schedule.cosine(config.lr, max(1, steps - config.warmup_steps))
    if config.warmup_steps:
        lr = schedule.warmup(lr, config.warmup_steps)
    groups = optim.decay_groups(model, config.weight_decay)
    betas = (config.beta1, config.beta2)
    makers: dict[str, Callable[[], optim.Optimizer]] = {
        "sgd": lambda: optim.SGD(groups, lr, config.momentum, nesterov=config.nesterov),
        "adam": lambda: optim.Adam(groups, lr, betas),
        "adamw": lambda: optim.AdamW(groups, lr, betas),
        "rmsprop": lambda: optim.RMSprop(groups, lr),
        "adagrad": lambda: optim.Adagrad(groups, lr),
        "lars": lambda: optim.LARS(optim.decay_groups(model, config.weight_decay, adapt=False), lr, config.momentum),
        "lamb": lambda: optim.LAMB(optim.decay_groups(model, config.weight_decay, adapt=False), lr, betas),
    }
    return makers[config.name]()


def _load_npz(path: Path) -> ArrayDataset:
    from distprop.data.npz import read_npz

    try:
        x, y = read_npz(path, ["x", "y"]).values()
        dataset = ArrayDataset(x.astype(np.float32), y.astype(np.float32) if y.dtype.kind == "f" else y)
    except ValueError as error:
        raise ConfigError(f"{path} is not a .npz file with arrays x and y: {error}") from error
    if not len(dataset):
        raise ConfigError(f"{path} has no examples")
    return dataset


def _prepare_run_dir(config: Config, default: Path, resume: bool, comm: Communicator) -> Path:
    """A folder of this run alone, with the resolved configuration in it; rank 0 chooses it."""
    chosen = _together(comm, lambda: _choose_run_dir(config, default, resume) if comm.rank == 0 else default)
    return Path(allgather_json(comm, str(chosen))[0])


def _together(comm: Communicator, make: Callable[[], T]) -> T:
    """What `make` returns; where it raises a ConfigError on any rank, all raise the first one. Collective."""
    mistake = ""
    try:
        made = make()
    except ConfigError as error:
        mistake = str(error)
    if mistakes := list(filter(None, allgather_json(comm, mistake))):
        raise ConfigError(mistakes[0])
    return made


def _choose_run_dir(config: Config, default: Path, resume: bool) -> Path:
    run_dir = Path(config.train.run_dir) if config.train.run_dir is not None else default
    saved = run_dir / "config.toml"
    if resume and (saved.exists() or not resume_forced()):  # a restarted job may not have come so far
        if not saved.exists():
            raise ConfigError(f"train.run_dir: there is no run to resume in {run_dir}")
        if different := _differences(load_config(saved), config):
            raise ConfigError(f"cannot resume {run_dir} with other settings: {different}")
        return run_dir
    if config.train.run_dir is not None and saved.exists():
        raise ConfigError(f"train.run_dir: {run_dir} holds another run; --resume it, or name a new folder")
    if config.train.run_dir is None and run_dir.exists():
        taken = (run_dir.with_name(f"{run_dir.name}-{number}") for number in itertools.count(2))
        run_dir = next(path for path in taken if not path.exists())
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / "config.toml")
    except OSError as error:
        raise ConfigError(f"train.run_dir: cannot write to {run_dir}: {error.strerror}") from error
    return run_dir


def _differences(saved: Config, wanted: Config) -> str:
    """The keys whose values differ, each with both values."""
    pairs = zip(_flat(saved).items(), _flat(wanted).values(), strict=True)
    return ", ".join(f"{key} is {there} there and {here} here" for (key, there), here in pairs if there != here)


def _flat(config: Config) -> dict[str, object]:
    return {
        f"{section}.{key}": value
        for section in config.__struct_fields__
        for key, value in msgspec.structs.asdict(getattr(config, section)).items()
    }
