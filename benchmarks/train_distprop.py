"""A worker of `compare.py`: trains in distprop on the ranks that started it. JSON comes in and goes out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import distprop as dp
from distprop import functional as F
from distprop import optim
from distprop.environment import blas_description
from measure import Product, operands, take_turns, train_mnist
from networks import ADAMW, LR, MOMENTUM, NETWORKS, distprop_model, initial_state


class DistpropTraining:
    """The open loop of the README, with one copy of the parameters for all ranks."""

    def __init__(self, name: str, sharded_update: bool = True) -> None:
        self.network = NETWORKS[name]
        self.model = distprop_model(name)
        shapes = {key: parameter.shape for key, parameter in self.model.named_parameters()}
        self.model.load_state_dict(initial_state(name, shapes))
        if self.network.adamw:
            groups = optim.decay_groups(self.model, ADAMW["weight_decay"])
            self.optimizer = optim.AdamW(groups, lr=ADAMW["lr"], betas=ADAMW["betas"])
        else:
            self.optimizer = optim.SGD(self.model.parameters(), lr=LR, momentum=MOMENTUM)
        self.comm = dp.world()
        self.rank, self.size = self.comm.rank, self.comm.size
        self.parallel = dp.DataParallel(self.model, self.comm, sharded_update=sharded_update)

    def step(self, x: np.ndarray, y: np.ndarray) -> float:
        """One update."""
        loss = F.cross_entropy(self.parallel(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        if self.network.clip_norm:
            optim.clip_grad_norm_(self.model.parameters(), self.network.clip_norm)
        self.optimizer.step()
        return loss.item()

    def convert(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """NumPy arrays as they are."""
        return x, y

    def gather(self, value: float) -> list[float]:
        """The values of all ranks."""
        return [
            float(np.frombuffer(message)[0]) for message in self.comm.allgather(np.array([value], np.float64).tobytes())
        ]

    def count_right(self, x: np.ndarray, y: np.ndarray) -> int:
        """How many of these images are recognised."""
        with dp.no_grad():
            return int((self.model(x).data.argmax(1) == y).sum())


def products(product: Product) -> Callable[[], None]:
    """NumPy's matmul, each result into memory that is there."""
    x, w, g, y, dw, dx = operands(product)
    wt, gt = np.swapaxes(w, -1, -2), np.swapaxes(g, -1, -2)

    def run() -> None:
        np.matmul(x, wt, out=y)
        np.matmul(gt, x, out=dw)
        if product.dx:
            np.matmul(g, w, out=dx)

    return run


def mnist(training: DistpropTraining, epochs: int, seed: int) -> dict[str, Any]:
    """MNIST as `data.load_mnist` gives it."""
    train, test = dp.data.load_mnist(download=False)

    def set_lr(lr: float) -> None:
        for group in training.optimizer.param_groups:
            group["lr"] = lr

    return train_mnist(training, [train.x, train.y, test.x, test.y], set_lr, training.count_right, epochs, seed)


def main() -> None:
    job = json.loads(sys.argv[1])
    training = DistpropTraining(job["network"])
    if "epochs" not in job:
        take_turns(training, job["network"], products, lambda: {"blas": blas_description()})
        return
    answer = mnist(training, job["epochs"], job["seed"])
    if training.rank == 0:
        print(json.dumps(answer))


if __name__ == "__main__":
    main()
