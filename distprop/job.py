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
from distprop.tape import Array
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
    run_dir = _agree_on_run_dir(config, default_run_dir, resume, comm)
    trainer = task.trainer(  # of what it refuses nothing shall remain
        comm=comm,
        run_dir=run_dir,
        checkpoint_every=config.train.checkpoint_every,
        fingerprint=config.train.fingerprint,
        resume=resume,
        profile=profile,
    )
    _together(comm, lambda: _save(config, run_dir) if comm.rank == 0 else None)
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
        ConfigError: the configuration does not fit the data, or the model no memory.
    """
    if config.train.wire and config.train.deterministic:
        raise ConfigError("train.wire: what is rounded depends on the number of ranks; not with train.deterministic")
    train_set, test_set = load_data(config.data)
    if test_set is not None and test_set.x.shape[1:] != train_set.x.shape[1:]:
        raise ConfigError(
            f"data.test: its examples are of shape {test_set.x.shape[1:]}, those of data.train {train_set.x.shape[1:]}"
        )
    if config.train.loss != "cross_entropy":
        train_set = _with_columns(train_set)
        test_set = _with_columns(test_set) if test_set is not None else None
    manual_seed(config.train.seed)
    outputs = _count_outputs(config.train.loss, train_set.y, test_set.y if test_set is not None else train_set.y)
    try:
        model = build_model(config.model, train_set.x[:1].size, outputs)
    except (MemoryError, ValueError) as error:  # the latter by NumPy, of a shape that no array can have
        raise ConfigError(f"model.hidden: there is no memory for {config.model.hidden}: {error}") from error
    steps_per_epoch = -(-len(train_set) // config.train.batch_size)
    optimizer = build_optimizer(config.optim, model, config.train.epochs * steps_per_epoch)
    return Task(config, train_set, test_set, model, optimizer)


def _with_columns(examples: ArrayDataset) -> ArrayDataset:
    """The same with targets `(examples, 1)` where they are `(examples,)`, since the model's output has two axes."""
    x, y = examples.arrays
    return ArrayDataset(x, y[:, None]) if y.ndim == 1 else examples


def _count_outputs(loss: str, train: Array, test: Array) -> int:
    """How many numbers the network gives for an example; targets that `loss` cannot take are refused."""
    labels = loss == "cross_entropy"
    kinds, what = ("iu", "integer labels") if labels else ("f", "floating-point targets")
    for y in (train, test):
        if y.dtype.kind not in kinds:
            raise ConfigError(f"train.loss: {loss} needs {what}, not {y.dtype}")
    outputs = int(train.max()) + 1 if labels else int(np.prod(train.shape[1:]))
    for key, y in (("data.train", train), ("data.test", test)):
        shape = (len(y),) if labels else (len(y), outputs)
        if y.shape != shape:
            raise ConfigError(f"{key}: {loss} needs {what} of shape {shape}, got {y.shape}")
        if labels and not 0 <= y.min() <= y.max() < outputs:
            raise ConfigError(
                f"{key}: its labels go from {y.min()} to {y.max()}; they are 0 or more, and data.train has the largest"
            )
    return outputs


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
    if config.name == "sgd" and config.nesterov and not config.momentum:
        raise ConfigError("optim.nesterov: it needs optim.momentum, which is 0")
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
    if x.ndim < 2:
        raise ConfigError(f"{path}: x is of shape {x.shape}; expected (examples, features) or more axes")
    return dataset


def _agree_on_run_dir(config: Config, default: Path, resume: bool, comm: Communicator) -> Path:
    """A folder of this run alone; rank 0 chooses it."""
    chosen = _together(comm, lambda: _choose_run_dir(config, default, resume) if comm.rank == 0 else default)
    return Path(allgather_json("a choice of run_dir", comm, str(chosen))[0])


def _together(comm: Communicator, make: Callable[[], T]) -> T:
    """What `make` returns; where it raises a ConfigError on any rank, all raise the first one. Collective."""
    mistake = ""
    try:
        made = make()
    except ConfigError as error:
        mistake = str(error)
    if mistakes := list(filter(None, allgather_json("a look at the configuration", comm, mistake))):
        raise ConfigError(mistakes[0])
    return made


def _choose_run_dir(config: Config, default: Path, resume: bool) -> Path:
    run_dir = Path(config.train.run_dir) if config.train.run_dir is not None else default
    saved = run_dir / "config.toml"
    if resume and (saved.exists() or not resume_forced()):  # a restarted job may not have come so far
        if not saved.exists():
            raise ConfigError(f"train.run_dir: there is no run to resume in {run_dir}; leave --resume out to begin one")
        if different := _differences(load_config(saved), config):
            raise ConfigError(
                f"cannot resume {run_dir} with other settings: {different}; "
                f"to go on as it began: distprop train {saved} --resume"
            )
        return run_dir
    if config.train.run_dir is not None and saved.exists():
        raise ConfigError(f"train.run_dir: {run_dir} holds another run; --resume it, or name a new folder")
    if config.train.run_dir is None and run_dir.exists():
        taken = (run_dir.with_name(f"{run_dir.name}-{number}") for number in itertools.count(2))
        run_dir = next(path for path in taken if not path.exists())
    return run_dir


def _save(config: Config, run_dir: Path) -> None:
    """Write the resolved configuration into the folder of the run, unless it is there."""
    saved = run_dir / "config.toml"
    try:
        if not saved.exists():
            run_dir.mkdir(parents=True, exist_ok=True)
            save_config(config, saved)
    except OSError as error:
        raise ConfigError(f"train.run_dir: cannot write to {run_dir}: {error.strerror}") from error


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
