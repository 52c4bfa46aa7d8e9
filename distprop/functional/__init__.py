"""Differentiable operations as plain functions, with PyTorch's names, arguments and defaults.

    from distprop import functional as F
    loss = F.cross_entropy(F.linear(x, weight, bias), labels)

Each accepts tensors or NumPy arrays and returns a tensor.
"""

from distprop.functional.activation import (
    elu,
    gelu,
    leaky_relu,
    log_softmax,
    relu,
    sigmoid,
    silu,
    softmax,
    softplus,
    tanh,
)
from distprop.functional.dropout import dropout
from distprop.functional.linear import linear
from distprop.functional.loss import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    huber_loss,
    l1_loss,
    mse_loss,
    nll_loss,
)

__all__ = [
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "dropout",
    "elu",
    "gelu",
    "huber_loss",
    "l1_loss",
    "leaky_relu",
    "linear",
    "log_softmax",
    "mse_loss",
    "nll_loss",
    "relu",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "tanh",
]
