"""Vanishing and exploding gradients, seen and cured.

    python examples/vanishing.py
    distprop run -n 2 examples/vanishing.py

The table of chapter 5 of Nielsen's "Neural Networks and Deep Learning": the learning speed of each hidden layer of 30
sigmoid units, the norm of its mean bias gradient over 1,000 MNIST images, before any training. Then what each remedy
does to it, and the same for a recurrent network, whose gradients explode through time.
"""

import argparse
import math
from collections.abc import Callable

import numpy as np

import distprop as dp
from distprop import data, nn, optim
from distprop import functional as F

WIDTH = 30


class Residual(nn.Module):
    """x + f(x): the gradient has a path with factor 1."""

    def __init__(self, inner: nn.Module) -> None:
        self.inner = inner

    def forward(self, x: dp.Tensor) -> dp.Tensor:
        return x + self.inner(x)


def network(
    hidden: int,
    activation: Callable[[], nn.Module] = nn.Sigmoid,
    init: Callable[[nn.Parameter], object] | None = None,
    normalise: bool = False,
    residual: bool = False,
) -> nn.Sequential:
    """[784, 30, ..., 30, 10]. Without `init` weights are normal with variance 1/fan_in and biases N(0, 1), Nielsen's."""
    layers: list[nn.Module] = []
    for number in range(hidden):
        linear = nn.Linear(784 if number == 0 else WIDTH, WIDTH)
        block = nn.Sequential(linear, *([nn.LayerNorm(WIDTH)] if normalise else []), activation())
        layers.append(Residual(block) if residual and number else block)
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    for linear in (module for module in model.modules() if isinstance(module, nn.Linear)):
        if init is None:
            nn.init.normal_(linear.weight, std=1 / math.sqrt(linear.in_features))
            nn.init.normal_(linear.bias)
        else:
            init(linear.weight)
            nn.init.zeros_(linear.bias)
    return model


def learning_speeds(model: nn.Module, images: data.ArrayDataset, comm: dp.comm.Communicator) -> list[float]:
    """‖∂C/∂b‖ of each hidden layer, first layer first, the mean over all images of all ranks."""
    parallel = dp.DataParallel(model, comm)
    (x, y), *_ = data.Loader(images, batch_size=len(images), comm=comm, shuffle=False)
    loss = F.binary_cross_entropy_with_logits(parallel(x), np.eye(10, dtype=np.float32)[y]) * 10
    loss.backward()
    biases = [module.bias for module in model.modules() if isinstance(module, nn.Linear)]
    return [float(np.linalg.norm(bias.grad)) for bias in biases[:-1]]


def through_time(scale: float, steps: int) -> float:
    """‖∂L/∂h₀‖ of a recurrent network whose weight has spectral radius about `scale`, after `steps` steps."""
    rnn = nn.RNN(WIDTH, WIDTH, nonlinearity="relu", batch_first=True)
    nn.init.orthogonal_(rnn.weight_hh_l0, gain=scale)
    nn.init.zeros_(rnn.bias_hh_l0)
    h0 = dp.tensor(np.full((1, 1, WIDTH), 0.1, np.float32), requires_grad=True)
    output, _ = rnn(np.zeros((1, steps, WIDTH), np.float32), h0)
    output[:, -1].sum().backward()
    return float(np.linalg.norm(h0.grad))
