"""From a configuration to a trained model: what `distprop train CONFIG.toml` does on every rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distprop import functional as F
from distprop import nn, optim
from distprop.comm import Communicator, world
from distprop.config import Config, ConfigError, Data, Model, Optim, save_config
from distprop.data import ArrayDataset, load_digits, load_mnist
from distprop.optim import schedule
from distprop.random import manual_seed
from distprop.train import EpochResult, Trainer

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}


def train_from_config(config: Config, default_run_dir: Path, comm: Communicator | None = None) -> list[EpochResult]:
    """Load the data, build the model and train it; the resolved configuration is saved beside the metrics.

    Raises:
        ConfigError: the configuration does not fit the data, or `run_dir` holds another run.
    """
    comm = comm if comm is not None else world()
    train_set, test_set = load_data(config.data)
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
    run_dir = _prepare_run_dir(config, default_run_dir) if comm.rank == 0 else None
    trainer = Trainer(
        model,
        getattr(F, config.train.loss),
        optimizer,
        comm=comm,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        accumulate=config.train.accumulate,
        clip_norm=config.train.clip_norm,
        run_dir=run_dir,
    )
    results = trainer.fit(train_set, epochs=config.train.epochs, validation=test_set)
    if run_dir is not None:
        print(f"results in {run_dir}")
    return results


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
    return optim.SGD(model.parameters(), lr, config.momentum, config.dampening, config.weight_decay, config.nesterov)


def _load_npz(path: Path) -> ArrayDataset:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            x, y = arrays["x"], arrays["y"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} is not a .npz file with arrays x and y: {error}") from error
    return ArrayDataset(x.astype(np.float32), y.astype(np.float32) if y.dtype.kind == "f" else y)


def _prepare_run_dir(config: Config, default: Path) -> Path:
    """A folder of this run alone, with the resolved configuration in it; an earlier run is never written over."""
    if config.train.run_dir is not None:
        run_dir = Path(config.train.run_dir)
        if (run_dir / "config.toml").exists():
            raise ConfigError(f"train.run_dir: {run_dir} holds another run; name a new folder or move that one away")
    else:
        taken = (default.with_name(f"{default.name}-{number}") for number in range(2, 100_000))
        run_dir = next(path for path in (default, *taken) if not path.exists()) if default.exists() else default
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, run_dir / "config.toml")
    return run_dir
